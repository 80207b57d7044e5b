"""Composition of denoisers: one denoiser made of several policies' (GPC, arXiv 2510.01068).

Legend: N rows, P policies, *E event axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.gaussian import standard_normal
from diffalign.diffusion.paths import Level, Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import select_rows

_TOLERANCE = 0.05  # of log(alpha / sigma), between the host's level and the nearest one that a member knows


@dataclass(frozen=True)
class Composition:
    """Sum of w_i times each policy's (x0, eps), w on the simplex; prediction flow, on the path of the first policy.

    Every member is asked at the same signal-to-noise ratio on its own path, with x rescaled to it, so that diffusion
    and flow policies of any prediction kind compose (2510.01068, eq. 8, for one shared kind and schedule). For equal
    covariances the result is the score of the geometric mixture; otherwise it is no product of densities, and between
    disjoint modes it puts mass where no member has any: look at `disagreement` first.

    Raises: ValueError for weights outside the simplex, other events, or levels that a member's table lacks.
    """

    policies: tuple[DiffusionPolicy, ...]
    weights: tuple[float, ...]
    prediction: Prediction = "flow"

    def __post_init__(self) -> None:
        if len(self.policies) != len(self.weights) or len(self.policies) < 1:
            raise ValueError(f"one weight per policy is needed, got {len(self.policies)} policies and "
                             f"{len(self.weights)} weights")
        if any(not w >= 0 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights must be at least 0 and sum to 1, got {list(self.weights)}")
        events = {policy.event for policy in self.policies}
        if len(events) > 1:
            raise ValueError(f"policies must have the same event (chunk and action size), got {sorted(events)}")

    def __call__(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """eps - x0 of the composition."""
        host = self.policies[0].path.level(t, x.ndim - 1)
        total = torch.zeros_like(x)
        for policy, weight in zip(self.policies, self.weights, strict=True):
            if weight == 0:
                continue
            x0, eps = at_matched_noise(policy, x, t, host, cond)
            total = total + weight * (eps - x0)
        return total


def at_matched_noise(policy: DiffusionPolicy, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], level: Level,
                     cond: Cond) -> tuple[Float[Tensor, "N *E"], Float[Tensor, "N *E"]]:
    """(x0, eps) of a policy for x at a level of another path.

    x = alpha x0 + sigma eps on the host's path is (alpha + sigma) / (alpha' + sigma') times a point on the policy's
    path where alpha' / sigma' = alpha / sigma. Raises: ValueError if the policy's table has no such level.
    """
    own = policy.path.time_at(level)
    there = policy.path.level(own, x.ndim - 1)
    share, found = (level.alpha / (level.alpha + level.sigma), there.alpha / (there.alpha + there.sigma))
    inside = (share > 1e-4) & (share < 1 - 1e-4)
    gap = (torch.logit(share, 1e-6) - torch.logit(found, 1e-6)).abs()[inside]
    if bool((gap > _TOLERANCE).any()):
        raise ValueError(f"a policy on {policy.path} has no noise level within {_TOLERANCE} of the composition's in "
                         f"log(alpha / sigma), the nearest is off by {float(gap.max()):.2g}; put the policy with the "
                         "coarser table first, so that its levels are used")
    return policy.predict(x * (there.alpha + there.sigma) / (level.alpha + level.sigma), own, cond)


def compose(policies: Sequence[DiffusionPolicy], weights: Sequence[float]) -> DiffusionPolicy:
    """The first policy's sampler around the composition."""
    return replace(policies[0], denoiser=Composition(tuple(policies), tuple(weights)))


@torch.no_grad()
def noise_predictions(policies: Sequence[DiffusionPolicy], x0: Float[Tensor, "N *E"], cond: Cond, *, count: int,
                      generator: torch.Generator) -> tuple[Float[Tensor, "P M *E"], Float[Tensor, "M *E"]]:
    """Every policy's eps, and the true eps, at `count` random levels of the first policy's schedule per sample."""
    host, rows = policies[0], torch.arange(len(x0)).repeat(count)
    grid = host.schedule.times()[:-1]
    t = grid[torch.randint(len(grid), (len(rows),), generator=generator)]
    eps = standard_normal(len(rows), tuple(x0.shape[1:]), x0.device).sample(generator)
    level = host.path.level(t, x0.ndim - 1)
    x = level.alpha * x0[rows] + level.sigma * eps
    some = select_rows(cond, rows)
    return torch.stack([at_matched_noise(policy, x, t, level, some)[1] for policy in policies]), eps


def best_pair_weights(predictions: Float[Tensor, "2 M *E"], eps: Float[Tensor, "M *E"]) -> tuple[float, float]:
    """argmin over the simplex of E|w1 eps1 + w2 eps2 - eps|^2 on data (closed form, 2510.01068, prop. 4.1).

    w2 = clip(E<e1, e1 - e2> / E|e1 - e2|^2, 0, 1) with e_i the error of policy i. Score error is no success rate: this
    is where a search starts.
    """
    first, second = predictions[0] - eps, predictions[1] - eps
    apart = first - second
    weight = float(((first * apart).sum() / apart.square().sum().clamp(min=1e-12)).clamp(0, 1))
    return 1 - weight, weight


def disagreement(predictions: Float[Tensor, "P M *E"], eps: Float[Tensor, "M *E"]) -> float:
    """E|eps_1 - eps_2|^2 / mean of E|eps_i - eps|^2, the largest over pairs of policies.

    Near 0 the policies are the same and nothing can be gained; above about 2 their errors are opposed (independent
    errors give 2), as for disjoint modes.
    """
    error = (predictions - eps).square().flatten(1).mean(1)
    pairs = [(i, j) for i in range(len(predictions)) for j in range(i)]
    apart = [((predictions[i] - predictions[j]).square().mean() / ((error[i] + error[j]) / 2).clamp(min=1e-12))
             for i, j in pairs]
    return float(torch.stack(apart).max())
