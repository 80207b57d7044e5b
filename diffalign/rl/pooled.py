"""The matching likelihood with one ratio a decision: the mean over its noise-time draws.

Legend: N decisions, J draws of each, M rows of a minibatch, R all rows of a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.trajectories import DenoisingTrajectory
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.likelihoods import Matching, MatchingExamples, Rows, Scored, Signal
from diffalign.spec import spec


@dataclass(frozen=True)
class PooledExamples:
    """One row a decision; its draws are rows i, i + n, i + 2 n, ... of the matching examples."""

    drawn: MatchingExamples
    decision: Int[Tensor, "R"]
    place: Int[Tensor, "R"]

    def __len__(self) -> int:
        return self.decision.shape[0]

    def rows(self, index: Int[Tensor, "M"]) -> Rows:
        """Materialize a minibatch; data and cond hold the J draws of a row one after the other."""
        count = max(1, len(self))
        each = index[:, None] + count * torch.arange(len(self.drawn) // count, device=index.device)
        draws = self.drawn.rows(each.flatten())
        advantage = self.drawn.advantage[self.decision[index]]
        return Rows(draws.data, draws.cond, advantage, draws.old_log_prob.reshape(each.shape).mean(1), None,
                    torch.ones_like(advantage))


@spec
class PooledMatching:
    """Minus the mean of `matching`'s losses over the draws of a decision, as one log-likelihood (FPO, eq. 10)."""

    type: Literal["pooled_matching"] = "pooled_matching"
    matching: Matching = Matching(draws=8)
    provides: ClassVar[frozenset[Signal]] = frozenset()

    def examples(self, policy: DiffusionPolicy, trajectory: DenoisingTrajectory, advantage: Float[Tensor, "N"],
                 *, decisions: Int[Tensor, "n"], generator: torch.Generator, others: tuple[int, int] = (0, 0)
                 ) -> PooledExamples:
        """The draws of the chosen decisions, scored once under the rollout policy."""
        drawn = self.matching.examples(policy, trajectory, advantage, decisions=decisions, generator=generator,
                                       others=others)
        place = others[0] + torch.arange(len(decisions), device=decisions.device)
        return PooledExamples(drawn, decisions, place)

    def score(self, policy: DiffusionPolicy, rows: Rows) -> Scored:
        """The mean over the draws of every row."""
        drawn = self.matching.score(policy, rows)
        pooled = drawn.log_prob.unflatten(0, (len(rows.advantage), self.matching.draws)).mean(1)
        return Scored(pooled, None, None, drawn.dims)
