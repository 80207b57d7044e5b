"""Online reward-weighted matching: ORW-CFM (Fan et al. 2025, arXiv 2502.06061), RAFT (2304.06767) and AWR (1910.00177).

The pre-training loss on the policy's own samples, weighted by exp(A / temperature), or on the best of each group alone.
No likelihood ratio, any sampler. reference_velocity is ORW's Wasserstein-2 term to the frozen reference.
Departures: the weight takes the advantage within a group, not the raw reward, so that hard prompts count as much.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import BestOfGroup
from diffalign.rl.likelihoods import Matching
from diffalign.rl.surrogates import WeightedRegression
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class ORW:
    """Reward-weighted denoising loss on the policy's own samples."""

    type: Literal["orw"] = "orw"
    advantage: choices.Advantage = BestOfGroup()
    surrogate: WeightedRegression = WeightedRegression()
    matching: Matching = Matching()
    reference_velocity: float = 0.0
    value_loss: float = 0.5
    optimization: Optimization = Optimization(ema_decay=0.95)

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=self.matching, advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_velocity=self.reference_velocity,
                        value_loss=self.value_loss)
