"""SePPO: semi-policy preference optimization (Zhang et al. 2024, arXiv 2410.05255), without rewards and losers.

Data are winners only. For each condition a past policy of the run, drawn from the history, makes the other sample, and
is the reference of the preference loss. Where that reference already fits the winner better than the policy, its
sample counts as a second winner (the anchor's flip).
The authors' training code is not public: beta, learning rate and the snapshot interval are ours; the flip is per
sample. reference: initial is SPIN-Diffusion's choice, random the paper's.
"""

from __future__ import annotations

from typing import Literal

from diffalign.rl.preferences import Anchor
from diffalign.spec import spec
from diffalign.train.preferences import Preference
from diffalign.train.supervised import Pretraining


@spec
class SePPO:
    """Winners against samples of earlier policies."""

    type: Literal["seppo"] = "seppo"
    beta: float = 50.0
    reference: Literal["initial", "latest", "random"] = "random"
    anchor: Anchor = "per_sample"
    snapshot_every: int = 100
    history: int = 5
    fitting: Pretraining = Pretraining(steps=500, learning_rate=1e-4, batch_size=64, ema_decay=0.99)

    def compose(self) -> Preference:
        """The pieces of the loop."""
        return Preference(fitting=self.fitting, beta=self.beta, opponent="sampled", reference=self.reference,
                          anchor=self.anchor, snapshot_every=self.snapshot_every, history=self.history)
