"""A frozen denoiser that starts elsewhere: the learned distribution of the initial noise.

Legend: N rows, F condition features, *E event axes of E numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.gaussian import Gaussian
from diffalign.diffusion.paths import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.mlp import zero_headed
from diffalign.policy.normalize import Normalizer
from diffalign.policy.protocols import Denoiser, encoded


@runtime_checkable
class Steers(Protocol):
    """A denoiser that says where its chains start."""

    def start(self, cond: Cond) -> Gaussian: ...


class NoiseNet(nn.Module):
    """N(mean(cond), std^2 I) over the initial noise; untrained it is N(0, I) exactly.

    key: the leaf of cond that is read, flattened to F features. std is one number, learned and the same for all rows.
    """

    def __init__(self, event: tuple[int, ...], features: int, hidden: Sequence[int] = (256, 256), *, key: str = "obs",
                 normalizer: Normalizer | None = None) -> None:
        super().__init__()
        self.event, self.key = event, key
        self.normalizer = normalizer or Normalizer(features)
        self.net = zero_headed(features, hidden, math.prod(event), nn.SiLU, layer_norm=True)
        self.log_std = nn.Parameter(torch.zeros(()))

    def forward(self, cond: Cond) -> Gaussian:
        """The distribution of the chain's start for every row."""
        features = self.normalizer.normalize(cond[self.key].flatten(1))
        mean: Tensor = self.net(features).reshape(-1, *self.event)
        return Gaussian(mean, self.log_std.exp().expand(mean.shape[0], *(1,) * len(self.event)))


class SteeredDenoiser(nn.Module):
    """A denoiser, frozen here, whose chains start where `noise` says (DSRL, arXiv 2506.15799, a Gaussian policy)."""

    def __init__(self, denoiser: Denoiser, noise: NoiseNet) -> None:
        super().__init__()
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"a steered denoiser must be a module, got {type(denoiser).__name__}")
        self.denoiser = denoiser.requires_grad_(False)
        self.noise = noise
        self.prediction: Prediction = denoiser.prediction

    def encode(self, cond: Cond) -> Cond:
        """The condition as the denoiser encodes it."""
        return encoded(self.denoiser, cond)

    def start(self, cond: Cond) -> Gaussian:
        """The distribution of the chain's start for every row."""
        found: Gaussian = self.noise(cond)
        return found

    def forward(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """The frozen denoiser's prediction."""
        prediction: Tensor = self.denoiser(x, t, cond)
        return prediction


def steered(denoiser: Denoiser, event: tuple[int, ...], features: int, hidden: Sequence[int], *, key: str,
            normalizer: Normalizer | None = None, seed: int) -> SteeredDenoiser:
    """The denoiser under a fresh noise net, initialised from the seed without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SteeredDenoiser(denoiser, NoiseNet(event, features, hidden, key=key,
                                                  normalizer=copy.deepcopy(normalizer)))
