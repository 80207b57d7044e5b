"""DPOK: policy gradient with a baseline and a KL to the pre-trained model (Fan et al. 2023, arXiv 2305.16381).

E[-alpha r + beta sum_k KL(p(. | x_k) || p_pre(. | x_k))] with the paper's alpha = 10 and beta = 0.01 is reference_kl =
beta / alpha = 1e-3 for advantages in units of the reward.
Departures: the KL is the exact one of every step, in nats (their code takes the mean squared difference of eps, without
1 / std^2); the baseline is the prompt's running mean, or with the gae advantage a value critic of the condition (theirs
also reads x_k and k); prompt_running divides by the std, so that reference_kl is per std of the reward; rows are those
of the last rollout (their buffer keeps rows of about three).
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import PromptRunning
from diffalign.rl.clamped import ClampedRatio
from diffalign.rl.likelihoods import Transition
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class DPOK:
    """Policy gradient on denoising steps with clamped ratios, held by the exact KL to the reference."""

    type: Literal["dpok"] = "dpok"
    advantage: choices.Advantage = PromptRunning()
    surrogate: choices.Surrogate = ClampedRatio(limit=1e-4, unit="per_dim")
    reference_kl: float = 1e-3
    value_loss: float = 0.5
    optimization: Optimization = Optimization()

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=Transition(), advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_kl=self.reference_kl, value_loss=self.value_loss)
