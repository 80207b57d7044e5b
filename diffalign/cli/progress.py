"""Console progress of a run: a rich bar in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

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
        self.first: tuple[float, int] | None = None
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> ConsoleProgress:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
                TextColumn("{task.fields[shown]}"),
                console=self.console,
            )
            self.task = self.bar.add_task(self.title, total=None, pace="", shown="starting")
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if kind is None:
            self.say(f"{self.title}: done in {duration(time.monotonic() - self.started)}")

    def __call__(self, step: int, metrics: Mapping[str, float], phase: str, total: int | None) -> None:
        """One logged line of the run."""
        now = time.monotonic()
        if self.first is None:  # what came before was set-up, or a session that this one resumes
            self.first = now, step
        shown, pace = key_metrics(metrics), self._pace(now, step, total)
        if phase != "train":
            self.say(f"{self.title}: {phase} at step {step}: {shown}")
        elif self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, total=total, pace=pace, shown=shown)
        elif now - self.last_line >= self.every:
            self.last_line = now
            count = f"step {step}/{total}" if total else f"step {step}"
            self.say(f"{self.title}: {', '.join(part for part in (count, pace) if part)}; {shown}")

    def _pace(self, now: float, step: int, total: int | None) -> str:
        """`2.5 steps/s, 12 s left`; empty at first, where what came before was set-up or an earlier session."""
        if self.first is None:
            self.first = now, step
        since, steps = now - self.first[0], step - self.first[1]
        if steps <= 0 or since <= 0:
            return ""
        left = f", {duration((total - step) * since / steps)} left" if total else ""
        return speed(steps / since) + left

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
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
