"""The one Gaussian step: sampling, summed log-density and exact KL.

Legend: N rows, *E event axes. `std` always includes the step size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Independent normal per element: mean [N, *E] and a std that broadcasts to it (usually [N, 1, ...])."""

    mean: Float[Tensor, "N *E"]
    std: Tensor

    @property
    def dims(self) -> int:
        """Event size D: the number of elements of one row."""
        return self.mean.shape[1:].numel()

    def sample(self, generator: torch.Generator) -> Float[Tensor, "N *E"]:
        """mean + std * noise."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def log_prob(self, x: Float[Tensor, "N *E"]) -> Float[Tensor, "N"]:
        """log N(x; mean, std^2) in nats, summed over the event, in at least float32; x is a constant.

        Raises: ValueError where std is 0, because a deterministic step has no density.
        """
        mean, std, x = _wide(self.mean), _wide(self.std), _wide(x).detach()
        _require_noise(std)
        per_element = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return per_element.flatten(1).sum(1)

    def entropy(self) -> Float[Tensor, "N"]:
        """sum(log std) + D/2 log(2 pi e), in nats."""
        std = _wide(self.std)
        _require_noise(std)
        return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).expand(self.mean.shape).flatten(1).sum(1)

    def kl(self, other: Gaussian) -> Float[Tensor, "N"]:
        """Exact KL(self || other) in nats, summed over the event.

        log(s2/s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2, elementwise. The |dt| that Flow-GRPO's code drops is
        inside std here.
        """
        std1, std2 = _wide(self.std), _wide(other.std)
        _require_noise(std1)
        _require_noise(std2)
        gap = (_wide(self.mean) - _wide(other.mean)) ** 2
        per_element = (std2 / std1).log() + (std1**2 + gap) / (2 * std2**2) - 0.5
        return per_element.flatten(1).sum(1)


def standard_normal(rows: int, event: tuple[int, ...], device: torch.device | str = "cpu") -> Gaussian:
    """The prior N(0, I) over `rows` events."""
    return Gaussian(torch.zeros(rows, *event, device=device), torch.ones(rows, *(1,) * len(event), device=device))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _require_noise(std: Tensor) -> None:
    if bool((std <= 0).any()):
        raise ValueError("a step with std 0 is deterministic and has no density; use a stochastic kernel "
                         "(DDPM, DDIM eta > 0, FlowSDE, CPS), leave the step out of the trained steps, "
                         "give the kernel a min_std, or use the matching likelihood")
