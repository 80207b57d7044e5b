"""A U-Net of another program, told the times of our path as the entries of its noise table.

Legend: N rows, n observations of a history, Do observation features, Ta actions of the horizon, Da action features.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import VPPath


class TableUNet(nn.Module):
    """(chunk, t, normalized observations) -> chunk by a U-Net that is told the entry of its noise table, from 0.

    offset: what is taken from the normalized observations, 1 where they come as 0 to 2. (The middle of a narrow range
    far from 0, rounded to float32, is off by a good part of the range; its lower end is not.)
    """

    offset: Tensor

    def __init__(self, unet: nn.Module, path: VPPath, offset: Float[Tensor, "nDo"]) -> None:
        super().__init__()
        self.unet, self.path = unet, path
        self.register_buffer("offset", offset)

    def forward(self, x: Float[Tensor, "N Ta Da"], t: Float[Tensor, "N"], obs: Float[Tensor, "N Do"]
                ) -> Float[Tensor, "N Ta Da"]:
        """The prediction; times below the first entry (the table has none for clean data) count as that."""
        output: Tensor = self.unet(x, (self.path.index(t) - 1).clamp(min=0), global_cond=obs - self.offset)
        return output
