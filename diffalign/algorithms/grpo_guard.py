"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO with a centred ratio and equal gradient scale at every denoising step.

Works with every kernel that has a density (the authors' code: Flow-SDE on SD3 only).
Departures: see GuardClip; the reference KL is in nats.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.likelihoods import Transition
from diffalign.rl.surrogates import GuardClip
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class GRPOGuard:
    """PPO on denoising steps with GuardClip, advantages against the group of the same prompt."""

    type: Literal["grpo_guard"] = "grpo_guard"
    advantage: choices.Advantage = GroupNormalized(scale="batch")
    surrogate: GuardClip = GuardClip()
    reference_kl: float = 0.0
    optimization: Optimization = Optimization()

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=Transition(), advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_kl=self.reference_kl)
