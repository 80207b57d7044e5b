"""The residual MLP over a flattened chunk.

Legend: N rows, Ta actions of a chunk, Da action features, Do observation features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign_robot.choices import ChunkMLP
from diffalign_robot.time_features import time_features


class MLPNet(nn.Module):
    """(chunk, t, normalized observation) -> a chunk of predictions, by residual blocks on the flattened chunk."""

    def __init__(self, spec: ChunkMLP, event: tuple[int, int], obs_dim: int) -> None:
        super().__init__()
        self.time_features = spec.time_features
        size, width = event[0] * event[1], spec.width
        self.time = nn.Sequential(nn.Linear(spec.time_features, 2 * spec.time_features), nn.Mish(),
                                  nn.Linear(2 * spec.time_features, spec.time_features))
        self.inlet = nn.Linear(size + spec.time_features + obs_dim, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Mish(), nn.Linear(width, width), nn.Mish(),
                                                  nn.Linear(width, width)) for _ in range(spec.blocks))
        self.outlet = nn.Sequential(nn.Mish(), nn.Linear(width, size))

    def forward(self, x: Float[Tensor, "N Ta Da"], t: Float[Tensor, "N"], obs: Float[Tensor, "N Do"]
                ) -> Float[Tensor, "N Ta Da"]:
        """The prediction for every row."""
        time = self.time(time_features(t, self.time_features))
        hidden = self.inlet(torch.cat([x.flatten(1), time, obs], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        output: Tensor = self.outlet(hidden)
        return output.reshape(x.shape)
