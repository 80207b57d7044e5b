"""AWM: Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050).

The pre-training loss on the policy's own clean samples is the (negative) log-likelihood, so any sampler may be used
for rollouts, the ODE included. On-policy the gradient is A grad of minus the loss; negative advantages make it
concave, so a proximal term to the averaged weights (ema_velocity, the authors' ema_beta = 1) holds it.
Departures: advantages are not divided by 5 (a learning-rate factor). The surrogate is
summed over the event (nats) while the velocity penalties are means over it: the authors' ema_beta = 1 is
ema_velocity = D here, and DiffusionNFT's proximal strength (beta = 1) about 25 D.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.likelihoods import Matching
from diffalign.rl.surrogates import PPOClip
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class AWM:
    """Advantage-weighted denoising loss on the policy's own samples."""

    type: Literal["awm"] = "awm"
    advantage: choices.Advantage = GroupNormalized(scale="batch")
    surrogate: choices.Surrogate = PPOClip(low=0.5, high=1.0, unit="per_dim")
    matching: Matching = Matching()
    reference_velocity: float = 0.0
    ema_velocity: float = 0.0
    value_loss: float = 0.5
    optimization: Optimization = Optimization()

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=self.matching, advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_velocity=self.reference_velocity,
                        ema_velocity=self.ema_velocity, value_loss=self.value_loss)
