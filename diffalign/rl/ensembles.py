"""Ensembles of state-action values, evaluated as one batched product.

Legend: K critics, N rows, m candidates of a row, D observation features, *E event axes of E numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.normalize import Normalizer
from diffalign.policy.protocols import repeat_rows


class _Linear(nn.Module):
    """K linear maps, each initialized as torch.nn.Linear is."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "K N I"]) -> Float[Tensor, "K N O"]:
        return torch.baddbmm(self.bias, x, self.weight)


class _Norm(nn.Module):
    """LayerNorm with its own scale and shift per head (without it off-policy critics diverge: RLPD, ResFiT)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(heads, 1, width)), nn.Parameter(torch.zeros(heads, 1, width))

    def forward(self, x: Float[Tensor, "K N W"]) -> Float[Tensor, "K N W"]:
        return torch.addcmul(self.shift, nn.functional.layer_norm(x, x.shape[-1:]), self.scale)


class QEnsemble(nn.Module):
    """K values Q(cond[key], action) by MLPs with LayerNorm; without `event`, K state values V(cond[key]).

    Observations go through the normalizer, which is saved with the module; actions are taken as they are.
    """

    def __init__(self, heads: int, event: tuple[int, ...], obs_dim: int, hidden: Sequence[int] = (256, 256), *,
                 key: str = "obs", normalizer: Normalizer | None = None) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"an ensemble needs at least one head, got {heads}")
        self.heads, self.key = heads, key
        self.normalizer = normalizer or Normalizer(obs_dim)
        widths = [obs_dim + (math.prod(event) if event else 0), *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [_Linear(heads, before, after), _Norm(heads, after), nn.ReLU()]
        self.net = nn.Sequential(*layers, _Linear(heads, widths[-1], 1))

    def forward(self, cond: Cond, action: Float[Tensor, "N *E"] | None = None) -> Float[Tensor, "K N"]:
        """One value per head and row."""
        features = self.normalizer.normalize(cond[self.key].flatten(1))
        if action is not None:
            features = torch.cat([features, action.flatten(1)], 1)
        value: Tensor = self.net(features.expand(self.heads, *features.shape))
        return value[..., 0]

    def score(self, cond: Cond, candidates: Float[Tensor, "N m *E"]) -> Float[Tensor, "K N m"]:
        """One value per head and candidate."""
        count = candidates.shape[1]
        values: Tensor = self(repeat_rows(cond, count), candidates.flatten(0, 1))
        return values.reshape(self.heads, -1, count)


def pessimistic(values: Float[Tensor, "K *B"], pair: int, generator: torch.Generator) -> Float[Tensor, "*B"]:
    """The minimum over `pair` heads drawn anew at every call (REDQ, RLPD); all heads where pair >= K."""
    if pair >= values.shape[0]:
        return values.amin(0)
    heads = torch.randperm(values.shape[0], generator=generator, device=values.device)[:pair]
    return values[heads].amin(0)


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """|expectile - 1[error < 0]| error^2, error = target - prediction (IQL, eq. 5)."""
    weight = torch.where(error < 0, 1 - expectile, expectile)
    return weight * error**2


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Move the target's parameters towards the source's by `rate` (Polyak)."""
    for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
        slow.lerp_(fast, rate)
