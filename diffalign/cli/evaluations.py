"""The evaluations of a run folder, read back as measures with intervals."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HOW = ("sampler", "episodes", "split", "prompts", "images", "seed")


@dataclass(frozen=True, order=True)
class Measure:
    """One number with its 95 % interval, which may be missing."""

    value: float
    low: float | None = None
    high: float | None = None
    percent: bool = False

    def text(self) -> str:
        """The value, rates as per cent."""
        return f"{100 * self.value:.0f}%" if self.percent else f"{self.value:.4g}"

    def interval(self) -> str:
        """`[low, high]`, empty without an interval."""
        if self.low is None or self.high is None:
            return ""
        if self.percent:
            return f"[{100 * self.low:.0f}%, {100 * self.high:.0f}%]"
        return f"[{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Evaluation:
    """One file of evaluations/: its name, the training step, the measures, and how they were sampled in words."""

    name: str
    step: int | None
    measures: dict[str, Measure]
    how: str


def read_evaluations(folder: Path) -> list[Evaluation]:
    """before, then by step, then after."""
    found = [_read(file) for file in sorted(folder.glob("*.json"))]
    order = {"before": 0, "after": 2}
    return sorted(found, key=lambda e: (order.get(e.name, 1), e.step if e.step is not None else -1, e.name))


def _read(file: Path) -> Evaluation:
    record = json.loads(file.read_text())
    number = re.search(r"(\d+)$", file.stem)
    step = record.get("step", int(number[1]) if number else None)
    how = ", ".join(f"{name} {record[name]}" for name in _HOW if name in record)
    return Evaluation(file.stem.replace("_", " "), step, measures(record), how)


def measures(record: Mapping[str, Any]) -> dict[str, Measure]:
    """The measures in an evaluation object of either domain."""
    found: dict[str, Measure] = {}
    if "success_rate" in record:
        found["success rate"] = _with_interval(record["success_rate"], record.get("interval"), percent=True)
    if "return_mean" in record:
        found["return"] = _with_interval(record["return_mean"], record.get("return_interval"))
    for name, reward in record.get("rewards", {}).items():
        found[name.replace("_", " ")] = _with_interval(reward["mean"], reward.get("interval"))
    if record.get("kl_nats") is not None:
        found["KL to base (nats)"] = _with_interval(record["kl_nats"], record.get("kl_interval"))
    return found


def _with_interval(value: float, interval: list[float] | None, *, percent: bool = False) -> Measure:
    low, high = interval if interval else (None, None)
    return Measure(float(value), low, high, percent)
