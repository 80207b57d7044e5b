"""A base policy under an improvement operator, as a policy.

Legend: N rows, m candidates of a row, K critics, *E event axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.trajectories import Cond, settled
from diffalign.policy.actors import BoundedActor
from diffalign.policy.operators import Operator
from diffalign.policy.protocols import BasePolicy, Decision

Mode = Literal["explore", "exploit", "base"]


@runtime_checkable
class ActionCritic(Protocol):
    """An ensemble of K state-action values."""

    def score(self, cond: Cond, candidates: Float[Tensor, "N m *E"]) -> Float[Tensor, "K N m"]: ...


@dataclass(frozen=True)
class ImprovedPolicy:
    """Acts on the candidate that the mean of the critics prefers.

    mode: `explore` samples the actor, `exploit` takes its mean, `base` is the untouched base (warm-up).
    """

    base: BasePolicy
    operator: Operator
    actor: BoundedActor | None
    critic: ActionCritic
    mode: Mode = "exploit"

    def with_mode(self, mode: Mode) -> ImprovedPolicy:
        """The same policy in another mode."""
        return replace(self, mode=mode)

    def window(self, generator: torch.Generator) -> None:
        """None: no denoising step is trained."""

    @torch.no_grad()
    def act(self, cond: Cond, *, generator: torch.Generator, trained: Tensor | None = None) -> Decision:
        """One decision per row; signals are the base's, and `chosen`: what the critic scored."""
        signals = self.operator.ask(self.base, cond, generator=generator)
        if self.mode == "base":
            found = self.operator.fallback(self.base, cond, signals, generator=generator)
        else:
            found = self.operator.candidates(self.base, self.actor, cond, signals,
                                             generator=generator if self.mode == "explore" else None)
        chosen = found.value[:, 0]
        if found.value.shape[1] > 1:
            best = self.critic.score(cond, found.value).mean(0).argmax(1)
            chosen = found.value[torch.arange(len(best), device=best.device), best]
        action = self.operator.execute(self.base, cond, chosen)
        return Decision(action, settled(action, cond), {**signals, "chosen": chosen})
