"""DPPO: Diffusion Policy Policy Optimization (Ren et al. 2024, arXiv 2409.00588).

A two-layer MDP: environment decisions h outside, denoising steps k inside. PPO on every trained step with the
decision's GAE advantage times gamma_denoise^(steps left) (eq. 5); std floors on the kernel (`min_std`) explore; the
last K' steps are chosen by the sampler's `trained`.
Departures from the authors' code: time-outs bootstrap from the final observation and GAE stops at every episode end;
no clamp inside the density (their log-probs are clamped to [-5, 2], their noise to 3 std); advantages are whitened over
the batch, not the minibatch; the critic sees each decision once per epoch instead of once per denoising step.
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
class DPPO:
    """PPO on environment decisions and their denoising steps, with a value critic."""

    type: Literal["dppo"] = "dppo"
    advantage: choices.Advantage = GAE()
    surrogate: choices.Surrogate = PPOClip(low=0.01, high=0.01, unit="per_dim")
    denoising_discount: float = 0.99
    reference_kl: float = 0.0
    behavior_cloning: float = 0.0
    value_loss: float = 0.5
    optimization: Optimization = Optimization(epochs=8, minibatches=5)

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=Transition(denoising_discount=self.denoising_discount), advantage=self.advantage,
                        surrogate=self.surrogate, optimization=self.optimization, reference_kl=self.reference_kl,
                        behavior_cloning=self.behavior_cloning, value_loss=self.value_loss)
