"""Our own format: demonstrations.safetensors and demonstrations.json in a folder."""

from __future__ import annotations

import json
from pathlib import Path

from diffalign_robot.data.dataset import Dataset
from diffalign_robot.demos import Demonstrations


def recognizes(path: Path) -> bool:
    """Whether the folder was written by `diffalign collect` or by `write`."""
    return (path / "demonstrations.safetensors").is_file()


def read(path: Path) -> Dataset:
    """The data set of a run folder; observations without named parts are one part called obs."""
    episodes, file = Demonstrations.load(path), path / "demonstrations.json"
    said = json.loads(file.read_text()) if file.is_file() else {}
    return Dataset(episodes, said.get("keys") or {"obs": episodes.obs.shape[1]}, None, said.get("says_success", True),
                   said.get("control_rate_hz"), said.get("environment", {}))


def write(data: Dataset, path: Path) -> None:
    """Write the folder; rewards have no place in it."""
    data.episodes.save(path, {"keys": dict(data.keys), "says_success": data.says_success,
                              "control_rate_hz": data.rate_hz, "environment": dict(data.environment)})
