"""What a controller needs from a robot, and the clock that both share.

Legend: Do observation features of the policy, Da action features.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


class Observation(NamedTuple):
    """What a robot saw.

    values: [Do], in the order and units of the training environment. measured_s: when, on the controller's clock.
    position: [Da], where the commanded quantity is now, in the units of a command. tool: the tool's place in metres
    for the workspace box, None if it is not known.
    """

    values: Array
    measured_s: float
    position: Array
    tool: Array | None = None


class Robot(Protocol):
    """A robot, or a simulator in its place. A lost connection raises ConnectionError from any method."""

    def observe(self) -> Observation:
        """The newest observation; returns at once."""
        ...

    def command(self, action: Array) -> None:
        """Send a command [Da] that the safety filter let through; returns at once."""
        ...

    def emergency_stop_pressed(self) -> bool:
        """Whether somebody wants the robot to stop now."""
        ...


class Clock(Protocol):
    """Seconds that never go back."""

    def now_s(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def sleep_until(self, moment_s: float) -> None:
        """Return at that moment, at once if it has passed."""
        ...


class MonotonicClock:
    """The machine's monotonic clock, the same in all processes of a machine."""

    def now_s(self) -> float:
        """time.monotonic()."""
        return time.monotonic()

    def sleep_until(self, moment_s: float) -> None:
        """time.sleep for the rest."""
        rest = moment_s - time.monotonic()
        if rest > 0:
            time.sleep(rest)
