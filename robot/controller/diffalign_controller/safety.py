"""The safety filter: no command leaves it that is outside a limit, or from which no stop within the limits exists.

Clamping velocity, acceleration and jerk one after the other is not enough: a joint that runs towards its position limit
can be so fast that no acceleration within the limit stops it in time. Here the filter always holds a plan, the
accelerations of the coming periods that bring the robot to rest within every limit. A wish gives another plan: its
acceleration now, and the soonest stop after it, within the limits of acceleration and jerk but perhaps not of position
and velocity. All limits are linear in the accelerations, so that the plans that keep them are a convex set: between the
held plan and the wished one the share that still keeps position and velocity is a minimum of quotients, exact, without
a search. The mixture becomes the held plan, and its first period is the command.

Legend: Da action features, P periods of a plan, M lengths of a stop, dt one control period in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.stopping import soonest_stop, stop_periods

Array = NDArray[np.float64]
_SLACK = 1e-12  # of a limit, for rounding


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


class SafetyFilter:
    """Holds the last command, its motion and the plan of a stop [P, Da]; `filter` and `stop` say the next command."""

    def __init__(self, limits: Limits, dt_s: float) -> None:
        if not dt_s > 0:
            raise ValueError(f"the control period must be positive, got {dt_s} s")
        self.limits, self.dt = limits, dt_s
        self.low, self.high = np.array(limits.low), np.array(limits.high)
        self.velocity, self.acceleration, self.jerk = _bounds(limits, dt_s)
        self._periods = 1 + stop_periods(self.velocity / dt_s, self.acceleration, self.jerk * dt_s)
        self._position: Array | None = None
        self._velocity = self._acceleration = np.zeros(0)
        self._plan = np.zeros((self._periods, len(self.low)))
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
        self._position = self._wish = start
        self._velocity = self._acceleration = self._speed = np.zeros_like(start)
        self._plan = np.zeros_like(self._plan)

    @property
    def position(self) -> Array:
        """The last command [Da]. Raises: ValueError before `reset`."""
        if self._position is None:
            raise ValueError("the filter does not know where the robot is; call reset(position) first")
        return self._position

    @property
    def at_rest(self) -> bool:
        """Whether the last command was the end of a motion."""
        return self._position is not None and not (self._velocity.any() or self._acceleration.any())

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
        following = self._following(self.position, np.minimum(np.maximum(wished, self.low), self.high))
        change = self.dt * self.jerk
        first = np.maximum(following, np.maximum(-self.acceleration, self._acceleration - change))
        first = np.minimum(first, np.minimum(self.acceleration, self._acceleration + change))
        plan = np.concatenate([first[None], self._soonest(self._velocity + self.dt * first, first)])
        return self._go(plan)

    def stop(self) -> Array:
        """The next command [Da] of the stop; it stays where it ends."""
        plan = self._soonest(self._velocity, self._acceleration)
        command = self._go(np.concatenate([plan, np.zeros_like(plan[:1])]))
        self._wish, self._speed = command, self._velocity
        return command

    def _soonest(self, velocity: Array, acceleration: Array) -> Array:
        """The accelerations [P - 1, Da] of the soonest stop."""
        return soonest_stop(velocity / self.dt, acceleration, self.acceleration, self.jerk * self.dt, self._periods - 1)

    def _go(self, wished: Array) -> Array:
        """Hold the mixture of the held and a wished plan [P, Da] that is nearest to the wished, and begin it."""
        plan = self._plan + self._share(wished) * (wished - self._plan)
        velocity, acceleration = self._velocity + self.dt * plan[0], plan[0]
        still = np.abs(velocity) < 1e-12 * self.velocity  # rounding is no motion
        velocity = np.where(still, 0.0, velocity)
        acceleration = np.where(still & (np.abs(acceleration) < 1e-12 * self.acceleration), 0.0, acceleration)
        position: Array = np.minimum(np.maximum(self.position + self.dt * velocity, self.low), self.high)
        self._position, self._velocity, self._acceleration = position, velocity, acceleration
        self._plan = np.concatenate([plan[1:], np.zeros_like(plan[:1])])
        return position

    def _share(self, wished: Array) -> Array:
        """The largest share [Da] of the wished plan [P, Da] at which the mixture keeps position and velocity."""
        velocity, position = self._motion(wished)
        speed, room = self.velocity * (1 + _SLACK), _SLACK * (self.high - self.low)
        low, high = self.low - room, self.high + room
        if (np.abs(velocity) <= speed).all() and (position >= low).all() and (position <= high).all():
            return np.ones(len(low))
        held_velocity, held_position = self._motion(self._plan)
        return np.minimum(_share(held_velocity, velocity, -speed, speed), _share(held_position, position, low, high))

    def _motion(self, plan: Array) -> tuple[Array, Array]:
        """Velocity and position [P, Da] after each period of a plan."""
        velocity = self._velocity + self.dt * plan.cumsum(0)
        return velocity, self.position + self.dt * velocity.cumsum(0)

    def _following(self, position: Array, wish: Array) -> Array:
        """The acceleration that follows the wish: its own motion, plus what closes the gap with braking in time."""
        gap, before = self._wish - position, self._speed
        closing = fastest_speed(np.abs(gap), self.acceleration / 2, self.dt)  # at most gap / dt
        closing = np.minimum(closing, 0.5 * np.cbrt(gap**2 * self.jerk))  # of x''' = jerk: x' ~ (x^2 jerk)^(1/3)
        speed = np.clip((wish - self._wish) / self.dt + np.sign(gap) * closing, -self.velocity, self.velocity)
        self._wish, self._speed = wish, speed
        missing = before - self._velocity
        catching_up: Array = np.sign(missing) * fastest_speed(np.abs(missing), self.jerk, self.dt)
        return (speed - before) / self.dt + catching_up


def fastest_speed(distance: Array, deceleration: Array, dt: float) -> Array:
    """The largest speed at which one more period and then full deceleration cover at most `distance`.

    m full periods of deceleration follow: distance = dt ((m + 1) speed - deceleration dt m (m + 1) / 2).
    """
    change = deceleration * dt
    m = np.floor((np.sqrt(1 + 8 * distance / (change * dt)) - 1) / 2)
    speed: Array = (distance / dt + change * m * (m + 1) / 2) / (m + 1)
    return speed


def _share(held: Array, wished: Array, low: Array, high: Array) -> Array:
    """The largest share of `wished` in each column of the mixture with `held`, both [P, Da], that is inside."""
    broken = np.minimum(np.maximum(wished, low), high)  # the bound, where one is broken
    apart = wished - held
    outside = (broken != wished) & (apart != 0)
    share = np.divide(broken - held, apart, out=np.ones_like(apart), where=outside)
    least: Array = np.maximum(share.min(0), 0.0)
    return least


def _bounds(limits: Limits, dt: float) -> tuple[Array, Array, Array]:
    """Velocity, acceleration and jerk [Da]; a missing bound is what the others leave possible.

    A stop from speed v covers v^2 / (2 acceleration) or more, at most the whole range. Taking an acceleration a back to
    0 changes the velocity by a^2 / (2 jerk) - a dt / 2 or more, at most from -velocity to velocity.
    """
    room = np.array(limits.high) - np.array(limits.low)
    velocity = _smaller(limits.velocity, room / dt)
    if limits.step is not None:
        velocity = np.minimum(velocity, np.array(limits.step) / dt)
    acceleration = _smaller(limits.acceleration, 2 * velocity / dt)
    jerk = _smaller(limits.jerk, 2 * acceleration / dt)
    for _ in range(10):  # each makes the other smaller
        acceleration = np.minimum(acceleration, jerk * dt / 2 + np.sqrt((jerk * dt / 2)**2 + 4 * jerk * velocity))
        velocity = np.minimum(velocity, np.sqrt(2 * acceleration * room))
    return velocity, acceleration, jerk


def _smaller(bound: tuple[float, ...] | None, other: Array) -> Array:
    return other if bound is None else np.minimum(np.array(bound), other)
