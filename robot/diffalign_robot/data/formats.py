"""Which format a path is, and data sets read and written by it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from diffalign_robot.choices import Environment, MetaWorld
from diffalign_robot.data import diffusion_policy, lerobot, minari, robomimic, run_folder
from diffalign_robot.data.dataset import Dataset
from diffalign_robot.demos import Demonstrations

_READ: dict[str, ModuleType] = {"run": run_folder, "robomimic": robomimic, "lerobot": lerobot, "minari": minari,
                                "zarr": diffusion_policy}
_WRITE = {"run": run_folder.write, "robomimic": robomimic.write, "lerobot": lerobot.write}


def format_of(path: Path) -> str:
    """run, robomimic, lerobot, minari or zarr. Raises: ValueError for a path that is none of these."""
    for name, module in _READ.items():
        if path.exists() and module.recognizes(path):
            return name
    what = "is no data set of a known format" if path.exists() else "holds no demonstrations (it does not exist)"
    raise ValueError(f"{path} {what}; a run folder, a robomimic .hdf5, a LeRobotDataset v3 folder, a Minari folder or "
                     "a Diffusion Policy .zarr is needed; make them with "
                     f"`diffalign train configs/robot/pick_place_collect.yaml --run {path}`")


def read(path: Path) -> Dataset:
    """The data set at a path. Raises: ValueError naming the known formats; ModuleNotFoundError without its extra."""
    found: Dataset = _READ[format_of(path)].read(path)
    return found


def write(data: Dataset, target: str) -> Path:
    """Write `data` to `FORMAT:PATH` and return the path.

    Raises: ValueError for an unknown format or a path that is taken.
    """
    name, colon, place = target.partition(":")
    if not colon or not place or name not in _WRITE:
        raise ValueError(f"--to must be FORMAT:PATH with FORMAT one of {', '.join(_WRITE)}, got {target!r}")
    if data.episodes.image is not None and name != "run":
        raise ValueError(f"the data set has images, which {name} data sets written here do not hold; use run:{place}")
    path = Path(place)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is already there; choose another path")
    _WRITE[name](data, path)
    return path


def load_demonstrations(path: str, environment: Environment) -> Demonstrations:
    """The demonstrations at a path, as the environment shows its observations.

    Where the data set has every key of the environment, these parts are taken in that order; otherwise all of its
    observation counts.

    Raises: ValueError if the data set has no images, or others than the environment.
    """
    data = read(Path(path))
    keys = () if isinstance(environment, MetaWorld) else environment.keys
    episodes = (data.select(keys) if keys and set(keys) <= data.keys.keys() else data).episodes
    found = None if episodes.image is None else tuple(episodes.image.shape[1:])
    wanted = None if environment.images is None else environment.images.shape
    if found != wanted:
        raise ValueError(f"{path} has images of the shape {found} (cameras, 3, size, size) and the environment of "
                         f"{wanted}; None is none. Record demonstrations in the environment of the policy")
    return episodes
