"""A run that ends in the middle, as a kill would end it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diffalign import config
from diffalign.train.run import Run


class Killed(Exception):
    """What ends it."""


def train_until(path: Path, job: Any, last: int) -> None:
    """Train a job in a new folder and stop it as soon as the metrics of training step `last` are logged."""

    def stop(step: int, metrics: Mapping[str, float], phase: str, total: int | None) -> None:
        if step == last and phase == "train":
            raise Killed

    with pytest.raises(Killed):
        job.train(Run.create(path, config.dump(job), resume=False, listener=stop))
