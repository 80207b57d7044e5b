"""The safety filter: no command leaves it that is outside a limit, or from which no stop within the limits exists.

Clamping velocity, acceleration and jerk one after the other is not enough: a joint that runs towards its position limit
can be so fast that no acceleration within the limit stops it in time. Here a command passes only if a stop from there,
simulated tick by tick, stays within every limit; otherwise the passable command nearest to it on the line to the stop
is sent. The stop itself always passes, because it is the continuation of the one that was found a tick ago.

Legend: Da action features, L candidates on the line, dt one control period in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_CANDIDATES = 17  # resolution of the line between the stop and the wish
_SLACK = 1e-9  # of a limit, for rounding


@dataclass(frozen=True)
class Limits:
    """Bounds of a command [Da] in robot units and of its differences per second; None for no bound.

    low, high: of the command itself, finite; a box of the workspace where commands are Cartesian. velocity,
    acceleration, jerk: of its first, second and third difference. step: of the change in one control period.

    Raises: ValueError for a bound that is not positive and finite, or of another length.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    velocity: tuple[float, ...] | None = None
    acceleration: tuple[float, ...] | None = None
    jerk: tuple[float, ...] | None = None
    step: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        size = len(self.low)
        if len(self.high) != size or not all(np.isfinite([*self.low, *self.high])):
            raise ValueError(f"low and high must be finite and of one length, got {self.low} and {self.high}; give the "
                             "robot's own limits where the package has none")
        if not all(low < high for low, high in zip(self.low, self.high)):
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        for name in ("velocity", "acceleration", "jerk", "step"):
            bound = getattr(self, name)
            if bound is not None and (len(bound) != size or not all(0 < b < np.inf for b in bound)):
                raise ValueError(f"{name} must hold {size} positive finite numbers or be None, got {bound}")


@dataclass(frozen=True)
class _Motion:
    """A command and its first and second difference per second, each [..., Da]."""

    position: Array
    velocity: Array
    acceleration: Array


class SafetyFilter:
    """Holds the last command and its motion; `filter` and `stop` say the next one."""

    def __init__(self, limits: Limits, dt_s: float) -> None:
        if not dt_s > 0:
            raise ValueError(f"the control period must be positive, got {dt_s} s")
        self.limits, self.dt = limits, dt_s
        self.low, self.high = np.array(limits.low), np.array(limits.high)
        # A bound beyond what the others allow in one period changes nothing, so a missing one is that.
        speed = (self.high - self.low) / dt_s
        for bound in (limits.velocity, None if limits.step is None else tuple(s / dt_s for s in limits.step)):
            speed = speed if bound is None else np.minimum(speed, bound)
        self.velocity = speed
        self.acceleration = _smaller(limits.acceleration, 2 * self.velocity / dt_s)
        self.jerk = _smaller(limits.jerk, 2 * self.acceleration / dt_s)
        self._motion: _Motion | None = None
        self._wish = self._speed = np.zeros(0)  # the last wish, and the velocity that follows it

    def reset(self, position: NDArray[np.floating]) -> None:
        """Start at rest at a command [Da]. Raises: ValueError if it is outside the limits."""
        start = np.asarray(position, np.float64)
        outside = ~((start >= self.low) & (start <= self.high))
        if outside.any():
            number = int(np.argmax(outside))
            raise ValueError(f"feature {number} starts at {start[number]:.6g}, outside its limits "
                             f"{self.low[number]:.6g} to {self.high[number]:.6g}; move the robot inside them, or mend "
                             "the limits")
        self._motion = _Motion(start, np.zeros_like(start), np.zeros_like(start))
        self._wish, self._speed = start, np.zeros_like(start)

    @property
    def position(self) -> Array:
        """The last command [Da]. Raises: ValueError before `reset`."""
        return self._last().position

    @property
    def at_rest(self) -> bool:
        """Whether the last command was the end of a motion."""
        last = self._last()
        return bool((last.velocity == 0).all() and (last.acceleration == 0).all())

    def filter(self, wish: NDArray[np.floating]) -> Array:
        """The command [Da] that follows `wish` within every limit and from which a stop within them exists.

        Wishes that move within the limits come back as they are; after a jump the command catches up, braking in time
        for a wish that stands still.

        Raises: ValueError if the wish holds NaN or infinity; the filter is as before then.
        """
        wished = np.asarray(wish, np.float64)
        if wished.shape != self.low.shape:
            raise ValueError(f"a command has {len(self.low)} features, got shape {wished.shape}")
        if not np.isfinite(wished).all():
            raise ValueError(f"feature {int(np.argmin(np.isfinite(wished)))} of the action is not finite")
        last = self._last()
        stopping = self._braking(last)
        acceleration = np.clip(self._following(last, np.clip(wished, self.low, self.high)), *self._accelerations(last))
        line = stopping + np.linspace(0, 1, _CANDIDATES)[:, None] * (acceleration - stopping)  # [L, Da]
        passes = self._stops_within(self._moved(last, line))
        passes[0] = True
        best = _CANDIDATES - 1 - np.argmax(passes[::-1], axis=0)  # the furthest that passes, feature by feature
        return self._go(last, np.take_along_axis(line, best[None], 0)[0])

    def stop(self) -> Array:
        """The next command [Da] of the stop; it stays where it ends."""
        last = self._last()
        command = self._go(last, self._braking(last))
        self._wish, self._speed = command, self._last().velocity
        return command

    def _last(self) -> _Motion:
        if self._motion is None:
            raise ValueError("the filter does not know where the robot is; call reset(position) first")
        return self._motion

    def _go(self, last: _Motion, acceleration: Array) -> Array:
        moved = self._moved(last, acceleration)
        self._motion = _Motion(np.clip(moved.position, self.low, self.high), moved.velocity, moved.acceleration)
        return self._motion.position

    def _moved(self, last: _Motion, acceleration: Array) -> _Motion:
        velocity = last.velocity + self.dt * acceleration
        tiny = 1e-12 * self.velocity
        velocity = np.where(np.abs(velocity) < tiny, 0.0, velocity)
        acceleration = np.where((velocity == 0) & (np.abs(acceleration) < 1e-12 * self.acceleration), 0.0, acceleration)
        return _Motion(last.position + self.dt * velocity, velocity, acceleration)

    def _accelerations(self, last: _Motion) -> tuple[Array, Array]:
        """The interval that acceleration and jerk allow."""
        change = self.dt * self.jerk
        return (np.maximum(-self.acceleration, last.acceleration - change),
                np.minimum(self.acceleration, last.acceleration + change))

    def _braking(self, last: _Motion) -> Array:
        """The acceleration that takes the velocity to 0 soonest without overshoot."""
        wish = -np.sign(last.velocity) * fastest_speed(np.abs(last.velocity), self.jerk, self.dt)
        return np.clip(wish, *self._accelerations(last))

    def _following(self, last: _Motion, wish: Array) -> Array:
        """The acceleration that follows the wish: its own motion, plus what closes the gap with braking in time."""
        gap, before = self._wish - last.position, self._speed
        closing = fastest_speed(np.abs(gap), self.acceleration / 2, self.dt)  # at most gap / dt
        closing = np.minimum(closing, 0.5 * np.cbrt(gap**2 * self.jerk))  # of x''' = jerk: x' ~ (x^2 jerk)^(1/3)
        speed = np.clip((wish - self._wish) / self.dt + np.sign(gap) * closing, -self.velocity, self.velocity)
        self._wish, self._speed = wish, speed
        missing = before - last.velocity
        catching_up: Array = np.sign(missing) * fastest_speed(np.abs(missing), self.jerk, self.dt)
        return (speed - before) / self.dt + catching_up

    def _stops_within(self, motion: _Motion) -> NDArray[np.bool_]:
        """Whether the stop from each motion [L, Da] stays within position and velocity limits."""
        room, speed = _SLACK * (self.high - self.low), self.velocity * (1 + _SLACK)
        passes = np.ones(motion.position.shape, bool)
        for _ in range(self._longest()):
            passes &= (motion.position >= self.low - room) & (motion.position <= self.high + room)
            passes &= np.abs(motion.velocity) <= speed
            if not (motion.velocity.any() or motion.acceleration.any()):
                break
            motion = self._moved(motion, self._braking(motion))
        else:  # still moving
            passes &= motion.velocity == 0
        return passes

    def _longest(self) -> int:
        """More ticks than any stop takes."""
        ticks = self.velocity / (self.acceleration * self.dt) + 4 * self.acceleration / (self.jerk * self.dt)
        return 20 + 2 * int(np.ceil(ticks.max()))


def fastest_speed(distance: Array, deceleration: Array, dt: float) -> Array:
    """The largest speed at which one more period and then full deceleration cover at most `distance`.

    m full periods of deceleration follow: distance = dt ((m + 1) speed - deceleration dt m (m + 1) / 2).
    """
    change = deceleration * dt
    m = np.floor((np.sqrt(1 + 8 * distance / (change * dt)) - 1) / 2)
    speed: Array = (distance / dt + change * m * (m + 1) / 2) / (m + 1)
    return speed


def _smaller(bound: tuple[float, ...] | None, other: Array) -> Array:
    return other if bound is None else np.minimum(np.array(bound), other)
