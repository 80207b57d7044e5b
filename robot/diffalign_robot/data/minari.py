"""A Minari data set in a local folder (read only; needs minari)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign_robot.data.dataset import Dataset, assemble


def recognizes(path: Path) -> bool:
    """Whether the folder holds a Minari data set (its data/metadata.json)."""
    return (path / "data" / "metadata.json").is_file()


def read(path: Path) -> Dataset:
    """Every episode; the flat entries of a Dict observation are its parts, a Box is one part called obs.

    The observation after the last step is dropped. An episode succeeded if infos/success says so on a step, without it
    if a step paid at least 1.
    """
    import minari

    source = minari.MinariDataset(path / "data")
    episodes = list(source.iterate_episodes())
    infos = [episode.infos or {} for episode in episodes]
    flag = next((name for name in ("success", "is_success") if infos and name in infos[0]), None)
    spec = source.spec.env_spec
    return assemble([_parts(episode.observations, len(episode.actions)) for episode in episodes],
                    action=[np.asarray(episode.actions) for episode in episodes],
                    reward=[np.asarray(episode.rewards) for episode in episodes],
                    success=None if flag is None else [bool(np.asarray(info[flag]).any()) for info in infos],
                    environment={} if spec is None else {"type": "gymnasium", "id": spec.id})


def _parts(observations: Any, length: int) -> dict[str, NDArray[Any]]:
    if not isinstance(observations, dict):
        observations = {"obs": observations}
    return {key: np.asarray(part)[:length] for key, part in observations.items() if np.ndim(part) == 2}
