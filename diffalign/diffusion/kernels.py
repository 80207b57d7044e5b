"""Reverse kernels: each states the moments of p(x_next | x) and nothing else.

Legend: N rows, *E event axes; `now` and `nxt` are the levels of x and x_next. `std` includes the step size, and
every kernel is deterministic on the step that reaches sigma = 0 unless it has a `min_std` floor.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.gaussian import Gaussian
from diffalign.diffusion.paths import Level
from diffalign.spec import spec


@runtime_checkable
class Kernel(Protocol):
    """What the sampler and the transition likelihood need from a kernel."""

    @property
    def stochastic(self) -> bool: ...
    @property
    def flow_only(self) -> bool: ...

    def moments(self, x: Float[Tensor, "N *E"], x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"],
                now: Level, nxt: Level) -> Gaussian:
        """p(x_next | x) given the network's x0 and eps at x."""
        ...


def _nonnegative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def posterior_std(now: Level, nxt: Level) -> Tensor:
    """Std of q(x_next | x, x0) on any path: sigma_nxt * sqrt(1 - (alpha_now sigma_nxt / alpha_nxt sigma_now)^2)."""
    shrink = (now.alpha * nxt.sigma / (nxt.alpha * now.sigma)) ** 2
    return nxt.sigma * (1 - shrink).clamp(min=0).sqrt()


@spec
class DDPM:
    """Ancestral sampling: the exact posterior q(x_next | x, x0) (Ho et al. 2020, eq. 6-7), on any path.

    `min_std` is DPPO's exploration floor (Ren et al. 2024, sec. 4.3): it widens the std of every step, the last one
    included, and leaves the mean. It applies alike to sampling and to the density, so the ratio starts at 1.
    """

    type: Literal["ddpm"] = "ddpm"
    min_std: float = 0.0
    flow_only = False
    stochastic = True

    def __post_init__(self) -> None:
        _nonnegative("min_std", self.min_std)

    def moments(self, x: Float[Tensor, "N *E"], x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"],
                now: Level, nxt: Level) -> Gaussian:
        """Posterior mean from x and x0; std floored by min_std."""
        ratio = now.alpha / nxt.alpha
        kept = ratio**2 * nxt.sigma**2 / now.sigma**2
        mean = kept / ratio.clamp(min=1e-12) * x + nxt.alpha * (1 - kept) * x0
        return Gaussian(mean, posterior_std(now, nxt).clamp(min=self.min_std))


@spec
class DDIM:
    """DDIM(eta) (Song et al. 2021, eq. 12 and 16) on any path; eta = 1 equals DDPM, eta = 0 is deterministic."""

    type: Literal["ddim"] = "ddim"
    eta: float = 1.0
    min_std: float = 0.0
    flow_only = False

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}; larger values leave no room for the mean")
        _nonnegative("min_std", self.min_std)

    @property
    def stochastic(self) -> bool:
        """Whether a step has a density."""
        return self.eta > 0 or self.min_std > 0

    def moments(self, x: Float[Tensor, "N *E"], x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"],
                now: Level, nxt: Level) -> Gaussian:
        """alpha' x0 + sqrt(sigma'^2 - s^2) eps with s = eta * posterior std."""
        std = self.eta * posterior_std(now, nxt)
        mean = nxt.alpha * x0 + (nxt.sigma**2 - std**2).clamp(min=0).sqrt() * eps
        return Gaussian(mean, std.clamp(min=self.min_std))


@spec
class ODE:
    """The deterministic probability-flow step; on the flow path this is Euler, on VP it is DDIM(eta = 0)."""

    type: Literal["ode"] = "ode"
    flow_only = False
    stochastic = False

    def moments(self, x: Float[Tensor, "N *E"], x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"],
                now: Level, nxt: Level) -> Gaussian:
        """alpha' x0 + sigma' eps, std 0."""
        return Gaussian(nxt.alpha * x0 + nxt.sigma * eps, torch.zeros_like(nxt.sigma))


@spec
class FlowSDE:
    """Flow-GRPO's SDE (Liu et al. 2025, eq. 9): g(t) = a sqrt(t / (1 - t)), Euler-Maruyama on the flow path.

    mean = x + [v + g^2/(2t) (x + (1-t) v)] dt, std = g sqrt(-dt), with x + (1-t) v = eps. At t = 1 the denominator
    uses the next grid time, as the authors do. Departure: the step that reaches t = 0 is noiseless (their base
    pipeline noises it, which leaves noise of std 0.23 in the sample that the reward sees), unless min_std, an
    exploration floor as in DDPM, noises it.
    """

    type: Literal["flow_sde"] = "flow_sde"
    noise_level: float = 0.7
    min_std: float = 0.0
    flow_only = True

    def __post_init__(self) -> None:
        _nonnegative("noise_level", self.noise_level)
        _nonnegative("min_std", self.min_std)

    @property
    def stochastic(self) -> bool:
        """Whether a step has a density."""
        return self.noise_level > 0 or self.min_std > 0

    def moments(self, x: Float[Tensor, "N *E"], x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"],
                now: Level, nxt: Level) -> Gaussian:
        """Drift with the score correction; std = g sqrt(-dt)."""
        t = now.sigma
        rest = torch.where(t < 1, 1 - t, 1 - nxt.sigma)
        step = _euler_maruyama(x, x0, eps, now, nxt, self.noise_level * (t / rest).sqrt())
        return Gaussian(step.mean, step.std.clamp(min=self.min_std))


@spec
class DanceSDE:
    """DanceGRPO's SDE (Xue et al. 2025, eq. 8): constant g(t) = eta; otherwise as FlowSDE, last step noiseless."""

    type: Literal["dance_sde"] = "dance_sde"
    eta: float = 0.3
    flow_only = True

    def __post_init__(self) -> None:
        _nonnegative("eta", self.eta)

    @property
    def stochastic(self) -> bool:
        """Whether a step has a density."""
        return self.eta > 0

    def moments(self, x: Float[Tensor, "N *E"], x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"],
                now: Level, nxt: Level) -> Gaussian:
        """Drift with the score correction; std = eta sqrt(-dt)."""
        return _euler_maruyama(x, x0, eps, now, nxt, torch.full_like(now.sigma, self.eta))


def _euler_maruyama(x: Tensor, x0: Tensor, eps: Tensor, now: Level, nxt: Level, g: Tensor) -> Gaussian:
    dt = nxt.sigma - now.sigma
    g = torch.where(nxt.sigma > 0, g, torch.zeros_like(g))
    mean = x + (eps - x0 + g**2 / (2 * now.sigma) * eps) * dt
    return Gaussian(mean, g * (-dt).sqrt())


@spec
class CPS:
    """Coefficient-preserving sampling (Wang & Yu 2025, arXiv 2509.05952): s = sigma' sin(a pi / 2).

    mean = alpha' x0 + sqrt(sigma'^2 - s^2) eps keeps the noise level exact at every step given x0 (FlowSDE does
    not) and is noiseless at sigma' = 0 but for min_std, an exploration floor as in DDPM. With an uncertain x0, large
    steps shrink the spread of the samples.
    Departure: the log-density is the true one (the authors' code drops the variance).
    """

    type: Literal["cps"] = "cps"
    noise_level: float = 0.8
    min_std: float = 0.0
    flow_only = False

    def __post_init__(self) -> None:
        _nonnegative("min_std", self.min_std)
        if not 0 <= self.noise_level <= 1:
            raise ValueError(f"noise_level must lie in [0, 1] (1 = all noise is fresh), got {self.noise_level}")

    @property
    def stochastic(self) -> bool:
        """Whether a step has a density."""
        return self.noise_level > 0 or self.min_std > 0

    def moments(self, x: Float[Tensor, "N *E"], x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"],
                now: Level, nxt: Level) -> Gaussian:
        """alpha' x0 + sigma' cos(a pi / 2) eps with std sigma' sin(a pi / 2), floored by min_std."""
        angle = self.noise_level * math.pi / 2
        std = (nxt.sigma * math.sin(angle)).clamp(min=self.min_std)
        return Gaussian(nxt.alpha * x0 + nxt.sigma * math.cos(angle) * eps, std)


@spec
class NoisyODE:
    """The ODE step with noise of its own added, the last step included (ReinFlow, arXiv 2505.22094, sec. 4).

    std is min_std; a denoiser that injects noise (policy/injection.py) says where between min_std and max_std it lies,
    geometrically, for every number of the event. The drift is not corrected for the noise, so that samples are wider
    than the ODE's (FlowSDE corrects it): for exploration, to be evaluated by the ODE. After `hold` of the training
    max_std falls by a cosine to min_std + final (max_std - min_std), as published; final 1 keeps it.
    """

    type: Literal["noisy_ode"] = "noisy_ode"
    min_std: float = 0.08
    max_std: float = 0.16
    hold: float = 0.35
    final: float = 0.7
    flow_only = False
    stochastic = True

    def __post_init__(self) -> None:
        if not 0 < self.min_std <= self.max_std:
            raise ValueError(f"need 0 < min_std <= max_std, got {self.min_std} and {self.max_std}")
        if not 0 <= self.hold < 1 or not 0 <= self.final <= 1:
            raise ValueError(f"need 0 <= hold < 1 and 0 <= final <= 1, got {self.hold} and {self.final}")

    def reach(self, progress: float) -> float:
        """The share whose std is the largest one allowed at this share of the training, in [0, 1]."""
        if self.min_std == self.max_std:
            return 1.0
        done = min(1.0, max(0.0, (progress - self.hold) / (1 - self.hold)))
        kept = self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2
        largest = self.min_std + kept * (self.max_std - self.min_std)
        return math.log(largest / self.min_std) / math.log(self.max_std / self.min_std)

    def between(self, share: Tensor) -> Tensor:
        """min_std^(1 - share) max_std^share, for a share in [0, 1]."""
        return self.min_std * (self.max_std / self.min_std) ** share

    def moments(self, x: Float[Tensor, "N *E"], x0: Float[Tensor, "N *E"], eps: Float[Tensor, "N *E"],
                now: Level, nxt: Level) -> Gaussian:
        """alpha' x0 + sigma' eps, std min_std."""
        return Gaussian(nxt.alpha * x0 + nxt.sigma * eps, torch.full_like(nxt.sigma, self.min_std))
