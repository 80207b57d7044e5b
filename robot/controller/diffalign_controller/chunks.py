"""From chunks of actions to one action a control tick.

A chunk that was decided on the observation of tick b holds an action for each of the ticks b ... b + Ta - 1. Every
scheme here knows the tick it is asked for, so that a chunk that arrives late loses the actions whose time has passed,
instead of shifting all of them (Diffusion Policy, arXiv 2303.04137, on real robots).

Legend: Ta actions of a chunk, Da action features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Scheme(Protocol):
    """How chunks are executed."""

    def add(self, tick: int, chunk: Array) -> None:
        """Take a chunk [Ta, Da] that was decided on the observation of `tick`."""
        ...

    def action(self, tick: int) -> Array | None:
        """The action [Da] of a tick, None if no chunk reaches it."""
        ...

    def wants(self, tick: int) -> bool:
        """Whether a new chunk should be decided on the observation of this tick."""
        ...

    def clear(self) -> None:
        """Forget all chunks."""
        ...


@dataclass
class RecedingHorizon:
    """The newest chunk, asked for again `execute` ticks after the last one was asked (arXiv 2303.04137)."""

    execute: int
    _tick: int | None = None
    _chunk: Array | None = None

    def __post_init__(self) -> None:
        if self.execute < 1:
            raise ValueError(f"execute must be at least 1 tick, got {self.execute}")

    def add(self, tick: int, chunk: Array) -> None:
        """Take it, unless a newer one is there."""
        if self._tick is None or tick >= self._tick:
            self._tick, self._chunk = tick, chunk

    def action(self, tick: int) -> Array | None:
        """The newest chunk's."""
        if self._tick is None or self._chunk is None or not 0 <= tick - self._tick < len(self._chunk):
            return None
        found: Array = self._chunk[tick - self._tick]
        return found

    def wants(self, tick: int) -> bool:
        """`execute` ticks after the newest chunk's observation."""
        return self._tick is None or tick - self._tick >= self.execute

    def clear(self) -> None:
        """Forget the chunk."""
        self._tick = self._chunk = None


@dataclass
class TemporalEnsemble:
    """A weighted mean of what all chunks say about a tick, a new chunk wanted every `execute` ticks (ACT, 2304.13705).

    w_i = exp(-decay i) with i = 0 the oldest, the authors' order and their 0.01: the mean is smooth and late, and it
    lies between modes where chunks disagree about them.
    """

    decay: float = 0.01
    execute: int = 1
    _chunks: list[tuple[int, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.decay >= 0 or self.execute < 1:
            raise ValueError(f"decay must be at least 0 and execute at least 1, got {self.decay} and {self.execute}")

    def add(self, tick: int, chunk: Array) -> None:
        """Take it in the order of observation."""
        self._chunks = sorted([*self._chunks, (tick, chunk)], key=lambda entry: entry[0])

    def action(self, tick: int) -> Array | None:
        """sum w_i a_i / sum w_i over the chunks that reach this tick."""
        self._chunks = [entry for entry in self._chunks if tick < entry[0] + len(entry[1])]
        said = [chunk[tick - start] for start, chunk in self._chunks if start <= tick]
        if not said:
            return None
        weights = np.exp(-self.decay * np.arange(len(said), dtype=np.float64))
        mean: Array = (weights @ np.stack(said) / weights.sum()).astype(np.float32)
        return mean

    def wants(self, tick: int) -> bool:
        """`execute` ticks after the newest chunk's observation."""
        return not self._chunks or tick - self._chunks[-1][0] >= self.execute

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks = []
