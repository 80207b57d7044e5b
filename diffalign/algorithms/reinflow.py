"""ReinFlow: PPO on the steps of a flow whose injected noise is learned (Zhang et al. 2025, arXiv 2505.22094).

The kernel is noisy_ode and the denoiser carries a noise net (RobotAlign's `noise`): x_next ~ N(x + v dt, std(t, obs)^2)
with std bounded for every number, an exact Gaussian likelihood of every step, and the plain ODE at deployment.
Departures from the authors' code: one clipped ratio a denoising step, as in DPPO, instead of one for the chain (the
same gradient at the start); nothing clamps the density; log-densities are those of the very steps that were sampled
(their sampling and scoring grids differ for K > 1, so that their ratio starts away from 1); the entropy bonus is that
of the steps, in nats a number. Their distance to the old ODE samples (W2) is not offered; use reference_velocity.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import GAE
from diffalign.rl.likelihoods import Transition
from diffalign.rl.surrogates import PPOClip
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class ReinFlow:
    """PPO on denoising steps with learned noise, a value critic and an entropy bonus."""

    type: Literal["reinflow"] = "reinflow"
    advantage: choices.Advantage = GAE()
    surrogate: choices.Surrogate = PPOClip(low=0.01, high=0.01, unit="per_dim")
    entropy: float = 0.03
    reference_kl: float = 0.0
    reference_velocity: float = 0.0
    behavior_cloning: float = 0.0
    value_loss: float = 0.5
    optimization: Optimization = Optimization(epochs=8, minibatches=5)

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=Transition(), advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, entropy=self.entropy, reference_kl=self.reference_kl,
                        reference_velocity=self.reference_velocity, behavior_cloning=self.behavior_cloning,
                        value_loss=self.value_loss)
