"""The small networks beside a denoiser: value, actor, noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def zero_headed(features: int, hidden: Sequence[int], out: int, activation: type[nn.Module], *,
                layer_norm: bool = False) -> nn.Sequential:
    """An MLP from `features` to `out` numbers whose last layer is zero, so that untrained it says 0 for everything."""
    widths = [features, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if layer_norm else []), activation()]
    last = nn.Linear(widths[-1], out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
