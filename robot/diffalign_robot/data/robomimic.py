"""robomimic's HDF5: /data/demo_i with actions, rewards, dones and obs/<key>; needs h5py, not robomimic.

Layout: https://robomimic.github.io/docs/datasets/overview.html.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from diffalign_robot.data.dataset import Dataset, assemble

_CANONICAL = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")  # robomimic's low_dim
_ROBOSUITE, _GYM = 1, 2  # robomimic's EnvType


def recognizes(path: Path) -> bool:
    """Whether the path is an HDF5 file."""
    return path.is_file() and path.suffix in (".hdf5", ".h5")


def read(path: Path) -> Dataset:
    """Every episode in the order of its number, with robomimic's low-dimensional keys first.

    All parts of the observation with one axis are read; pictures are left out. An episode succeeded if its attribute
    `success` (ours) says so, else if a step paid at least 1.

    Raises: ValueError if the file is not robomimic's, or has no observation of numbers.
    """
    import h5py

    with h5py.File(path) as file:
        if "data" not in file or not len(file["data"]):
            raise ValueError(f"{path} is no robomimic data set: it has no episodes under /data, only {list(file)}")
        data = file["data"]
        demos = [data[name] for name in sorted(data, key=lambda name: int(name.rpartition("_")[2]))]
        keys = _low_dim(demos[0], path)
        said = [demo.attrs["success"] for demo in demos if "success" in demo.attrs]
        arguments = json.loads(data.attrs.get("env_args", "{}"))
        return assemble([{key: demo["obs"][key][:] for key in keys} for demo in demos],
                        action=[demo["actions"][:] for demo in demos],
                        reward=[demo["rewards"][:] for demo in demos] if "rewards" in demos[0] else None,
                        success=[bool(won) for won in said] if len(said) == len(demos) else None,
                        rate_hz=arguments.get("env_kwargs", {}).get("control_freq"), environment=arguments)


def write(data: Dataset, path: Path) -> None:
    """Write one file; `path` must end in .hdf5.

    dones is 1 on the last step of every episode. The observation after the last step was not recorded, so there is no
    next_obs: robomimic's imitation algorithms do without. Raises: ValueError for another ending.
    """
    import h5py

    if path.suffix != ".hdf5":
        raise ValueError(f"a robomimic data set is a file that ends in .hdf5, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    episodes, reward = data.episodes, data.paid().numpy()
    action, parts = episodes.action.numpy(), {key: data.part(key).numpy() for key in data.keys}
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["total"] = len(action)
        group.attrs["env_args"] = json.dumps(_env_args(data))
        for number, (start, end) in enumerate(episodes.spans()):
            demo = group.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = end - start
            demo.attrs["success"] = bool(episodes.success[number])
            demo["actions"], demo["rewards"] = action[start:end], reward[start:end]
            demo["dones"] = (np.arange(start, end) == end - 1).astype(np.int64)
            for key, part in parts.items():
                demo[f"obs/{key}"] = part[start:end]


def _low_dim(demo: Any, path: Path) -> list[str]:
    found = [key for key in demo["obs"] if demo["obs"][key].ndim == 2] if "obs" in demo else []
    if not found:
        raise ValueError(f"{path} holds no observations of numbers; extract them with robomimic's "
                         "dataset_states_to_obs")
    first = [key for key in _CANONICAL if key in found]
    return first + [key for key in found if key not in first]


def _env_args(data: Dataset) -> dict[str, Any]:
    if "env_name" in data.environment:
        return dict(data.environment)
    kind = _ROBOSUITE if data.environment.get("type") == "robosuite" else _GYM
    rate = {} if data.rate_hz is None else {"control_freq": data.rate_hz}
    return {"env_name": data.task(), "type": kind, "env_kwargs": {**data.environment, **rate}}
