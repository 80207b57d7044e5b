"""FPO: Flow Matching Policy Gradients (McAllister et al. 2025, arXiv 2507.21053).

PPO with r = exp(mean over draws of (old loss - new loss)) of the pre-training loss at shared noise and times: no
likelihood of any chain, any sampler, the ODE included. FPO++ (`fpo_plus`) takes the ratio of every draw instead.
Departures from the authors' code: the loss is that of the network's own prediction kind (theirs regresses eps from a
velocity), its output is not scaled, and nothing is clamped before exp: dual bounds the loss of negative advantages.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import GAE
from diffalign.rl.likelihoods import Matching
from diffalign.rl.pooled import PooledMatching
from diffalign.rl.surrogates import PPOClip
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class FPO:
    """PPO on the mean denoising loss of every decision, with a value critic."""

    type: Literal["fpo"] = "fpo"
    advantage: choices.Advantage = GAE()
    surrogate: choices.Surrogate = PPOClip(low=0.05, high=0.05, unit="per_dim", dual=3.0)
    matching: Matching = Matching(draws=8)
    behavior_cloning: float = 0.0
    value_loss: float = 0.5
    optimization: Optimization = Optimization(epochs=8, minibatches=5)

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=PooledMatching(matching=self.matching), advantage=self.advantage,
                        surrogate=self.surrogate, optimization=self.optimization,
                        behavior_cloning=self.behavior_cloning, value_loss=self.value_loss)
