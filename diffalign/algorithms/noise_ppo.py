"""PPO on the initial noise: the policy-gradient member of DSRL's family (arXiv 2506.15799, sec. 4).

A small Gaussian policy chooses where the frozen model's chain starts; any sampler may follow, the ODE included.
Its divergence from the base is that of the noise, exact and closed-form: reference_kl is in nats an action.
Departures: the authors train SAC (see dsrl) and name any RL method as possible; a Gaussian needs no box on the noise.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.starts import Start
from diffalign.rl.surrogates import PPOClip
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class NoisePPO:
    """PPO on where the chain starts, with any advantage."""

    type: Literal["noise_ppo"] = "noise_ppo"
    advantage: choices.Advantage = GroupNormalized(scale="batch")
    surrogate: choices.Surrogate = PPOClip(low=0.2, high=0.2, unit="nats")
    reference_kl: float = 0.0
    value_loss: float = 0.5
    optimization: Optimization = Optimization()

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=Start(), advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_kl=self.reference_kl, value_loss=self.value_loss)
