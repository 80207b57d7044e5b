"""How a controller runs, the states it is in, and the codes it ends with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Literal

from diffalign_controller.watchdog import Watchdog


class State(Enum):
    """Where the loop is; see the head of loop.py."""

    IDLE = "idle"
    RAMP_IN = "ramp-in"
    RUNNING = "running"
    HOLD = "hold"
    SAFE_STOP = "safe stop"
    FAULT = "fault"


class Exit(IntEnum):
    """The exit code of a process that ran the loop; 1 is a crash and 2 a wrong command line."""

    DONE = 0
    EMERGENCY_STOP = 3
    BLIND = 4  # the observation stayed too old, or did not change
    LATE = 5  # no chunk came, or the policy failed
    BAD_ACTION = 6  # the policy kept asking for NaN or infinity
    WORKSPACE = 7  # the tool left its box
    CONNECTION = 8  # the robot could not be reached


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a controller runs.

    rate_hz: of the policy's actions, that of the training environment. history: how many observations, one a control
    period, the policy reads. servo_hz: of commands, None for the same.
    between: what is commanded between two actions: `linear` for places, `hold` for velocities, `spread` for changes (an
    action's change is spread evenly over the commands of its period); None is linear where a robot at rest is commanded
    `last`. delay_quantile: of the delays of the last 50 decisions, how late the next one is expected; 1 is the longest.
    ramp_s: how long the first actions are blended in. rest: what a robot at rest is commanded, `last` where commands
    are places, `zero` where they are velocities or changes. workspace: low and high corner of the tool's box in metres,
    None for none.

    Raises: ValueError for a rate, ramp or quantile out of range, corners that do not make a box, a servo rate without a
    word on whether commands at rest `zero` are held or spread, or one over which changes cannot be spread evenly.
    """

    rate_hz: float
    history: int = 1
    servo_hz: float | None = None
    between: Literal["linear", "hold", "spread"] | None = None
    delay_quantile: float = 1.0
    ramp_s: float = 1.0
    rest: Literal["last", "zero"] = "last"
    workspace: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)

    def __post_init__(self) -> None:
        if not self.rate_hz > 0 or not self.ramp_s >= 0:
            raise ValueError(f"need rate_hz > 0 and ramp_s >= 0, got {self.rate_hz} and {self.ramp_s}")
        if self.servo_hz is not None and not self.rate_hz <= self.servo_hz < math.inf:
            raise ValueError(f"servo_hz must be at least rate_hz ({self.rate_hz}), got {self.servo_hz}; a policy's "
                             "actions cannot be left out")
        each = self.command_hz / self.rate_hz
        if self.between == "spread" and abs(each - round(each)) > 1e-6:
            raise ValueError("changes are spread over whole numbers of commands: servo_hz must be a multiple of "
                             f"rate_hz ({self.rate_hz}), got {self.servo_hz}")
        if not 0 < self.delay_quantile <= 1:
            raise ValueError(f"delay_quantile must be above 0 and at most 1, got {self.delay_quantile}")
        if self.command_hz != self.rate_hz and self.between is None and self.rest == "zero":
            raise ValueError("commands of which rest is zero are velocities or changes: say between=\"hold\" for "
                             f"velocities or \"spread\" for changes, of which {self.command_hz:g} commands a second "
                             f"would otherwise move the robot {self.command_hz / self.rate_hz:g} times as far")
        if self.workspace is not None and not all(low < high for low, high in zip(*self.workspace, strict=True)):
            raise ValueError(f"the workspace's first corner must be below its second, got {self.workspace}")

    @property
    def command_hz(self) -> float:
        """Commands a second."""
        return self.rate_hz if self.servo_hz is None else self.servo_hz

    @property
    def share(self) -> float:
        """What of an action one command is."""
        return self.rate_hz / self.command_hz if self.between == "spread" else 1.0
