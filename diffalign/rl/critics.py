"""State-value critics.

Legend: N rows, D observation features.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.mlp import zero_headed
from diffalign.policy.normalize import Normalizer

_FAR = 10.0  # standard deviations, as in Stable-Baselines3's VecNormalize


class ValueNet(nn.Module):
    """V(cond[key]) by a Mish MLP on normalized observations, held within +-10; the normalizer is saved with it.

    A feature that hardly moves in the demonstrations is hundreds of its standard deviations away once a policy explores
    (an object that tips over), and one such row would move the values of all the others.
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
        value: Tensor = self.net(self.normalizer.normalize(cond[self.key].flatten(1)).clamp(-_FAR, _FAR))
        return value[:, 0]
