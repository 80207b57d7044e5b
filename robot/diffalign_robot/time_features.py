"""Sinusoidal features of path time, the same for every chunk network.

Legend: N rows, F features.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def time_features(t: Float[Tensor, "N"], count: int) -> Float[Tensor, "N F"]:
    """sin and cos of 100 t at count / 2 rates from 1 down to 1/1000 (t in [0, 1])."""
    half = count // 2
    rates = torch.exp(-math.log(1000) * torch.arange(half, device=t.device) / (half - 1))
    angle = 100 * t[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], 1)
