"""The network of DPPO's state policies, with the names that its checkpoints use.

Legend: N rows, Ta actions of a chunk, Da action features, Do observation features, F time features, C numbers of a
layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "ReLU": nn.ReLU, "ELU": nn.ELU, "GELU": nn.GELU, "Tanh": nn.Tanh, "Mish": nn.Mish, "Softplus": nn.Softplus}


class Staged(nn.Module):
    """(chunk, t, normalized observation) -> chunk by one network in the first denoising steps and another in the last.

    late: predicts at the entries below `last` of a table of `table` noise levels; early None: everywhere.
    """

    def __init__(self, early: nn.Module | None, late: nn.Module, table: int, last: int) -> None:
        super().__init__()
        self.early, self.late, self.table, self.last = early, late, table, last

    def forward(self, x: Float[Tensor, "N Ta Da"], t: Float[Tensor, "N"], obs: Float[Tensor, "N Do"]
                ) -> Float[Tensor, "N Ta Da"]:
        """The prediction; times below the first entry count as that."""
        entry = ((t.double() * self.table).round().long() - 1).clamp(min=0)
        late: Tensor = self.late(x, entry, obs)
        if self.early is None:
            return late
        return torch.where((entry < self.last)[:, None, None], late, self.early(x, entry, obs))


class StateMLP(nn.Module):
    """(chunk, table entry, normalized observation) -> chunk: `DiffusionMLP` of DPPO, from its section of a config.

    Raises: ValueError for an activation that is not known.
    """

    def __init__(self, options: Mapping[str, Any], event: tuple[int, int], obs_dim: int) -> None:
        super().__init__()
        name, width = options.get("activation_type", "Mish"), options.get("time_dim", 16)
        if name not in _ACTIVATIONS or options.get("out_activation_type", "Identity") != "Identity":
            raise ValueError(f"unknown activation {name!r} or one at the outlet; known are {sorted(_ACTIVATIONS)}")
        act, norm = _ACTIVATIONS[name], bool(options.get("use_layernorm", False))
        size = event[0] * event[1]
        self.time_embedding = nn.Sequential(Frequencies(width), nn.Linear(width, 2 * width), nn.Mish(),
                                            nn.Linear(2 * width, width))
        encoder = options.get("cond_mlp_dims")
        self.cond_mlp = Chain([obs_dim, *encoder], act, norm=False) if encoder else None
        dims = [width + size + (encoder[-1] if encoder else obs_dim), *options.get("mlp_dims", (256, 256)), size]
        self.mlp_mean = ResidualChain(dims, act, norm=norm) if options.get("residual_style") else Chain(dims, act, norm)

    def forward(self, x: Float[Tensor, "N Ta Da"], entry: Int[Tensor, "N"], obs: Float[Tensor, "N Do"]
                ) -> Float[Tensor, "N Ta Da"]:
        """The prediction."""
        seen = obs if self.cond_mlp is None else self.cond_mlp(obs)
        output: Tensor = self.mlp_mean(torch.cat([x.flatten(1), self.time_embedding(entry), seen], 1))
        return output.reshape(x.shape)


class Frequencies(nn.Module):
    """Sines, then cosines, of an entry at frequencies from 1 down to 1e-4, evenly spaced in the logarithm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, entry: Int[Tensor, "N"]) -> Float[Tensor, "N F"]:
        """[N, width]."""
        half = self.width // 2
        angles = entry[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=entry.device))
        return torch.cat([angles.sin(), angles.cos()], 1)


class Chain(nn.Module):
    """Linear layers with activations between them; norm: a layer norm before each activation."""

    def __init__(self, dims: Sequence[int], act: type[nn.Module], norm: bool) -> None:
        super().__init__()
        last = len(dims) - 2
        self.moduleList = nn.ModuleList(nn.Sequential() for _ in range(last + 1))
        for number, (layer, (before, after)) in enumerate(zip(self.moduleList, pairwise(dims), strict=True)):
            assert isinstance(layer, nn.Sequential)
            layer.add_module("linear_1", nn.Linear(before, after))
            if norm and number < last:
                layer.add_module("norm_1", nn.LayerNorm(after))
            if number < last:
                layer.add_module("act_1", act())

    def forward(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N C2"]:
        """The last layer's output."""
        for layer in self.moduleList:
            x = layer(x)
        return x


class ResidualChain(nn.Module):
    """A linear layer, residual blocks of two layers each, a linear layer."""

    def __init__(self, dims: Sequence[int], act: type[nn.Module], norm: bool) -> None:
        super().__init__()
        blocks = [Block(dims[1], act, norm) for _ in range((len(dims) - 3) // 2)]
        self.layers = nn.Sequential(nn.Linear(dims[0], dims[1]), *blocks, nn.Linear(dims[1], dims[-1]))

    def forward(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N C2"]:
        """The last layer's output."""
        output: Tensor = self.layers(x)
        return output


class Block(nn.Module):
    """x + two layers, each after its activation."""

    def __init__(self, width: int, act: type[nn.Module], norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) if norm else None for _ in range(2))
        self.l1, self.l2 = nn.Linear(width, width), nn.Linear(width, width)
        self.act = act()

    def forward(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """As many numbers as x."""
        hidden = self.l1(self.act(x if self.norm1 is None else self.norm1(x)))
        hidden = self.l2(self.act(hidden if self.norm2 is None else self.norm2(hidden)))
        output: Tensor = x + hidden
        return output
