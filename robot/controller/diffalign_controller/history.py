"""The last observations one control period apart, as one: what a policy with an observation history reads.

Legend: n observations, Do observation features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


class History:
    """Remembers what is needed of the past for n observations, each with its time in control periods.

    Policies were trained on observations one control step apart, the first of an episode repeated where there are
    fewer (diffalign_robot.history). A robot observes when it likes, perhaps more often, and messages get lost: for each
    of the n moments the observation that is nearest in time is taken.
    """

    def __init__(self, count: int) -> None:
        """Raises: ValueError for fewer than one observation."""
        if count < 1:
            raise ValueError(f"a history must hold at least 1 observation, got {count}")
        self.count = count
        self._seen: list[tuple[float, Array]] = []

    def add(self, time: float, values: Array) -> None:
        """Remember an observation [Do]; one that is not newer than the last replaces it."""
        while self._seen and self._seen[-1][0] >= time:
            self._seen.pop()
        oldest = time - self.count
        self._seen = [*(entry for entry in self._seen if entry[0] >= oldest), (time, values)]

    def stacked(self) -> NDArray[np.float32]:
        """The newest observation after the n - 1 before it, oldest first, [n Do].

        Raises: ValueError before the first observation.
        """
        if not self._seen:
            raise ValueError("nothing was observed yet; add an observation first")
        now = self._seen[-1][0]
        moments = [now - age for age in reversed(range(self.count))]
        nearest = [min(self._seen, key=lambda entry: abs(entry[0] - moment))[1] for moment in moments]
        return np.concatenate(nearest, dtype=np.float32)

    def clear(self) -> None:
        """Forget everything, as at the start of an episode."""
        self._seen = []
