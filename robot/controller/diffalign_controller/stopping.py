"""The soonest stop of a motion with bounded acceleration and jerk, in periods: pure functions of arrays.

Everything is counted in periods of the controller: `speed` is the velocity divided by the period (so that a stop's
accelerations sum to -speed), and `change` the largest change of acceleration from one period to the next.

A stop goes down to full deceleration, stays there and comes back: b_k = max(a - c k, -A, -c max(T - k, 0)) for k >= 1,
with the length T. Each of the three, and so their maximum, changes by at most c a period, and their sum falls as T
grows. The stop whose sum is right is mixed from the two neighbouring lengths of T = |a| / c + n, n = 0, 1, ...

Legend: Da action features, P periods, M lengths.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def soonest_stop(speed: Array, acceleration: Array, most: Array, change: Array, periods: int) -> Array:
    """The accelerations [P, Da] of the coming periods that end at speed 0 and acceleration 0.

    speed, acceleration: [Da] of the last period, |acceleration| <= most. most, change: bounds [Da] of the acceleration
    and of its change a period. periods: P, at least `stop_periods`.
    """
    released = speed + np.sign(acceleration) * _release(np.abs(acceleration), change)
    side = np.where(released < 0, -1.0, 1.0)  # the stop decelerates further than the release, or the mirrored one does
    start, target = side * acceleration, -side * speed
    shortest = np.abs(acceleration) / change
    sums = stop_sum(shortest + np.arange(periods)[:, None], start, most, change)
    n = np.maximum(np.argmax(sums <= target, axis=0) - 1, 0)
    length = shortest + n + np.array([[0.0], [1.0]])  # [2, Da]
    ticks = np.arange(1, periods + 1)[:, None, None]
    pair = np.maximum(np.maximum(start - change * ticks, -most), -change * np.maximum(length - ticks, 0))
    above, below = pair.sum(0)
    apart = above - below
    share = np.divide(above - target, apart, out=np.zeros_like(apart), where=apart > 0)
    stop: Array = side * (pair[:, 0] + np.minimum(np.maximum(share, 0), 1) * (pair[:, 1] - pair[:, 0]))
    return stop


def stop_sum(length: Array, start: Array, most: Array, change: Array) -> Array:
    """The sum of the stop's accelerations [M, Da] for each length T [M, Da] >= |start| / change."""
    down = np.floor(np.minimum((start + most) / change, (start / change + length) / 2))  # periods of going down
    end = np.floor(length)
    back = np.maximum(np.ceil(length - most / change), down + 1)  # the first period of coming back
    count = np.maximum(end - back + 1, 0)
    full = np.maximum(np.minimum(back, end + 1) - 1 - down, 0)
    found: Array = (down * start - change * down * (down + 1) / 2 - full * most
                    - change * count * (length - (back + end) / 2))
    return found


def stop_periods(speed: Array, most: Array, change: Array) -> int:
    """P: no stop from these speeds [Da] or less takes more periods, whatever the acceleration."""
    lengths = 16
    while True:
        length = most / change + np.arange(lengths)[:, None]
        enough = stop_sum(length, most, most, change) <= -1.001 * speed  # from full acceleration, and a margin
        if enough[-1].all():
            return int(np.ceil((most / change + np.argmax(enough, axis=0)).max())) + 2
        lengths *= 2


def _release(acceleration: Array, change: Array) -> Array:
    """The sum over the coming periods of an acceleration >= 0 that is taken back to 0."""
    count = np.floor(acceleration / change)
    found: Array = count * acceleration - change * count * (count + 1) / 2
    return found
