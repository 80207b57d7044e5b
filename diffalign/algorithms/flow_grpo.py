"""Flow-GRPO: group-relative policy gradient on the steps of a flow SDE (Liu et al. 2025, arXiv 2505.05470).

The sampler is FlowSDE, DanceSDE (DanceGRPO) or CPS; a trained window with `ode_elsewhere` is Flow-GRPO-Fast / MixGRPO.
Loss: clipped ratio on every trained step plus reference_kl times the exact KL of the step to the frozen model.
Departures: the KL is in nats, summed, and its variance includes |dt| (the authors' code drops it, which makes their
beta another number); the last step is noiseless.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.likelihoods import Transition
from diffalign.rl.surrogates import PPOClip
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class FlowGRPO:
    """PPO on denoising steps, advantages against the group of the same prompt."""

    type: Literal["flow_grpo"] = "flow_grpo"
    advantage: choices.Advantage = GroupNormalized(scale="batch")
    surrogate: choices.Surrogate = PPOClip(low=1e-4, high=1e-4, unit="per_dim")
    reference_kl: float = 0.0
    reference_velocity: float = 0.0
    optimization: Optimization = Optimization()

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=Transition(), advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_kl=self.reference_kl,
                        reference_velocity=self.reference_velocity)
