"""EXPO: expressive policies improved by edits and the critic's choice (Dong et al. 2025, arXiv 2507.07986).

pi(s) = argmax Q over n base samples and one edit of each, in acting and in the backup (on the fly); the edit actor is a
SAC policy in a small box around each sample. Base samples are cached with the states, which is exact for a frozen base.
Departures: the base is frozen (the authors go on cloning it on the replay); edits are trained on base samples of the
replayed states instead of replayed actions.
"""

from __future__ import annotations

from typing import Literal

from diffalign.policy.operators import OnActions
from diffalign.spec import spec
from diffalign.train.off_policy_pieces import Learning, OffPolicy


@spec
class EXPO:
    """Edits of base samples, the best taken on the fly."""

    type: Literal["expo"] = "expo"
    samples: int = 4
    scale: float = 0.2
    learning: Learning = Learning()

    def compose(self) -> OffPolicy:
        """The pieces of the loop."""
        return OffPolicy(operator=OnActions(samples=self.samples, scale=self.scale, keep_base=True),
                         learning=self.learning)
