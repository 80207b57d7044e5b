"""Confidence intervals for what evaluations report."""

from __future__ import annotations

import math
from collections.abc import Sequence

# 97.5 % quantiles of Student's t for 1..30 degrees of freedom; beyond, Cornish-Fisher is exact to 2e-4.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
      2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
_Z = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate (Wilson 1927)."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"need 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    p = successes / trials
    centre = p + _Z**2 / (2 * trials)
    half = _Z * math.sqrt(p * (1 - p) / trials + _Z**2 / (4 * trials**2))
    scale = 1 + _Z**2 / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % Student-t interval of a mean."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    df = n - 1
    expansion = _Z + (_Z**3 + _Z) / (4 * df) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * df**2)
    quantile = _T[df - 1] if df <= len(_T) else expansion
    half = quantile * math.sqrt(variance / n)
    return mean, mean - half, mean + half
