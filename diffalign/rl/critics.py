"""State-value critics.

Legend: N rows, D observation features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.normalize import Normalizer


class ValueNet(nn.Module):
    """V(cond[key]) by a Mish MLP on normalized observations; the normalizer is saved with it."""

    def __init__(self, obs_dim: int, hidden: Sequence[int] = (256, 256), *, key: str = "obs",
                 normalizer: Normalizer | None = None) -> None:
        """The last layer starts at zero, so that the first advantages are the plain returns."""
        super().__init__()
        self.key = key
        self.normalizer = normalizer or Normalizer(obs_dim)
        widths = [obs_dim, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.Mish()]
        last = nn.Linear(widths[-1], 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last)

    def forward(self, cond: Cond) -> Float[Tensor, "N"]:
        """Value per row."""
        value: Tensor = self.net(self.normalizer.normalize(cond[self.key].flatten(1)))
        return value[:, 0]
