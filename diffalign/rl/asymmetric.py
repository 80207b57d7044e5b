"""The asymmetric surrogate of FPO++: PPO's clip for what was good, SPO's pull for what was not.

Legend: M rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from diffalign.rl.likelihoods import Rows, Scored, Signal
from diffalign.rl.surrogates import PPOClip, SimplePO, SurrogateLoss, Unit, positive
from diffalign.spec import spec


@spec
class AsymmetricPO:
    """ASPO (FPO++, arXiv 2602.02481): PPO's clip where A >= 0, SPO's quadratic pull where A < 0.

    -min(r A, clip(r, 1 - e, 1 + e) A), and -[r A - |A| (r - 1)^2 / (2 e)]. limit is e as in SimplePO; the log-ratio is
    clamped to +-span before exp (nats, or the mean-over-dims log-ratio per_dim), without a gradient beyond.
    """

    type: Literal["asymmetric_po"] = "asymmetric_po"
    limit: float = 0.05
    unit: Unit = "nats"
    span: float = 3.0
    needs: ClassVar[Signal | None] = None
    selective = False

    def __post_init__(self) -> None:
        positive(self, "limit", "span")

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss:
        """One of the two losses per row."""
        span = self.span * (1 if self.unit == "nats" else new.dims)
        log_ratio = (new.log_prob - rows.old_log_prob).clamp(-span, span)
        bounded = replace(new, log_prob=rows.old_log_prob + log_ratio)
        clip = PPOClip(low=self.limit, high=self.limit, unit=self.unit)(bounded, rows)
        pull = SimplePO(limit=self.limit, unit=self.unit)(bounded, rows)
        loss = torch.where(rows.advantage < 0, pull.loss, clip.loss)
        return SurrogateLoss(loss, pull.held_low, clip.held_high)
