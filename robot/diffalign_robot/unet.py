"""The 1-D U-Net over the actions of a chunk, conditioned by FiLM.

Legend: N rows, Ta actions of a chunk, Da action features, Do observation features, C channels, F condition features.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign_robot.choices import ChunkUNet
from diffalign_robot.time_features import time_features


class FiLMBlock(nn.Module):
    """conv - group norm - Mish, twice, around scale * h + shift from the condition (FiLM), plus a skip."""

    def __init__(self, before: int, after: int, features: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv1d(channels, after, kernel, padding=kernel // 2), nn.GroupNorm(groups, after),
                          nn.Mish())
            for channels in (before, after))
        self.film = nn.Sequential(nn.Mish(), nn.Linear(features, 2 * after))
        self.skip = nn.Conv1d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Float[Tensor, "N C T"], condition: Float[Tensor, "N F"]) -> Float[Tensor, "N C2 T"]:
        """The block's output, as long as x."""
        scale, shift = self.film(condition)[..., None].chunk(2, 1)
        hidden: Tensor = self.second((1 + scale) * self.first(x) + shift)
        skipped: Tensor = self.skip(x)
        return hidden + skipped


class UNet(nn.Module):
    """(chunk, t, normalized observation) -> a chunk of predictions (Diffusion Policy, arXiv 2303.04137, sec. 4.1).

    Departures from the public code: one block a level instead of two; the scale is 1 + the network's output, so that
    conditioning starts near the identity; upsampling repeats neighbours to the length of the skip, so that any chunk
    length works (theirs must be divisible by 2 per level).
    """

    def __init__(self, spec: ChunkUNet, event: tuple[int, int], obs_dim: int) -> None:
        super().__init__()
        self.time_features = spec.time_features
        features, widths = 4 * spec.time_features, spec.widths
        self.time = nn.Sequential(nn.Linear(spec.time_features, features), nn.Mish(), nn.Linear(features, features))
        self.obs = nn.Linear(obs_dim, features)

        def block(before: int, after: int) -> FiLMBlock:
            return FiLMBlock(before, after, features, spec.kernel, spec.groups)

        self.down = nn.ModuleList(block(before, after) for before, after in pairwise((event[1], *widths)))
        self.shrink = nn.ModuleList(nn.Conv1d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = block(widths[-1], widths[-1])
        self.grow = nn.ModuleList(nn.Conv1d(below, width, 3, padding=1) for width, below in pairwise(widths))
        self.up = nn.ModuleList(block(2 * width, width) for width in widths)
        self.outlet = nn.Conv1d(widths[0], event[1], 1)

    def forward(self, x: Float[Tensor, "N Ta Da"], t: Float[Tensor, "N"], obs: Float[Tensor, "N Do"]
                ) -> Float[Tensor, "N Ta Da"]:
        """The prediction for every row."""
        condition = self.time(time_features(t, self.time_features)) + self.obs(obs)
        hidden, skips = x.transpose(1, 2), []
        for level, block in enumerate(self.down):
            hidden = block(hidden, condition)
            skips.append(hidden)
            if level < len(self.shrink):
                hidden = self.shrink[level](hidden)
        hidden = self.middle(hidden, condition)
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                repeated = nn.functional.interpolate(hidden, size=skips[level].shape[2])
                hidden = self.grow[level](repeated)
            hidden = self.up[level](torch.cat([hidden, skips[level]], 1), condition)
        output: Tensor = self.outlet(hidden)
        return output.transpose(1, 2)
