"""Decisions beside the control loop: in a thread of their own, or in its line.

Legend: Ta actions of a chunk, Da action features, Do observation features.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Decide = Callable[..., Array]
"""The chunk for an observation, and for a Plan where the scheme tells of one."""


class Plan(NamedTuple):
    """What is planned already for the actions of a chunk to come: real-time chunking (arXiv 2506.07339).

    previous: [Ta, Da], in robot units. weight: [Ta], 1 where it will be executed before the chunk is there, falling to
    0 where nothing is planned.
    """

    previous: Array
    weight: Array


class Decided(NamedTuple):
    """The chunk [Ta, Da] that was decided on the observation of a time, or why there is none.

    time: in control periods. took_s: what the decision took.
    """

    time: float
    chunk: Array | None
    error: str | None = None
    took_s: float = 0.0


class Inference(Protocol):
    """One decision at a time."""

    def ask(self, time: float, obs: Array, plan: Plan | None = None) -> None:
        """Decide on the observation [Do] of a time in control periods; only when nothing is pending."""
        ...

    def answer(self) -> Decided | None:
        """The decision if it is there; returns at once."""
        ...


class InLine:
    """Decides when it is asked: the loop waits. For policies that need a fraction of a control period."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._answer: Decided | None = None

    def ask(self, time: float, obs: Array, plan: Plan | None = None) -> None:
        """Decide now."""
        self._answer = _decided(self._decide, time, obs, plan)

    def answer(self) -> Decided | None:
        """What was decided, once."""
        found, self._answer = self._answer, None
        return found


class Threaded:
    """Decides in a thread; onnxruntime and numpy release Python's lock, so that the loop keeps its rate."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._questions: queue.SimpleQueue[tuple[float, Array, Plan | None] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Decided] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def ask(self, time: float, obs: Array, plan: Plan | None = None) -> None:
        """Hand the observation to the thread."""
        self._questions.put((time, obs.copy(), plan))

    def answer(self) -> Decided | None:
        """The oldest answer that was not yet taken."""
        try:
            return self._answers.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """End the thread after the decision that it is at."""
        self._questions.put(None)

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            self._answers.put(_decided(self._decide, *question))


def _decided(decide: Decide, time: float, obs: Array, plan: Plan | None) -> Decided:
    start = perf_counter()
    try:
        chunk = decide(obs) if plan is None else decide(obs, plan)
    except Exception as error:  # whatever it is: the loop must hear of it and stop the robot
        return Decided(time, None, f"{type(error).__name__}: {error}", perf_counter() - start)
    return Decided(time, chunk, None, perf_counter() - start)
