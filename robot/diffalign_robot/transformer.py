"""The transformer over the actions of a chunk, conditioned by adaLN-zero.

Legend: N rows, Ta actions of a chunk, Da action features, Do observation features, W width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign_robot.choices import ChunkTransformer
from diffalign_robot.time_features import time_features


class AdaLNBlock(nn.Module):
    """Self-attention and an MLP, each on a layer norm scaled and shifted by the condition and gated by it.

    The condition's layer starts at zero, gates included, so that an untrained block is the identity (DiT, sec. 3.2).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.heads = heads
        self.query_key_value, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = _zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Float[Tensor, "N Ta W"], condition: Float[Tensor, "N W"]) -> Float[Tensor, "N Ta W"]:
        """The tokens after the block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, 2)
        x = x + gate1 * self.attend((1 + scale1) * self.before_attention(x) + shift1)
        y: Tensor = x + gate2 * self.mlp((1 + scale2) * self.before_mlp(x) + shift2)
        return y

    def attend(self, x: Float[Tensor, "N Ta W"]) -> Float[Tensor, "N Ta W"]:
        """Multi-head self-attention over the actions of a chunk, every one with every one."""
        rows, tokens, width = x.shape
        split = self.query_key_value(x).reshape(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2])
        mixed: Tensor = self.mixed(found.transpose(1, 2).reshape(rows, tokens, width))
        return mixed


class Transformer(nn.Module):
    """(chunk, t, normalized observation) -> a chunk of predictions; every action is a token with a learned position.

    The condition is the sum of the embedded time and observation, as DiT's of time and class. The outlet starts at
    zero, so that an untrained network predicts 0.
    """

    def __init__(self, spec: ChunkTransformer, event: tuple[int, int], obs_dim: int) -> None:
        super().__init__()
        self.time_features, width = spec.time_features, spec.width
        self.time = nn.Sequential(nn.Linear(spec.time_features, width), nn.SiLU(), nn.Linear(width, width))
        self.obs = nn.Sequential(nn.Linear(obs_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.inlet = nn.Linear(event[1], width)
        self.position = nn.Parameter(0.02 * torch.randn(event[0], width))
        self.blocks = nn.ModuleList(AdaLNBlock(width, spec.heads) for _ in range(spec.blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zeroed(nn.Linear(width, 2 * width))
        self.outlet = _zeroed(nn.Linear(width, event[1]))

    def forward(self, x: Float[Tensor, "N Ta Da"], t: Float[Tensor, "N"], obs: Float[Tensor, "N Do"]
                ) -> Float[Tensor, "N Ta Da"]:
        """The prediction for every row."""
        condition = nn.functional.silu(self.time(time_features(t, self.time_features)) + self.obs(obs))
        hidden = self.inlet(x) + self.position
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, 2)
        output: Tensor = self.outlet((1 + scale) * self.norm(hidden) + shift)
        return output


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
