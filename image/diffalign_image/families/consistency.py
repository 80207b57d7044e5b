"""Consistency models on a noise path: a network asked for the clean end of its trajectory (Luo et al. 2023, LCM).

Legend: N rows, *E event axes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import LCMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import Prediction, VPPath, convert
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.protocols import Denoiser

_SIGMA_DATA = 0.5


class Consistency(nn.Module):
    """f(x, t) = c_skip x + c_out x0, whose coefficients make it the identity at t = 0 (LCM, arXiv 2310.04378, eq. 9).

    c_skip = s^2 / (u^2 + s^2), c_out = u / sqrt(u^2 + s^2), s = 0.5, u = scaling * table index. Sampled with
    CPS(noise_level=1), x_next = alpha' f + sigma' noise, this is multistep consistency sampling, and a policy gradient
    on it is RLCM (Oertell et al. 2024, arXiv 2404.03673).
    """

    prediction: Prediction = "x0"

    def __init__(self, network: nn.Module, path: VPPath, scaling: float) -> None:
        super().__init__()
        self.network = network
        self.path = path
        self.scaling = scaling

    def forward(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """f(x, t)."""
        asked = cast(Denoiser, self.network)
        x0, _ = convert(asked.prediction, asked(x, t, cond), x, self.path.level(t, x.ndim - 1))
        u = (self.scaling * (self.path.index(t) - 1)).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return (_SIGMA_DATA**2 * x / (u**2 + _SIGMA_DATA**2)) + u / torch.sqrt(u**2 + _SIGMA_DATA**2) * x0


def consistent(network: nn.Module, scheduler: Any, path: VPPath) -> nn.Module:
    """The network as its scheduler uses it: a consistency function with an LCMScheduler, itself with any other.

    Raises: ValueError if the scheduler clips or thresholds x0, which the core does not.
    """
    if not isinstance(scheduler, LCMScheduler):
        return network
    if scheduler.config.clip_sample or scheduler.config.thresholding:
        raise ValueError("scheduler_config.json has clip_sample or thresholding: true; the chain's density is that of "
                         "unclipped predictions, set both to false")
    return Consistency(network, path, scheduler.config.timestep_scaling)
