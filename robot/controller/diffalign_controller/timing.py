"""What a loop measured of its own time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

_KEPT = 100_000
_RECENT = 50  # decisions on which the next one's delay is judged


def _times() -> deque[float]:
    return deque(maxlen=_KEPT)


@dataclass
class Timing:
    """Counts, and the newest durations in seconds.

    ticks: commands sent. missed: how many of them later than a period after their tick. periods_s: from one waking to
    the next. wakes_s: how late the loop woke. works_s: from waking to the end of the tick. delays_s: from asking for a
    decision to having it. decisions_s: of that, what the policy itself took.
    """

    ticks: int = 0
    missed: int = 0
    periods_s: deque[float] = field(default_factory=_times)
    wakes_s: deque[float] = field(default_factory=_times)
    works_s: deque[float] = field(default_factory=_times)
    delays_s: deque[float] = field(default_factory=_times)
    decisions_s: deque[float] = field(default_factory=_times)

    def delay_s(self, quantile: float) -> float:
        """How late the next decision is expected, 0 before the first. The first is left out when others are there."""
        recent = _newest(self.delays_s, min(_RECENT, max(1, len(self.delays_s) - 1)))
        return _quantile(sorted(recent), quantile) if recent else 0.0

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """p50, p99 and max of every duration that was measured, by name."""
        every = {"decision": self.decisions_s, "delay": self.delays_s, "tick": self.works_s, "wake": self.wakes_s,
                 "period": self.periods_s}
        return {name: quantiles_ms(values) for name, values in every.items() if values}


def quantiles_ms(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p99 and max in milliseconds, each one of the values."""
    ordered = sorted(seconds)
    return {name: 1000 * _quantile(ordered, q) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def status_line(state: str, reason: str, timing: Timing, ticks: int, seconds: float, chunk_s: float | None) -> str:
    """One line on the last `ticks` ticks, which took `seconds`; chunk_s: the age of the newest chunk, None for none."""
    parts = [f"tick {timing.ticks:6d}", f"{state:<9}", f"{ticks / seconds:6.1f} Hz" if seconds > 0 else "     - Hz",
             f"missed {timing.missed}", "chunk     - ms" if chunk_s is None else f"chunk {1000 * chunk_s:5.0f} ms old"]
    for name, values in (("work", timing.works_s), ("decision", timing.decisions_s)):
        if values:
            found = quantiles_ms(_newest(values, max(ticks, 1)))
            parts.append(f"{name} {found['p50']:.2f}/{found['max']:.2f} ms")
    return "  ".join([*parts, *([f"({reason})"] if reason else [])])


def _newest(values: deque[float], count: int) -> list[float]:
    return list(islice(reversed(values), count))


def _quantile(ordered: Sequence[float], quantile: float) -> float:
    """The smallest value that this share does not exceed. Not numpy's, whose first call takes 40 ms to load it."""
    return ordered[max(0, math.ceil(quantile * len(ordered) - 1e-9) - 1)]
