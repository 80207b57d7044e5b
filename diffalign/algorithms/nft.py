"""DiffusionNFT (arXiv 2509.16117): contrastive matching on clean samples of a slowly following old policy.

No likelihood ratio and no SDE: any sampler may make the rollouts, the ODE included. With AWM it is one family: an
advantage-weighted matching gradient plus a proximal term, linear in A here, a ratio there.
Departures: the old policy is the exponential average of the weights per optimizer step (the authors update it once an
epoch at a growing rate).
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.likelihoods import Matching
from diffalign.rl.surrogates import ContrastiveMatching
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class DiffusionNFT:
    """Contrastive matching; behavior `averaged` is the published old policy, `live` its on-policy limit."""

    type: Literal["nft"] = "nft"
    advantage: choices.Advantage = GroupNormalized(scale="batch")
    surrogate: ContrastiveMatching = ContrastiveMatching()
    matching: Matching = Matching()
    reference_velocity: float = 0.0
    value_loss: float = 0.5
    behavior: Literal["live", "averaged"] = "averaged"
    optimization: Optimization = Optimization(ema_decay=0.9)

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=self.matching, advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_velocity=self.reference_velocity,
                        value_loss=self.value_loss, behavior=self.behavior)
