"""Diffusion-DPO: preference pairs against the initial policy (Wallace et al. 2023, arXiv 2311.12908).

The same time and noise for winner and loser and for policy and reference. The authors use beta 2,000 to 5,000 per mean
squared error on 16,384-number latents; what holds the policy is beta / (2 D) per nat.
"""

from __future__ import annotations

from typing import Literal

from diffalign.spec import spec
from diffalign.train.preferences import Preference
from diffalign.train.supervised import Pretraining


@spec
class DPO:
    """Given winners against given losers."""

    type: Literal["dpo"] = "dpo"
    beta: float = 50.0
    fitting: Pretraining = Pretraining(steps=500, learning_rate=1e-4, batch_size=64, ema_decay=0.99)

    def compose(self) -> Preference:
        """The pieces of the loop."""
        return Preference(fitting=self.fitting, beta=self.beta, opponent="given")
