"""FPO++ (arXiv 2602.02481): FPO with a ratio for every noise-time draw and an asymmetric trust region.

r = exp(old loss - new loss) of each draw, all of a decision's draws with its advantage. The surrogate is ASPO:
PPO's clip where A >= 0, SPO's quadratic pull where A < 0, which keeps a gradient on samples that became too unlikely.
The authors fine-tune manipulation policies with PPO's clip alone (`surrogate: {type: ppo_clip}`).
Departures: the event is summed, so that limits are in nats of the matching loss (published for manipulation; unit
`per_dim` is the mean); losses themselves are not clamped, the log-ratio is.
"""

from __future__ import annotations

from typing import Literal

from diffalign import choices
from diffalign.rl.advantages import GAE
from diffalign.rl.asymmetric import AsymmetricPO
from diffalign.rl.likelihoods import Matching
from diffalign.spec import spec
from diffalign.train.pieces import OnPolicy, Optimization


@spec
class FPOPlus:
    """Asymmetric policy optimization on the denoising loss of every draw, with a value critic."""

    type: Literal["fpo_plus"] = "fpo_plus"
    advantage: choices.Advantage = GAE()
    surrogate: choices.Surrogate = AsymmetricPO()
    matching: Matching = Matching(draws=8)
    reference_velocity: float = 0.0
    ema_velocity: float = 0.0
    behavior_cloning: float = 0.0
    value_loss: float = 0.5
    optimization: Optimization = Optimization(epochs=8, minibatches=5)

    def compose(self) -> OnPolicy:
        """The pieces of the loop."""
        return OnPolicy(likelihood=self.matching, advantage=self.advantage, surrogate=self.surrogate,
                        optimization=self.optimization, reference_velocity=self.reference_velocity,
                        ema_velocity=self.ema_velocity, behavior_cloning=self.behavior_cloning,
                        value_loss=self.value_loss)
