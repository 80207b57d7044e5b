"""A reference penalty whose strength follows the measured distance to the reference.

Schulman et al. 2017 (PPO), sec. 4: the coefficient doubles where the distance is above 1.5 times its target, and halves
where it is below the target / 1.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffalign.train.pieces import OnPolicy
from diffalign.train.state import TrainState

_KEY = "reference_scale"  # in the state's counters, so that a resumed run goes on with it
_MOST = 2.0**10


def penalized(pieces: OnPolicy, state: TrainState) -> OnPolicy:
    """The pieces with reference_kl and reference_velocity times the state's scale."""
    scale = state.counters.get(_KEY, 1.0)
    return replace(pieces, reference_kl=scale * pieces.reference_kl,
                   reference_velocity=scale * pieces.reference_velocity)


def adapt(pieces: OnPolicy, state: TrainState, metrics: Mapping[str, float]) -> dict[str, float]:
    """Update the scale from the penalty that was measured, within 2^-10 .. 2^10; the metric that shows it.

    The penalty is kl/reference in nats a trained step, or without reference_kl velocity/reference.
    """
    measured = metrics.get("kl/reference" if pieces.reference_kl else "velocity/reference")
    target = pieces.reference_target
    if target is None or measured is None:
        return {}
    scale = state.counters.get(_KEY, 1.0)
    if measured > 1.5 * target:
        scale = min(2 * scale, _MOST)
    elif measured < target / 1.5:
        scale = max(scale / 2, 1 / _MOST)
    state.counters[_KEY] = scale
    return {_KEY: scale}
