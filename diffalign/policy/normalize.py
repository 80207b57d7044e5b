"""Affine normalisation whose statistics travel in the checkpoint.

Legend: N rows, D features.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

FAR = 10.0  # standard deviations, as in Stable-Baselines3's VecNormalize


class Normalizer(nn.Module):
    """x -> (x - shift) / scale per feature, held within +-limit; the buffers are saved with the module that owns it.

    Observations need a limit: a feature that hardly moves in the demonstrations is hundreds of its standard deviations
    away once a policy explores (an object that tips over), and there a small change of weights is a large one of
    predictions, values and likelihood ratios.
    """

    shift: Tensor
    scale: Tensor
    limit: Tensor

    def __init__(self, dim: int) -> None:
        """The identity for `dim` features, without a limit, to be filled by `fit` or by a checkpoint."""
        super().__init__()
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("limit", torch.full((dim,), torch.inf))

    @classmethod
    def of(cls, shift: Float[Tensor, "D"], scale: Float[Tensor, "D"], limit: Float[Tensor, "D"] | None = None
           ) -> Normalizer:
        """The one with copies of a known shift, scale and limit (None: no limit)."""
        normalizer = cls(len(shift))
        normalizer.shift.copy_(shift)
        normalizer.scale.copy_(scale)
        if limit is not None:
            normalizer.limit.copy_(limit)
        return normalizer

    @classmethod
    def fit(cls, data: Float[Tensor, "N D"], mode: Literal["gaussian", "limits"] = "gaussian", *,
            limit: float = torch.inf) -> Normalizer:
        """Statistics of `data`: gaussian maps to mean 0 and std 1, limits maps [min, max] to [-1, 1].

        A constant feature keeps scale 1, so that it maps to 0 and back. limit: of the normalized numbers.

        Raises: ValueError on an empty or non-finite data set, naming the first bad feature.
        """
        if data.shape[0] == 0:
            raise ValueError("cannot fit a normalizer on an empty data set")
        bad = (~torch.isfinite(data)).any(0)
        if bool(bad.any()):
            raise ValueError(f"feature {int(bad.nonzero()[0])} of the data set holds non-finite values")
        low, high = data.amin(0), data.amax(0)
        if mode == "gaussian":
            shift, scale = data.mean(0), data.std(0, correction=0)
        elif mode == "limits":
            shift, scale = (low + high) / 2, (high - low) / 2
        else:
            raise ValueError(f"mode must be 'gaussian' or 'limits', got {mode!r}")
        constant = high - low <= 1e-6 * torch.maximum(high.abs(), torch.ones_like(high))
        return cls.of(shift, torch.where(constant, torch.ones_like(scale), scale), torch.full_like(scale, limit))

    def extended(self, count: int) -> Normalizer:
        """The same for features with `count` more after them, which are left as they are."""
        return self.followed_by(Normalizer(count))

    def followed_by(self, *others: Normalizer) -> Normalizer:
        """The one of these features and then those of the others."""
        parts = (self, *others)
        return Normalizer.of(*(torch.cat([getattr(part, name) for part in parts]) for name in ("shift", "scale",
                                                                                             "limit")))

    def normalize(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """(x - shift) / scale, within +-limit."""
        return ((x - self.shift) / self.scale).clamp(-self.limit, self.limit)

    def unnormalize(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """x * scale + shift: the inverse inside the limit."""
        return x * self.scale + self.shift
