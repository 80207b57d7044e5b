"""The clamped ratio of DPOK.

Legend: M rows.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from diffalign.rl.likelihoods import Rows, Scored, Signal
from diffalign.rl.surrogates import SurrogateLoss, Unit, bounds, leaves_lower_limit, positive, tempered
from diffalign.spec import spec


@spec
class ClampedRatio:
    """-A clamp(r, low, high): PPO's clip without its minimum, as in DPOK's code (Fan et al. 2023, arXiv 2305.16381).

    A row outside the limits has no gradient whatever the sign of A, the rows that moved the wrong way included, which
    ppo_clip lets come back: held_low and held_high count them all. limit bounds the log-ratio in joint nats, or with
    unit per_dim the mean-over-dims ratio by 1 +- limit (published: 1e-4).
    """

    type: Literal["clamped"] = "clamped"
    limit: float = 0.2
    unit: Unit = "nats"
    needs: ClassVar[Signal | None] = None
    selective = False

    def __post_init__(self) -> None:
        positive(self, "limit")
        leaves_lower_limit("limit", self.limit, self.unit)

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss:
        """Clamped loss, scaled so that its gradient starts as -A grad log p."""
        ratio, scale = tempered(new.log_prob - rows.old_log_prob, self.unit, new.dims)
        limit = torch.full_like(ratio, self.limit)
        low, high = bounds(limit, limit, self.unit)
        loss = -scale * rows.advantage * torch.minimum(torch.maximum(ratio, low), high)
        return SurrogateLoss(loss, ratio < low, ratio > high)
