"""Penalties that hold a policy near an anchor, one number per row.

Legend: M rows, *E event axes.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from diffalign.rl.likelihoods import Scored


def reference_kl(new: Scored, anchor: Scored) -> Float[Tensor, "M"]:
    """Exact KL(new || anchor) of the Gaussian step, in nats summed over the event.

    Raises: ValueError without a density (a sampled KL would be biased; see image_methods I1).
    """
    if new.gaussian is None or anchor.gaussian is None:
        raise ValueError("reference_kl needs Gaussian steps, but the matching likelihood has no density; "
                         "set reference_kl to 0 and use reference_velocity")
    return new.gaussian.kl(anchor.gaussian)


def velocity_mse(new: Scored, anchor: Scored) -> Float[Tensor, "M"]:
    """Mean over the event of (v_new - v_anchor)^2 with v = eps - x0; works for any kernel, the ODE included."""
    return ((new.velocity - anchor.velocity) ** 2).flatten(1).mean(1)
