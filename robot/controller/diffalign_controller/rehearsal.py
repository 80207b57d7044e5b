"""The real loop with an exported policy and a robot that is only numbers: how well a machine keeps the rates.

Legend: Do observation features, Da action features.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.inference import InLine, Threaded
from diffalign_controller.log import Log
from diffalign_controller.loop import Controller
from diffalign_controller.policy import Policy
from diffalign_controller.robot import Clock, MonotonicClock, Observation
from diffalign_controller.safety import Limits, SafetyFilter
from diffalign_controller.schemes import SchemeName, scheme_of
from diffalign_controller.settings import Settings

Array = NDArray[np.floating]
_RANGE = 10.0  # of a command that the package does not bound


class NumbersRobot:
    """Observes normal draws around `shift` [Do] with spread `scale` [Do], and is where it was commanded [Da]."""

    def __init__(self, shift: Array, scale: Array, action_dim: int, clock: Clock) -> None:
        self._shift, self._scale, self._clock = shift, scale, clock
        self._random = np.random.default_rng(0)
        self._position: Array = np.zeros(action_dim)

    def observe(self) -> Observation:
        """Another draw each time."""
        values = self._shift + self._scale * self._random.standard_normal(self._shift.shape)
        return Observation(values, self._clock.now_s(), self._position)

    def command(self, action: Array) -> None:
        """Be there."""
        self._position = action

    def emergency_stop_pressed(self) -> bool:
        """Never."""
        return False


def rehearse(folder: Path, *, rate_hz: float | None = None, servo_hz: float | None = None, seconds: float = 60.0,
             scheme: SchemeName = "receding", in_line: bool = False, status: Callable[[str], None] | None = None
             ) -> dict[str, Any]:
    """Run the package in `folder` in real time; what was measured, durations in milliseconds.

    rate_hz: of the policy's actions, None for that of its manifest. servo_hz: of commands, None for the same. in_line:
    decide in the loop instead of in a thread. The safety filter has limits of velocity, acceleration and jerk, and the
    log is written, as on a robot.

    Raises: ValueError if the folder holds no package, no rate is known, the action range does not hold 0, or the scheme
    does not fit the package.
    """
    policy, clock = Policy(folder), MonotonicClock()
    rate = policy.manifest["control_rate_hz"] if rate_hz is None else rate_hz
    if rate is None:
        raise ValueError(f"{folder / 'manifest.json'} names no control rate; say it with --rate-hz")
    settings = Settings(rate_hz=rate, history=policy.history, servo_hz=servo_hz, rest="zero", between="spread")
    normalizer = policy.manifest["normalizers"]["observation"]
    shift, scale = (np.array(normalizer[part][:policy.obs_dim // policy.history]) for part in ("shift", "scale"))
    robot = NumbersRobot(shift, scale, policy.action_dim, clock)
    safety = SafetyFilter(_limits(policy), 1 / settings.command_hz)
    inference = InLine(policy.decide) if in_line else Threaded(policy.decide)
    with tempfile.TemporaryDirectory(prefix="diffalign_rehearsal_") as scratch:
        log = Log(Path(scratch))
        loop = Controller(robot, inference, scheme_of(scheme, policy), safety, log, clock, settings, status)
        code = loop.run(seconds)
        log.close()
    if isinstance(inference, Threaded):
        inference.close()
    timing = loop.timing
    return {"rate_hz": settings.rate_hz, "command_hz": settings.command_hz, "seconds": seconds, "scheme": scheme,
            "in_line": in_line, "exit": int(code), "state": loop.state.value, "ticks": timing.ticks,
            "missed": timing.missed, "left_out": max(0, math.floor(seconds * settings.command_hz) - timing.ticks),
            "decisions": len(timing.decisions_s), "holds": loop.holds, "milliseconds": timing.milliseconds()}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The runs of `rehearse` as lines of text."""
    head = f"{'commands':>9}  {'what':<9} {'p50':>8} {'p99':>8} {'max':>8}"
    lines = [head]
    for run in runs:
        for name, found in run["milliseconds"].items():
            lines.append(f"{run['command_hz']:6g} Hz  {name:<9} "
                         + " ".join(f"{found[key]:8.3f}" for key in ("p50", "p99", "max")) + " ms")
        lines.append(f"{run['command_hz']:6g} Hz  {run['missed']} of {run['ticks']} commands later than a period, "
                     f"{run['left_out']} left out; {run['decisions']} decisions, {run['holds']} holds, "
                     f"exit {run['exit']}")
    return "\n".join(lines)


def _limits(policy: Policy) -> Limits:
    low = np.where(np.isfinite(policy.low), policy.low, -_RANGE).astype(float)
    high = np.where(np.isfinite(policy.high), policy.high, _RANGE).astype(float)
    room = high - low
    return Limits(tuple(low), tuple(high), tuple(2 * room), tuple(20 * room), tuple(1000 * room))
