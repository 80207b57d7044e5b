"""A bounded Gaussian head: the small trainable part of steered, residual and edited policies.

Legend: N rows, D observation features, *E event axes of E numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.mlp import zero_headed
from diffalign.policy.normalize import Normalizer

_LOG_STD = (-5.0, 1.0)


class BoundedActor(nn.Module):
    """u = tanh(mean + std z) in (-1, 1)^E from the observation and, with takes_action, a base action.

    std: a fixed value (TD3's smoothed deterministic actor), or None to learn it (SAC). The last layer starts at zero:
    without noise the output is exactly 0, so a residual starts as the base policy.
    """

    def __init__(self, event: tuple[int, ...], obs_dim: int, hidden: Sequence[int] = (256, 256), *,
                 takes_action: bool, std: float | None = None, key: str = "obs", normalizer: Normalizer | None = None
                 ) -> None:
        super().__init__()
        if std is not None and not std > 0:
            raise ValueError(f"std must be positive (or None to learn it), got {std}")
        self.event, self.key, self.std, self.takes_action = event, key, std, takes_action
        self.normalizer = normalizer or Normalizer(obs_dim)
        size = math.prod(event)
        self.net = zero_headed(obs_dim + (size if takes_action else 0), hidden, size if std is not None else 2 * size,
                               nn.ReLU, layer_norm=True)

    def forward(self, cond: Cond, action: Float[Tensor, "N *E"] | None, *, generator: torch.Generator | None
                ) -> tuple[Float[Tensor, "N *E"], Float[Tensor, "N"]]:
        """(u, log-density of u in nats); without a generator u = tanh(mean) and the density is that of u's mean."""
        features = self.normalizer.normalize(cond[self.key].flatten(1))
        if self.takes_action:
            if action is None:
                raise ValueError("this actor corrects a base action and got none")
            features = torch.cat([features, action.flatten(1)], 1)
        mean, log_std = self._moments(self.net(features))
        noise = torch.zeros_like(mean)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        before = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - before - nn.functional.softplus(-2 * before))  # log(1 - tanh^2), stable
        return before.tanh().reshape(-1, *self.event), (log_normal - log_slope).sum(1)

    def _moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        if self.std is not None:
            return output, torch.full_like(output, math.log(self.std))
        mean, raw = output.chunk(2, 1)
        low, high = _LOG_STD
        return mean, low + (high - low) * (raw.tanh() + 1) / 2
