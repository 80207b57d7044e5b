"""Residual off-policy RL on a frozen chunk policy: ResFiT (Ankile et al. 2025, arXiv 2509.19301), Policy Decorator.

a = clip(a_base + scale * tanh(.)), the critic sees the sum, the replay remembers a_base of both states.
actor_std fixed is TD3 with smoothed targets (ResFiT), actor_std None SAC (Policy Decorator, arXiv 2412.13630).
Departures: a correction of the whole executed chunk (Policy Decorator's time scale) instead of one per control step;
the squared error is taken per critic, not of the critics' mean; warm-up decisions are the base's own, without noise.
"""

from __future__ import annotations

from typing import Literal

from diffalign.policy.operators import OnActions
from diffalign.spec import spec
from diffalign.train.off_policy_pieces import Learning, OffPolicy


@spec
class ResidualRL:
    """A bounded correction of every base action, learned off-policy."""

    type: Literal["residual"] = "residual"
    scale: float = 0.2
    learning: Learning = Learning(actor_std=0.3, actor_learning_rate=1e-4)

    def compose(self) -> OffPolicy:
        """The pieces of the loop."""
        return OffPolicy(operator=OnActions(samples=1, scale=self.scale), learning=self.learning)
