"""DDPO: PPO on the denoising MDP with per-prompt running advantages (Black et al. 2023, arXiv 2305.13301).

Each reverse step is an action of a Gaussian policy (sec. 4.1); the reward of the finished sample is the return of every
step. DDPO-IS is eq. 4 with PPO's clip; DDPO-SF is its case epochs = minibatches = 1.
Departures: the trust region's gradient is that of the joint ratio (unit per_dim reproduces the published clip); an
exact KL to the pre-trained model is available.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import PromptRunning
from diffalign.rl.likelihoods import Transition
from diffalign.rl.surrogates import PPOClip
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class DDPO:
    """PPO on denoising steps, advantages against running statistics of each prompt."""

    type: Literal["ddpo"] = "ddpo"
    advantage: choices.Advantage = PromptRunning()
    surrogate: choices.Surrogate = PPOClip(low=1e-4, high=1e-4, unit="per_dim")
    reference_kl: float = 0.0
    reference_velocity: float = 0.0
    optimization: Optimization = Optimization()

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=Transition(), advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_kl=self.reference_kl,
                        reference_velocity=self.reference_velocity)
