"""A denoiser whose prediction is pulled towards numbers that are already known, e.g. actions under way.

Legend: N rows, *E event axes, t in [0, 1] path time with 1 = noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.paths import Path, Prediction, convert
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser
from diffalign.policy.steering import Steers


@dataclass(frozen=True)
class Inpainted:
    """Predicts x0 + gain * weight * (known - x0): pseudo-inverse guidance with the identity for d x0 / d x.

    gain = min(guidance * sigma, (alpha^2 + sigma^2) / alpha). On the flow path that is real-time chunking's correction
    of the velocity (arXiv 2506.07339, algorithm 1) but for the vector-Jacobian product, whose place the identity takes:
    no backward pass, so that a graph can hold it; it keeps closer to `known` and less close to the data. On other paths
    it is the same correction of the score, written for x0. weight lies in [0, 1]; where it is 0 nothing changes.
    clip_x0 clamps the denoiser's own x0, before the pull.
    """

    denoiser: Denoiser
    path: Path
    known: Float[Tensor, "N *E"]
    weight: Float[Tensor, "N *E"]
    guidance: float
    clip_x0: float | None = None
    prediction: Prediction = "x0"

    def __call__(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """The pulled x0."""
        level = self.path.level(t, x.ndim - 1)
        x0, _ = convert(self.denoiser.prediction, self.denoiser(x, t, cond), x, level)
        if self.clip_x0 is not None:
            x0 = x0.clamp(-self.clip_x0, self.clip_x0)
        gain = torch.minimum(self.guidance * level.sigma, (level.alpha**2 + level.sigma**2) / level.alpha)
        return x0 + gain * self.weight * (self.known - x0)


def inpainted(policy: DiffusionPolicy, known: Float[Tensor, "N *E"], weight: Float[Tensor, "N *E"]) -> DiffusionPolicy:
    """The policy pulled towards `known`, with a guidance of 5 as published, or K / 2 where K < 10 would overshoot.

    Raises: ValueError for a stochastic kernel, whose noise would undo the pull, and for a learned start.
    """
    if policy.kernel.stochastic:
        raise ValueError(f"inpainting needs a deterministic sampler, got {policy.kernel}; use the sampler ode")
    if isinstance(policy.denoiser, Steers):
        raise ValueError("a steered policy chooses its chunk by the start of its chain, which inpainting would undo; "
                         "use its base")
    pulled = Inpainted(policy.denoiser, policy.path, known, weight, min(5.0, policy.schedule.steps / 2), policy.clip_x0)
    return replace(policy, denoiser=pulled, clip_x0=None)
