"""A denoiser with a small network beside it that learns how much noise to inject (ReinFlow, arXiv 2505.22094).

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

from diffalign.diffusion.kernels import NoisyODE
from diffalign.diffusion.paths import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.mlp import zero_headed
from diffalign.policy.normalize import Normalizer
from diffalign.policy.protocols import Denoiser, encoded

_TIMES = 4


@runtime_checkable
class Injects(Protocol):
    """A denoiser that says how much noise a noisy_ode step adds."""

    def noise_share(self, t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]: ...


class NoiseShare(nn.Module):
    """A number in (0, 1) for every number of the event, from path time and condition; untrained it is 1/2.

    key: the leaf of cond that is read, flattened to F features.
    """

    def __init__(self, event: tuple[int, ...], features: int, hidden: Sequence[int] = (64, 64), *, key: str = "obs",
                 normalizer: Normalizer | None = None) -> None:
        super().__init__()
        self.event, self.key = event, key
        self.normalizer = normalizer or Normalizer(features)
        self.net = zero_headed(features + _TIMES, hidden, math.prod(event), nn.Tanh)

    def forward(self, t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """The share of every row and number."""
        waves = (math.pi * t[:, None] * torch.arange(1, _TIMES + 1, device=t.device)).cos()
        features = self.normalizer.normalize(cond[self.key].flatten(1))
        raw: Tensor = self.net(torch.cat([waves, features], 1))
        return ((raw.tanh() + 1) / 2).reshape(-1, *self.event)


class NoisyDenoiser(nn.Module):
    """A trainable denoiser and the noise that its steps inject under a noisy_ode kernel; other kernels ignore it.

    `reach`, a buffer, is the largest share: 1 until `narrow` lowers it.
    """

    reach: Tensor

    def __init__(self, denoiser: Denoiser, noise: NoiseShare) -> None:
        super().__init__()
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"a noisy denoiser must be a module, got {type(denoiser).__name__}")
        self.denoiser, self.noise = denoiser, noise
        self.prediction: Prediction = denoiser.prediction
        self.register_buffer("reach", torch.ones(()))

    def encode(self, cond: Cond) -> Cond:
        """The condition as the denoiser encodes it."""
        return encoded(self.denoiser, cond)

    def noise_share(self, t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """Where between the kernel's min_std and max_std the noise of a step from time t lies."""
        share: Tensor = self.reach * self.noise(t, cond)
        return share

    def narrow(self, kernel: NoisyODE, progress: float) -> None:
        """Lower the largest std to what the kernel's schedule says for this share of the training."""
        self.reach.fill_(kernel.reach(progress))

    def forward(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """The denoiser's prediction."""
        prediction: Tensor = self.denoiser(x, t, cond)
        return prediction


def noisy(denoiser: Denoiser, event: tuple[int, ...], features: int, hidden: Sequence[int], *, key: str,
          normalizer: Normalizer | None = None, seed: int) -> NoisyDenoiser:
    """The denoiser beside a fresh noise net, initialised from the seed without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NoisyDenoiser(denoiser, NoiseShare(event, features, hidden, key=key,
                                                  normalizer=copy.deepcopy(normalizer)))
