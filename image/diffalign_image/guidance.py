"""Classifier-free guidance as a wrapper that is itself a denoiser (Ho & Salimans 2022, arXiv 2207.12598).

Legend: N rows, *E event axes.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.protocols import select_rows
from diffalign.spec import spec
from diffalign.train import sharding


@spec
class Guidance:
    """Guidance u + scale * (c - u), switched on apart for drawing images and for scoring them.

    scale: 1 is none. sampling: rollouts and evaluations are guided. likelihood: the trained density or loss is that of
    the guided prediction. Methods with a likelihood ratio (ddpo, flow_grpo, ...) need both alike; matching methods
    (awm, nft) may draw guided images and match them without guidance, which distils it into the model.
    """

    scale: float
    sampling: bool = True
    likelihood: bool = True

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive (1 is no guidance), got {self.scale}")


@runtime_checkable
class GuidesItself(Protocol):
    """A network whose pipeline combines the predictions without and with the prompt in a way of its own."""

    def guided(self, without: Float[Tensor, "N *E"], given: Float[Tensor, "N *E"], scale: float
               ) -> Float[Tensor, "N *E"]: ...


class GuidedDenoiser(nn.Module):
    """A network asked with and without the prompt, in blocks of `rows` rows so that memory does not grow with N.

    empty: the conditioning of no prompt, every leaf [1, ...], kept out of checkpoints. scale 1 asks the network once.
    Processes that share the network's weights must ask it equally often: one with fewer rows asks on, about nothing.
    """

    def __init__(self, network: nn.Module, prediction: Prediction, empty: Cond, scale: float, rows: int) -> None:
        super().__init__()
        self.network = network
        self.prediction = prediction
        self.scale = scale
        self.rows = rows
        for name, leaf in empty.items():
            self.register_buffer(f"empty_{name}", leaf, persistent=False)

    def forward(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """The guided prediction."""
        blocks = torch.arange(len(x), device=x.device).split(self.rows) if len(x) else ()
        missing = sharding.shortfall(self.network, len(blocks))
        asked = [self._ask(x[rows], t[rows], select_rows(cond, rows)) for rows in blocks]
        asked += [self._nothing(x, t, cond) for _ in range(missing)]
        return torch.cat(asked) if asked else torch.zeros_like(x)

    def _nothing(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """No row, after the network was asked about a blank one; the gradient of it is 0."""
        blank = {name: self.get_buffer(f"empty_{name}") for name in cond}
        return self._ask(x.new_zeros(1, *x.shape[1:]), t.new_full((1,), 0.5), blank)[:0]

    def _ask(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.scale == 1:
            asked: Tensor = self.network(x, t, cond)
            return asked
        both = {name: torch.cat([self._empty(name, leaf), leaf]) for name, leaf in cond.items()}
        without, given = self.network(x.repeat(2, *[1] * (x.ndim - 1)), t.repeat(2), both).chunk(2)
        if isinstance(self.network, GuidesItself):
            return self.network.guided(without, given, self.scale)
        mixed: Tensor = without + self.scale * (given - without)
        return mixed

    def _empty(self, name: str, like: Tensor) -> Tensor:
        return self.get_buffer(f"empty_{name}").expand_as(like)
