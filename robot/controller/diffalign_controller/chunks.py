"""From chunks of actions to the action of any moment.

A chunk that was decided on an observation of time b holds an action for each of the times b ... b + Ta - 1. Time counts
in control periods and is a real number, because robots are commanded more often than policies were trained to act and
observe when they like. Every scheme knows the time it is asked for, so that a chunk that arrives late loses the actions
whose time has passed, instead of shifting all of them (Diffusion Policy, arXiv 2303.04137, on real robots).

Legend: Ta actions of a chunk, Da action features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.inference import Plan

Array = NDArray[np.float32]
Between = Literal["hold", "linear"]  # what is commanded between two actions
_NEAR = 1e-6  # of a control period: times are sums of fractions


class Scheme(Protocol):
    """How chunks are executed."""

    def add(self, time: float, chunk: Array, arrived: float | None = None) -> None:
        """Take a chunk [Ta, Da] that was decided on the observation of `time` and is here since `arrived`."""
        ...

    def action(self, time: float, between: Between = "hold") -> Array | None:
        """The action [Da] of a moment, None if no chunk reaches it."""
        ...

    def wants(self, time: float, delay: float = 0.0) -> bool:
        """Whether a new chunk, which arrives `delay` after it is asked for, should be asked for now."""
        ...

    def plan(self, time: float, arrival: float) -> Plan | None:
        """What the policy is told of the plan when it decides on the observation of `time`, None for nothing.

        arrival: when the chunk is expected to be here.
        """
        ...

    def clear(self) -> None:
        """Forget all chunks."""
        ...


def played(chunk: Array, age: float, between: Between) -> Array | None:
    """The action [Da] of a chunk [Ta, Da] `age` control periods after its observation, None outside it.

    linear: on the line to the next action, and the last action for its whole period.
    """
    i = math.floor(age + _NEAR)
    if not 0 <= i < len(chunk):
        return None
    here: Array = chunk[i]
    if between == "hold" or i + 1 == len(chunk):
        return here
    between_actions: Array = here + np.float32(max(age - i, 0.0)) * (chunk[i + 1] - here)
    return between_actions


def soft_mask(age: float, delay: float, end: float, kind: Literal["exp", "linear"]) -> float:
    """The weight of what was planned before, `age` periods after the observation of the chunk that follows it.

    Real-time chunking's (arXiv 2506.07339) with `end` for its H - s, where the old plan ends, and delay + 1 for its d,
    so that the weight is 1 at the moment of arrival: c = (end - age) / (end - delay), then c or c (e^c - 1) / (e - 1).
    """
    if age >= end:
        return 0.0
    c = min(1.0, (end - age) / (end - delay)) if delay < end else 1.0
    return c if kind == "linear" else c * math.expm1(c) / (math.e - 1)


@dataclass
class RecedingHorizon:
    """The newest chunk, asked for again `execute` periods after its observation (arXiv 2303.04137).

    Here and in the other schemes the question is put earlier where the chunk would end before the answer is there.
    mask: real-time chunking (arXiv 2506.07339): the policy is told what this chunk still holds, with the weights of
    this soft mask, and goes on from there; None tells it nothing.
    """

    execute: int
    mask: Literal["exp", "linear"] | None = None
    _time: float | None = None
    _chunk: Array | None = None

    def __post_init__(self) -> None:
        _require_execute(self.execute)

    def add(self, time: float, chunk: Array, arrived: float | None = None) -> None:
        """Take it, unless a newer one is there."""
        if self._time is None or time >= self._time:
            self._time, self._chunk = time, chunk

    def action(self, time: float, between: Between = "hold") -> Array | None:
        """The newest chunk's."""
        return None if self._time is None or self._chunk is None else played(self._chunk, time - self._time, between)

    def wants(self, time: float, delay: float = 0.0) -> bool:
        """`execute` periods after the newest chunk's observation, or `delay` before its end."""
        return self._time is None or self._chunk is None or _due(time - self._time, self.execute, self._chunk, delay)

    def plan(self, time: float, arrival: float) -> Plan | None:
        """The chunk's actions at time, time + 1 ...: on the line between two, the last one where it has ended."""
        if self.mask is None or self._time is None or self._chunk is None:
            return None
        size, age = len(self._chunk), time - self._time
        ages = age + np.arange(size)
        previous = [np.interp(ages, np.arange(size), feature) for feature in self._chunk.T]
        weight = [soft_mask(i, arrival - time, size - age, self.mask) for i in range(size)]
        return Plan(np.stack(previous, 1).astype(np.float32), np.array(weight, np.float32))

    def clear(self) -> None:
        """Forget the chunk."""
        self._time = self._chunk = None


@dataclass
class TemporalEnsemble:
    """A weighted mean of what all chunks say about a moment, asked for every `execute` periods (ACT, arXiv 2304.13705).

    w_i = exp(-decay i) with i = 0 the oldest, the authors' order and their 0.01: the mean is smooth and late, and it
    lies between modes where chunks disagree about them.
    """

    decay: float = 0.01
    execute: int = 1
    _chunks: list[tuple[float, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require_execute(self.execute)
        if not self.decay >= 0:
            raise ValueError(f"decay must be at least 0, got {self.decay}")

    def add(self, time: float, chunk: Array, arrived: float | None = None) -> None:
        """Take it in the order of observation."""
        self._chunks = sorted([*self._chunks, (time, chunk)], key=lambda entry: entry[0])

    def action(self, time: float, between: Between = "hold") -> Array | None:
        """sum w_i a_i / sum w_i over the chunks that reach this moment."""
        self._chunks = [entry for entry in self._chunks if time + _NEAR < entry[0] + len(entry[1])]
        all_said = (played(chunk, time - start, between) for start, chunk in self._chunks)
        said = [action for action in all_said if action is not None]
        if not said:
            return None
        weights = np.exp(-self.decay * np.arange(len(said), dtype=np.float64))
        mean: Array = (weights @ np.stack(said) / weights.sum()).astype(np.float32)
        return mean

    def wants(self, time: float, delay: float = 0.0) -> bool:
        """`execute` periods after the newest chunk's observation, or `delay` before its end."""
        return not self._chunks or _due(time - self._chunks[-1][0], self.execute, self._chunks[-1][1], delay)

    def plan(self, time: float, arrival: float) -> Plan | None:
        """None."""
        return None

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks = []


@dataclass
class OverlapBlend:
    """The newest chunk, blended into what was planned before it: W old + (1 - W) new, W real-time chunking's soft mask.

    The plan is continuous where a chunk arrives, at no cost and with any policy. It is the mask of real-time chunking
    (arXiv 2506.07339) without its guidance: the policy does not know the old plan, so that where the two chunks belong
    to different modes the blend passes between them, as an ensemble does, for the length of the overlap.
    """

    execute: int
    mask: Literal["exp", "linear"] = "exp"
    _chunks: list[tuple[float, Array, float]] = field(default_factory=list)  # observed, chunk, arrived; oldest first

    def __post_init__(self) -> None:
        _require_execute(self.execute)

    def add(self, time: float, chunk: Array, arrived: float | None = None) -> None:
        """Take it, unless a newer one is there."""
        if not self._chunks or time >= self._chunks[-1][0]:
            self._chunks.append((time, chunk, time if arrived is None else arrived))

    def action(self, time: float, between: Between = "hold") -> Array | None:
        """Each chunk in its turn blended into the plan of those before it."""
        plan: Array | None = None
        plan_end = -math.inf
        for start, chunk, arrived in self._chunks:
            new = played(chunk, time - start, between)
            if plan is not None and new is not None:
                weight = np.float32(soft_mask(time - start, arrived - start, plan_end - start, self.mask))
                new = weight * plan + (1 - weight) * new
            plan, plan_end = new, start + len(chunk)
        self._forget(time)
        return plan

    def wants(self, time: float, delay: float = 0.0) -> bool:
        """`execute` periods after the newest chunk's observation, or `delay` before its end."""
        return not self._chunks or _due(time - self._chunks[-1][0], self.execute, self._chunks[-1][1], delay)

    def plan(self, time: float, arrival: float) -> Plan | None:
        """None."""
        return None

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks = []

    def _forget(self, time: float) -> None:
        """Drop the chunks that have ended, of which the next one's weight is all; the newest stays."""
        ended = [time >= start + len(chunk) for start, chunk, _ in self._chunks[:-1]]
        last = max((number + 1 for number, over in enumerate(ended) if over), default=0)
        self._chunks = self._chunks[last:]


def _due(age: float, execute: int, chunk: Array, delay: float) -> bool:
    return age + _NEAR >= min(execute, len(chunk) - delay)


def _require_execute(execute: int) -> None:
    if execute < 1:
        raise ValueError(f"execute must be at least 1 tick, got {execute}")
