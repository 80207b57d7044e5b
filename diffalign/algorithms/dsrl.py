"""DSRL: steering a frozen policy by its initial noise (Wagenmaker et al. 2025, arXiv 2506.15799).

a = base(s, w) by the deterministic sampler, w = box * tanh(.), learned by SAC on w. variant `sac` learns Q(s, w);
`na` (noise aliasing) learns Q(s, a) on actions, so that demonstrations count, and regresses Q(s, w) on it for the
actor. The support of the base cannot be left, and KL(w's law || N(0, I)) bounds the KL of the actions.
Departures: fewer and narrower critics with LayerNorm, one update a decision (the authors: 2,048 wide, 20 updates), an
entropy target of -1/2 nat per number instead of 0, distillation once per update instead of 10 times.
"""

from __future__ import annotations

from typing import Literal

from diffalign.policy.operators import OnNoise
from diffalign.spec import spec
from diffalign.train.off_policy_pieces import Learning, OffPolicy


@spec
class DSRL:
    """SAC on the initial noise of a frozen base."""

    type: Literal["dsrl"] = "dsrl"
    variant: Literal["sac", "na"] = "sac"
    box: float = 1.5
    steps: int | None = None
    learning: Learning = Learning()

    def compose(self) -> OffPolicy:
        """The pieces of the loop."""
        scores: Literal["noise", "actions"] = "noise" if self.variant == "sac" else "actions"
        return OffPolicy(operator=OnNoise(box=self.box, scores=scores, steps=self.steps), learning=self.learning)
