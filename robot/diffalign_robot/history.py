"""Several observations, one a control step, as one: what a policy with an observation history sees.

Legend: n observations, Do observation features. No torch here: worker processes import this module.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from diffalign_robot.cameras import Picture
from diffalign_robot.envs import PIXELS, Array, Episode, Step


def stacked(recent: Sequence[Array], count: int) -> Array:
    """The last `count` observations [count * Do], oldest first; where there are fewer, the first one is repeated."""
    missing = max(count - len(recent), 0)
    return np.concatenate([recent[0]] * missing + list(recent)[-count:])


class HistoryEpisode:
    """An episode whose observation is its last n ones [n * Do], oldest first; a reset forgets them all.

    They are one control step apart also inside a chunk, so that the simulator is observed at every step.
    """

    def __init__(self, inner: Episode, count: int) -> None:
        """Raises: ValueError for fewer than one observation."""
        if count < 1:
            raise ValueError(f"history must be at least 1, got {count}")
        self._inner, self._count = inner, count
        self._recent: deque[Array] = deque(maxlen=count)
        self.obs_dim, self.action_dim = count * inner.obs_dim, inner.action_dim
        self.action_low, self.action_high = inner.action_low, inner.action_high
        self.control_rate_hz = inner.control_rate_hz

    def reset(self, seed: int) -> None:
        """Start an episode from the seed."""
        self._inner.reset(seed)
        self._recent.clear()
        self._recent.append(self._inner.observe())

    def advance(self, action: Array) -> Step:
        """One control step."""
        step = self._inner.advance(action)
        self._recent.append(self._inner.observe())
        return step

    def observe(self) -> Array:
        """The last n observations."""
        return stacked(self._recent, self._count)

    def frame(self, camera: str | None = None, size: int = PIXELS) -> Picture:
        """A picture of the simulator."""
        return self._inner.frame(camera, size)

    def close(self) -> None:
        """Close the simulator."""
        self._inner.close()
