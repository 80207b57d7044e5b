"""What one call of the sampler leaves behind.

Legend: N rows, K denoising steps, *E event axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Cond = Mapping[str, Tensor]  # conditioning; every leaf is [N, ...]


@dataclass(frozen=True)
class DenoisingTrajectory:
    """One denoising chain per row: k = 0 is noise, k = K is the sample.

    `log_prob`, `mean` and `std` are zero on steps outside `trained`; `std` is per row and step, [N, K, 1, ...], or per
    number where the noise was learned.
    """

    x: Float[Tensor, "N K1 *E"]
    times: Float[Tensor, "K1"]
    trained: Bool[Tensor, "K"]
    log_prob: Float[Tensor, "N K"]
    mean: Float[Tensor, "N K *E"]
    std: Float[Tensor, "N K *S"]
    cond: Cond

    @property
    def sample(self) -> Float[Tensor, "N *E"]:
        """The clean end of the chain."""
        return self.x[:, -1]


def settled(action: Float[Tensor, "N *E"], cond: Cond) -> DenoisingTrajectory:
    """The chain of no steps that ends at `action`: a decision whose denoising is not scored."""
    rows, none = action.shape[0], action.new_zeros(action.shape[0], 0)
    moments = action.new_zeros(rows, 0, *action.shape[1:])
    return DenoisingTrajectory(action[:, None], action.new_zeros(1), torch.zeros(0, dtype=torch.bool), none, moments,
                               moments, cond)


def concatenate(parts: Sequence[DenoisingTrajectory]) -> DenoisingTrajectory:
    """The rows of several trajectories in order (decisions of a rollout: time-major).

    Raises: ValueError if they differ in grid or in trained steps, because one rollout shares one window.
    """
    first = parts[0]
    if any(not torch.equal(p.times, first.times) or not torch.equal(p.trained, first.trained) for p in parts):
        raise ValueError("trajectories of one rollout must share their time grid and trained steps; "
                         "draw the window once and pass it to every act(trained=...)")
    cond = {name: torch.cat([p.cond[name] for p in parts]) for name in first.cond}
    return DenoisingTrajectory(torch.cat([p.x for p in parts]), first.times, first.trained,
                               torch.cat([p.log_prob for p in parts]), torch.cat([p.mean for p in parts]),
                               torch.cat([p.std for p in parts]), cond)
