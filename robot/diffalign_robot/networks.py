"""Denoisers of action chunks.

Legend: N rows, Ta actions of a chunk, Da action features, Do observation features.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.normalize import Normalizer
from diffalign_robot.choices import ChunkMLP


class ChunkDenoiser(nn.Module):
    """Predicts eps of a normalized chunk from (chunk, time, observation).

    Both normalizers are buffers of this module, so that a checkpoint is complete: observations are normalized inside
    forward, `action_normalizer.unnormalize` turns a sampled chunk into robot units.
    """

    prediction: Prediction = "eps"

    def __init__(self, spec: ChunkMLP, chunk: int, observations: Normalizer, actions: Normalizer) -> None:
        super().__init__()
        self.observation_normalizer, self.action_normalizer = observations, actions
        self.event = (chunk, len(actions.shift))
        self.time_features = spec.time_features
        size, width = chunk * len(actions.shift), spec.width
        self.time = nn.Sequential(nn.Linear(spec.time_features, 2 * spec.time_features), nn.Mish(),
                                  nn.Linear(2 * spec.time_features, spec.time_features))
        self.inlet = nn.Linear(size + spec.time_features + len(observations.shift), width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Mish(), nn.Linear(width, width), nn.Mish(),
                                                  nn.Linear(width, width)) for _ in range(spec.blocks))
        self.outlet = nn.Sequential(nn.Mish(), nn.Linear(width, size))

    def forward(self, x: Float[Tensor, "N Ta Da"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Ta Da"]:
        """eps at path time t."""
        half = self.time_features // 2
        rates = torch.exp(-math.log(1000) * torch.arange(half, device=x.device) / (half - 1))
        angle = 100 * t[:, None] * rates
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        obs = self.observation_normalizer.normalize(cond["obs"])
        hidden = self.inlet(torch.cat([x.flatten(1), time, obs], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        output: Tensor = self.outlet(hidden)
        return output.reshape(x.shape)
