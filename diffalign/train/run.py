"""The run folder: resolved config, metrics as JSON lines, checkpoints, evaluations, environment."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from diffalign.train import checkpoint, distributed
from diffalign.train.state import TrainState

Listener = Callable[[int, Mapping[str, float], str, int | None], None]
_FIRST = (".config.yaml.partial",)  # all that a kill in create leaves
_PACKAGES = ("diffalign", "torch", "numpy", "diffusers", "transformers", "peft", "gymnasium", "mujoco", "metaworld")


@runtime_checkable
class Writer(Protocol):
    """A second place for metrics (TensorBoard, W&B)."""

    def __call__(self, step: int, metrics: Mapping[str, float], phase: str) -> None: ...


class Run:
    """One run folder; see the README for the files in it. Of several processes the first alone writes.

    listener: called as (step, metrics, phase, total) after every logged line, for progress displays.
    writers: further metric sinks. say: shows a line of text to people.
    """

    def __init__(self, path: Path, *, listener: Listener | None = None, writers: tuple[Writer, ...] = ()) -> None:
        self.path = path
        self.total: int | None = None
        self.listener = listener
        self.writers = writers
        self.say: Callable[[str], None] = lambda text: None
        self._spent = _last_cost(path / "costs.jsonl") - _cpu_seconds()  # by earlier sessions, before this clock

    @classmethod
    def create(cls, path: Path, config_yaml: str, *, resume: bool, listener: Listener | None = None,
               writers: tuple[Writer, ...] = ()) -> Run:
        """Open a new folder, or with `resume` one of the same config.

        Raises: ValueError if the folder holds a run and resume is False, or if its config differs.
        """
        if not distributed.leads():
            distributed.barrier()  # until the first process has made the folder, or refused and ended
            return cls(path)
        config = path / "config.yaml"
        if config.exists():
            if not resume:
                raise ValueError(f"{path} already holds a run; add --resume to go on with it or choose another --run")
            if config.read_text() != config_yaml:
                difference = _differing(config.read_text(), config_yaml)
                raise ValueError(f"{path} was started with another config ({difference}); "
                                 "resume needs the same one, or choose another --run")
        elif path.exists() and any(entry.name not in _FIRST for entry in path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no run; choose another --run")
        path.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path / "costs.jsonl")
        run = cls(path, listener=listener, writers=writers)
        if not config.exists():
            _replace(config, config_yaml)
        if not (path / "environment.json").exists():
            run.write_json("environment.json", environment())
        distributed.barrier()
        return run

    def folder(self, name: str) -> Path:
        """The sub-folder `name`, created."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log(self, step: int, metrics: Mapping[str, float], phase: str = "train") -> None:
        """Append one line to metrics.jsonl and tell the listener and the writers.

        Evaluations are also stamped in costs.jsonl with the CPU seconds that the run has used, those of killed sessions
        included; worker processes count once they have ended. metrics.jsonl itself has no clock.
        """
        if not distributed.leads():
            return
        self._append("metrics.jsonl", {"phase": phase, "step": step, **{k: float(v) for k, v in metrics.items()}})
        if phase == "eval":
            self._append("costs.jsonl", {"step": step, "cpu_s": round(self._spent + _cpu_seconds(), 1)})
        for writer in self.writers:
            writer(step, metrics, phase)
        if self.listener is not None:
            self.listener(step, metrics, phase, self.total)

    def clock(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line of times and rates, which no two runs share, to throughput.jsonl and tell the writers."""
        if not distributed.leads():
            return
        self._append("throughput.jsonl", {"step": step, **{k: round(float(v), 3) for k, v in metrics.items()}})
        for writer in self.writers:
            writer(step, metrics, "throughput")

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, state: TrainState, *, keep: int = 2) -> None:
        """Write a checkpoint of the state."""
        checkpoint.save(self.folder("checkpoints"), state, keep=keep)
        distributed.barrier()

    def restore(self, state: TrainState) -> bool:
        """Load the newest checkpoint if there is one, and cut metrics.jsonl back to its step."""
        found = checkpoint.latest(self.path / "checkpoints")
        distributed.barrier()  # no process may look after another has begun to write
        if found is None:
            if distributed.leads():
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
            return False
        checkpoint.load(found, state)
        if distributed.leads():
            self._truncate(state.step)
        return True

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write `name` (which may contain a folder) atomically."""
        target = self.path / name
        if distributed.leads():
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(target, json.dumps(value, indent=2) + "\n")
        return target

    def _truncate(self, step: int) -> None:
        metrics = self.path / "metrics.jsonl"
        if not metrics.exists():
            return
        kept = []
        for line in metrics.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut short
                break
            if record["step"] <= step:
                kept.append(line)
        _replace(metrics, "".join(line + "\n" for line in kept))


def environment() -> dict[str, Any]:
    """Versions and the machine in words, for environment.json."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": sys.version.split()[0], "platform": platform.platform(), "packages": packages,
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(), "accelerators": devices}


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _drop_torn_line(file: Path) -> None:
    """Cut what a kill left after the last line end."""
    text = file.read_text() if file.is_file() else ""
    if text and not text.endswith("\n"):
        _replace(file, text[: text.rfind("\n") + 1])


def _last_cost(file: Path) -> float:
    """CPU seconds at the last stamp."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return float(json.loads(lines[-1])["cpu_s"]) if lines else 0.0


def _replace(target: Path, text: str) -> None:
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)


def _differing(old: str, new: str) -> str:
    lines = [f"{a.strip()!r} is now {b.strip()!r}" for a, b in zip(old.splitlines(), new.splitlines()) if a != b]
    return "; ".join(lines[:3]) or "a different number of lines"
