"""What one call of the sampler leaves behind.

Legend: N rows, K denoising steps, *E event axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

Cond = Mapping[str, Tensor]  # conditioning; every leaf is [N, ...]


@dataclass(frozen=True)
class DenoisingTrajectory:
    """One denoising chain per row: k = 0 is noise, k = K is the sample.

    `log_prob`, `mean` and `std` are zero on steps outside `trained`; `std` is per row and step.
    """

    x: Float[Tensor, "N K1 *E"]
    times: Float[Tensor, "K1"]
    trained: Bool[Tensor, "K"]
    log_prob: Float[Tensor, "N K"]
    mean: Float[Tensor, "N K *E"]
    std: Float[Tensor, "N K"]
    cond: Cond

    @property
    def sample(self) -> Float[Tensor, "N *E"]:
        """The clean end of the chain."""
        return self.x[:, -1]
