"""Console progress of a run: a rich bar in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# The metrics worth a glance, best first; a page or a line shows them before all others.
KEY_METRICS = (
    "success_rate",
    "rollout/success_rate",
    "reward/mean",
    "samples/verifiable",
    "samples/jpeg_kb",
    "loss",
    "kl",
    "ratio_drift",
)


class ConsoleProgress:
    """A `Run` listener, used as a context manager: shows rate, time left and a few key metrics on stderr."""

    def __init__(self, title: str, *, seconds_between_lines: float = 10.0, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        self.every = seconds_between_lines
        self.started = time.monotonic()
        self.last_line = float("-inf")
        self.first_step: int | None = None
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> ConsoleProgress:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=self.console,
            )
            self.task = self.bar.add_task(self.title, total=None, rate="", shown="starting")
            self.bar.start()
        else:
            self.console.print(f"{self.title}: starting", highlight=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if kind is None:
            self._say(f"{self.title}: done in {duration(time.monotonic() - self.started)}")

    def __call__(self, step: int, metrics: Mapping[str, float], phase: str, total: int | None) -> None:
        """One logged line of the run."""
        now = time.monotonic()
        if self.first_step is None:
            self.first_step, self.started = step - 1, min(self.started, now)
        rate = (step - self.first_step) / max(now - self.started, 1e-9)
        shown = key_metrics(metrics)
        if phase != "train":
            self._say(f"{self.title}: {phase} at step {step}: {shown}")
        elif self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, total=total, rate=speed(rate), shown=shown)
        elif now - self.last_line >= self.every:
            self.last_line = now
            left = f", {duration((total - step) / rate)} left" if total and rate > 0 else ""
            self._say(f"{self.title}: step {step}{f'/{total}' if total else ''}, {speed(rate)}{left}; {shown}")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def key_metrics(metrics: Mapping[str, float], count: int = 4) -> str:
    """The few metrics worth a glance: the known key ones first, then whatever was logged."""
    names = [name for name in KEY_METRICS if name in metrics]
    names += [name for name in metrics if name not in names]
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in names[:count])


def speed(rate: float) -> str:
    """Steps per second, or seconds per step where that reads better."""
    return f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s/step"


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
