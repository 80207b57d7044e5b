"""LeRobotDataset v3 in a local folder, through lerobot itself (extra [lerobot]); no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffalign_robot.data.dataset import Dataset, assemble

_STATE, _WORLD = "observation.state", "observation.environment_state"


def recognizes(path: Path) -> bool:
    """Whether the folder holds a LeRobotDataset."""
    return (path / "meta" / "info.json").is_file()


def read(path: Path) -> Dataset:
    """Every episode with its float features `observation.*`, the state first; cameras are left out.

    An episode succeeded if next.success says so on a step, without it if a step paid at least 1 (next.reward).

    Raises: ValueError if no observation consists of numbers.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    source = LeRobotDataset(f"local/{path.name}", root=path)
    keys = [key for key in (_STATE, _WORLD) if key in source.features]
    keys += [key for key, feature in source.features.items()
             if key.startswith("observation.") and feature["dtype"].startswith("float") and key not in keys]
    if not keys:
        raise ValueError(f"{path} has no observation of numbers, only {list(source.features)}")
    rows = source.hf_dataset.with_format("numpy")
    _, ends = np.unique(np.asarray(rows["episode_index"]), return_counts=True)
    cuts = ends.cumsum()[:-1]

    def column(name: str) -> list[Any]:
        values = np.stack(list(rows[name]))
        return np.split(values.reshape(len(values), -1), cuts)

    columns = {key: column(key) for key in keys}
    has = source.features.keys()
    success = [bool(part.any()) for part in column("next.success")] if "next.success" in has else None
    reward = [part[:, 0] for part in column("next.reward")] if "next.reward" in has else None
    tasks = [str(task) for task in source.meta.tasks.index]
    return assemble([{key: columns[key][i] for key in keys} for i in range(len(ends))], action=column("action"),
                    reward=reward, success=success, rate_hz=float(source.fps),
                    environment={"task": tasks[0]} if len(tasks) == 1 else {})


def write(data: Dataset, path: Path) -> None:
    """Write a new folder: observation.state and .environment_state, action, next.reward, next.success, next.done.

    The parts called object (robomimic) or environment_state are the environment's state, all others are joined to
    observation.state.

    Raises: ValueError if the folder exists, or the control rate is not known or no whole number.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if data.rate_hz is None or data.rate_hz != int(data.rate_hz):
        raise ValueError(f"LeRobot needs a whole number of control steps a second, got {data.rate_hz}; "
                         "give it with --rate-hz")
    if path.exists():
        raise ValueError(f"{path} exists; LeRobot writes new folders only")
    columns = {name: data.select(keys).episodes.obs for name, keys in _features(data).items()}
    names = {name: [f"{key}.{i}" for key in keys for i in range(data.keys[key])]
             for name, keys in _features(data).items()}
    names["action"] = [f"action.{i}" for i in range(data.episodes.action.shape[1])]
    columns["action"] = data.episodes.action
    features: dict[str, dict[str, Any]] = {
        name: {"dtype": "float32", "shape": (len(said),), "names": said} for name, said in names.items()}
    features["next.reward"] = {"dtype": "float32", "shape": (1,), "names": None}
    features |= {name: {"dtype": "bool", "shape": (1,), "names": None} for name in ("next.done", "next.success")}
    target = LeRobotDataset.create(f"local/{path.name}", int(data.rate_hz), features, root=path, use_videos=False)
    reward, success = data.paid(), data.episodes.success
    for number, (start, end) in enumerate(data.episodes.spans()):
        for step in range(start, end):
            last = step == end - 1
            target.add_frame({**{name: column[step].numpy() for name, column in columns.items()},
                              "next.reward": reward[step : step + 1].numpy(), "next.done": np.array([last]),
                              "next.success": np.array([last and bool(success[number])]), "task": data.task()})
        target.save_episode()
    target.finalize()


def _features(data: Dataset) -> dict[str, list[str]]:
    world = [key for key in data.keys if key in ("object", "environment_state", _WORLD)]
    state = [key for key in data.keys if key not in world]
    return {name: keys for name, keys in ((_STATE, state), (_WORLD, world)) if keys}
