"""Noise paths x_t = alpha(t) x0 + sigma(t) eps and the one conversion among eps, x0, v and flow predictions.

Legend: N rows, *E event axes (any), t in [0, 1] path time with 1 = noise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec

Prediction = Literal["eps", "x0", "v", "flow"]


class Level(NamedTuple):
    """Signal and noise coefficients of a batch of rows, each [N, 1, ...] so that they multiply x [N, *E]."""

    alpha: Tensor
    sigma: Tensor


@runtime_checkable
class Path(Protocol):
    """A noise path; specs below are the implementations."""

    def level(self, t: Float[Tensor, "N"], event_dims: int) -> Level:
        """alpha and sigma at path time t, shaped [N] + [1] * event_dims."""
        ...

    def time_at(self, level: Level) -> Float[Tensor, "N"]:
        """The path time whose alpha / sigma is, or is nearest to, that of a level of any path."""
        ...


def _rows(values: Tensor, event_dims: int) -> Tensor:
    return values.reshape(values.shape + (1,) * event_dims)


def _check_time(t: Tensor) -> None:
    if bool(((t < 0) | (t > 1)).any()):
        raise ValueError(f"path time must lie in [0, 1] (1 = noise), got {t.min().item():.4g}..{t.max().item():.4g}")


@spec
class FlowPath:
    """Rectified-flow path: alpha = 1 - t, sigma = t (Liu et al. 2022; SD3, FLUX)."""

    type: Literal["flow"] = "flow"

    def level(self, t: Float[Tensor, "N"], event_dims: int) -> Level:
        """alpha = 1 - t and sigma = t."""
        _check_time(t)
        return Level(_rows(1 - t, event_dims), _rows(t, event_dims))

    def time_at(self, level: Level) -> Float[Tensor, "N"]:
        """sigma / (alpha + sigma)."""
        return (level.sigma / (level.alpha + level.sigma)).flatten()


@spec
class VPPath:
    """Variance-preserving path from a table of `train_steps` betas, as diffusers' schedulers build it.

    Path time t = (index + 1) / train_steps, so t = 1 is the noisiest table entry and t = 0 is clean data
    (alpha 1, sigma 0; diffusers' `set_alpha_to_one`). Times between entries round to the nearest entry.
    """

    type: Literal["vp"] = "vp"
    betas: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.train_steps < 1:
            raise ValueError(f"train_steps must be at least 1, got {self.train_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}")

    def level(self, t: Float[Tensor, "N"], event_dims: int) -> Level:
        """alpha = sqrt(abar), sigma = sqrt(1 - abar) of the nearest table entry (entry 0 is clean)."""
        _check_time(t)
        abar = alphas_cumprod(self).to(t.device)[self.index(t)]
        return Level(_rows(abar.sqrt().to(t.dtype), event_dims), _rows((1 - abar).sqrt().to(t.dtype), event_dims))

    def time_at(self, level: Level) -> Float[Tensor, "N"]:
        """The table entry nearest in the angle atan2(sigma, alpha)."""
        abar = alphas_cumprod(self).to(level.alpha.device)
        angles = torch.atan2((1 - abar).sqrt(), abar.sqrt())
        wanted = torch.atan2(level.sigma.double(), level.alpha.double()).flatten()
        index = torch.searchsorted((angles[1:] + angles[:-1]) / 2, wanted)  # between midpoints lies the nearest entry
        return (index / self.train_steps).to(level.alpha.dtype)

    def index(self, t: Float[Tensor, "N"]) -> Tensor:
        """Table entry of path time t in 0..train_steps, 0 = clean; diffusers' timestep is this minus one."""
        return (t.double() * self.train_steps).round().long()


@lru_cache(maxsize=32)
def alphas_cumprod(path: VPPath) -> Float[Tensor, "T1"]:
    """Cumulative alphas in float64 with a leading 1 for clean data, [train_steps + 1]."""
    if path.betas == "linear":
        betas = torch.linspace(path.beta_start, path.beta_end, path.train_steps, dtype=torch.float64)
    elif path.betas == "scaled_linear":
        ends = math.sqrt(path.beta_start), math.sqrt(path.beta_end)
        betas = torch.linspace(*ends, path.train_steps, dtype=torch.float64) ** 2
    else:  # Nichol & Dhariwal 2021, eq. 17, s = 0.008, betas capped at 0.999
        u = torch.arange(path.train_steps + 1, dtype=torch.float64) / path.train_steps
        bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])


def convert(prediction: Prediction, output: Float[Tensor, "N *E"], x: Float[Tensor, "N *E"], level: Level
            ) -> tuple[Float[Tensor, "N *E"], Float[Tensor, "N *E"]]:
    """(x0, eps) implied by a network output at x = alpha x0 + sigma eps.

    eps: the noise; x0: the data; v = alpha eps - sigma x0 (Salimans & Ho 2022); flow = eps - x0, the velocity
    dx/dt of the flow path. v needs alpha^2 + sigma^2 = 1 and is inverted in general form here.
    """
    alpha, sigma = level
    if prediction == "eps":
        if bool((alpha == 0).any()):
            raise ValueError("an eps prediction does not determine x0 where alpha = 0 (pure noise); "
                             "use x0, v or flow prediction, or a schedule that starts below t = 1")
        return (x - sigma * output) / alpha, output
    if prediction == "x0":
        return output, (x - alpha * output) / sigma.clamp(min=torch.finfo(x.dtype).tiny)
    if prediction == "v":
        norm = alpha**2 + sigma**2
        return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
    if prediction == "flow":
        total = alpha + sigma
        return (x - sigma * output) / total, (x + alpha * output) / total
    raise ValueError(f"prediction must be one of eps, x0, v, flow; got {prediction!r}")


def training_target(prediction: Prediction, x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"], level: Level
                    ) -> Float[Tensor, "N *E"]:
    """What a network with this prediction kind is regressed on."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        return level.alpha * eps - level.sigma * x0
    if prediction == "flow":
        return eps - x0
    raise ValueError(f"prediction must be one of eps, x0, v, flow; got {prediction!r}")
