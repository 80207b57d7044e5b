"""Preference surrogates on differences of denoising losses.

Legend: M pairs. e is the denoising loss of a sample, its mean over the event, at a noise and time shared by all four
terms of a pair; d = e_policy - e_reference, so that -d is the policy's gain in log-likelihood in units of 2 / D nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Anchor = Literal["off", "per_sample"]
Errors = tuple[Float[Tensor, "M"], Float[Tensor, "M"]]


def preference_loss(winner: Errors, other: Errors, *, beta: float, anchor: Anchor = "off") -> Float[Tensor, "M"]:
    """-log sigmoid(-beta / 2 (d_winner - g d_other)); winner and other are (policy's e, reference's e).

    g = 1 is Diffusion-DPO (Wallace et al. 2023, eq. 14; beta as in their code, per mean squared error; the summed error
    in nats has beta / (2 D)). anchor per_sample is SePPO's flipper (arXiv 2410.05255): g = -1 where the reference is
    better on the winner than the policy, so that its sample is no loser and is learned from as well. No gradient flows
    through g; at equality g = 1.
    """
    (new, held), (new_other, held_other) = winner, other
    gain, gain_other = held - new, held_other - new_other
    sign = torch.ones_like(gain)
    if anchor == "per_sample":
        sign = torch.where(gain.detach() < 0, -1.0, 1.0)
    return -torch.nn.functional.logsigmoid(0.5 * beta * (gain - sign * gain_other))
