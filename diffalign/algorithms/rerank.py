"""Re-ranking: the best of n samples of a frozen policy by a learned critic (IDQL, arXiv 2304.10573; V-GPS, 2410.13816).

The critic learns by IQL's expectile backup (backup expectile) or with the best cached sample as the next action
(backup candidates: EMaQ, arXiv 2007.11091), offline on given data or online. The policy moves by at most
log n - (n - 1) / n nats; n too large exploits the critic's errors, so it is a setting of the evaluation too.
Departures: argmax instead of sampling by softmax(Q).
"""

from __future__ import annotations

from typing import Literal

from diffalign.policy.operators import OnActions
from diffalign.spec import spec
from diffalign.train.off_policy_pieces import Learning, OffPolicy


@spec
class Rerank:
    """Best of n by a critic; nothing but the critic is trained."""

    type: Literal["rerank"] = "rerank"
    samples: int = 8
    learning: Learning = Learning(backup="expectile")

    def compose(self) -> OffPolicy:
        """The pieces of the loop."""
        return OffPolicy(operator=OnActions(samples=self.samples, scale=None, keep_base=True), learning=self.learning)
