"""The likelihood of where a chain starts: the initial noise as the action.

Legend: N decisions, *E event axes, M rows of a minibatch, R all rows of a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.gaussian import Gaussian
from diffalign.diffusion.trajectories import DenoisingTrajectory
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import select_rows
from diffalign.policy.steering import Steers
from diffalign.rl.likelihoods import Rows, Scored, Signal
from diffalign.spec import spec


@dataclass(frozen=True)
class StartExamples:
    """One row a decision, with the rollout policy's distribution of its start."""

    trajectory: DenoisingTrajectory
    advantage: Float[Tensor, "N"]
    decision: Int[Tensor, "R"]
    place: Int[Tensor, "R"]
    old: Gaussian

    def __len__(self) -> int:
        return self.decision.shape[0]

    def rows(self, index: Int[Tensor, "M"]) -> Rows:
        """Materialize a minibatch."""
        n = self.decision[index]
        x, old = self.trajectory.x[n, 0], Gaussian(self.old.mean[n], self.old.std[n])
        return Rows({"x": x}, select_rows(self.trajectory.cond, n), self.advantage[n], old.log_prob(x), old,
                    torch.ones_like(self.advantage[n]))


@spec
class Start:
    """log p(x_K | cond) of the chain's start: the noise is the action, the denoising a part of the environment.

    Any sampler may follow, the ODE included (DSRL, arXiv 2506.15799, sec. 4: any RL method may choose the noise).
    """

    type: Literal["start"] = "start"
    provides: ClassVar[frozenset[Signal]] = frozenset({"density"})

    def examples(self, policy: DiffusionPolicy, trajectory: DenoisingTrajectory, advantage: Float[Tensor, "N"],
                 *, decisions: Int[Tensor, "n"], generator: torch.Generator, others: tuple[int, int] = (0, 0)
                 ) -> StartExamples:
        """The chosen decisions. Raises: ValueError if the policy's noise is not learned."""
        if not isinstance(policy.denoiser, Steers):
            raise ValueError("the start likelihood needs a policy whose initial noise is learned, got a plain "
                             f"{type(policy.denoiser).__name__}; set steering, or take another algorithm")
        with torch.no_grad():
            place = others[0] + torch.arange(len(decisions), device=decisions.device)
            return StartExamples(trajectory, advantage, decisions, place, policy.start(trajectory.cond))

    def score(self, policy: DiffusionPolicy, rows: Rows) -> Scored:
        """Density of the stored start."""
        start = policy.start(rows.cond)
        return Scored(start.log_prob(rows.data["x"]), start, None, start.dims)
