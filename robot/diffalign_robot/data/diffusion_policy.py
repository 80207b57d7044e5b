"""Diffusion Policy's zarr: flat arrays under data/, and meta/episode_ends (read only; needs zarr)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffalign_robot.data.dataset import Dataset, assemble

_NEVER_OBSERVED = ("action", "reward", "n_contacts")


def recognizes(path: Path) -> bool:
    """Whether the path is a zarr folder or a zipped one."""
    return path.name.endswith((".zarr", ".zarr.zip")) or (path / "meta" / "episode_ends").is_dir()


def read(path: Path) -> Dataset:
    """Every episode with all its arrays of one or two axes beside the actions; pictures are left out.

    Keypoints [T, n, 2] are flattened. Nothing says which episodes succeeded unless there is a reward.

    Raises: ValueError if the file is not Diffusion Policy's, or its episodes do not cover its steps.
    """
    import zarr

    root = zarr.open(str(path), mode="r")
    if "data/action" not in root or "meta/episode_ends" not in root:
        raise ValueError(f"{path} is no Diffusion Policy data set: it lacks data/action or meta/episode_ends")
    data, ends = root["data"], np.asarray(root["meta/episode_ends"][:], np.int64)
    arrays = {key: np.asarray(data[key][:]) for key in sorted(data) if data[key].ndim <= 3}
    action = arrays["action"]
    if len(ends) == 0 or ends[-1] != len(action):
        raise ValueError(f"{path}: episodes end at step {ends[-1:].tolist()}, but there are {len(action)} actions")
    keys = sorted((key for key in arrays if key not in _NEVER_OBSERVED), key=lambda key: (key != "state", key))
    columns = {key: np.split(arrays[key].reshape(len(action), -1), ends[:-1]) for key in keys}
    reward = np.split(arrays["reward"].reshape(-1), ends[:-1]) if "reward" in arrays else None
    return assemble([{key: columns[key][i] for key in keys} for i in range(len(ends))],
                    action=np.split(action, ends[:-1]), reward=reward, success=None)
