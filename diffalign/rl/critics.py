"""State-value critics.

Legend: N rows, D observation features.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.mlp import zero_headed
from diffalign.policy.normalize import FAR, Normalizer


class ValueNet(nn.Module):
    """V(cond[key]) by a Mish MLP on normalized observations; the normalizer is saved with it.

    They are held within +-10 whatever the normalizer's limit (that of another library's policy has none).
    """

    def __init__(self, obs_dim: int, hidden: Sequence[int] = (256, 256), *, key: str = "obs",
                 normalizer: Normalizer | None = None) -> None:
        """The last layer starts at zero, so that the first advantages are the plain returns."""
        super().__init__()
        self.key = key
        self.normalizer = normalizer or Normalizer(obs_dim)
        self.net = zero_headed(obs_dim, hidden, 1, nn.Mish)

    def forward(self, cond: Cond) -> Float[Tensor, "N"]:
        """Value per row."""
        value: Tensor = self.net(self.normalizer.normalize(cond[self.key].flatten(1)).clamp(-FAR, FAR))
        return value[:, 0]
