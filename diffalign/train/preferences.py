"""The preference loop: winners against samples of earlier policies, or against given losers; no reward.

It is supervised regression (`regress`) on a loss that draws its own opponents. Past policies live in
state.statistics, so that a checkpoint holds them.

Legend: N pairs, *E event axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser
from diffalign.rl.preferences import Anchor, preference_loss
from diffalign.spec import spec
from diffalign.train.state import Iteration, TrainState, frozen_copy
from diffalign.train.supervised import Metrics, Pretraining, denoising_loss, draw_times, regress

_PREFIX = "history/"


@dataclass(frozen=True)
class Pairs:
    """Winners with their conditions and, where they were given, the losers."""

    winner: Float[Tensor, "N *E"]
    loser: Float[Tensor, "N *E"] | None
    cond: Cond


@spec
class Preference:
    """How a preference algorithm learns; the algorithm specs build it.

    opponent: `sampled` draws the other side from the reference policy, `given` takes the data's losers. reference:
    which past policy: the `initial` one, the `latest` snapshot or a `random` one of the history (SePPO). A snapshot is
    taken every snapshot_every steps; the first and the newest history - 1 are kept. anchor: see preference_loss.
    """

    fitting: Pretraining
    beta: float
    opponent: Literal["sampled", "given"]
    reference: Literal["initial", "latest", "random"] = "initial"
    anchor: Anchor = "off"
    snapshot_every: int = 100
    history: int = 5

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.snapshot_every < 1 or self.history < 2:
            raise ValueError("need snapshot_every >= 1 and history >= 2 (the first policy and one more), got "
                             f"{self.snapshot_every} and {self.history}")


class History:
    """Past weights of the policy by the step at which they were taken."""

    def __init__(self, state: TrainState, limit: int) -> None:
        self.state, self.limit = state, limit

    def steps(self) -> list[int]:
        """The steps of the kept snapshots, oldest first."""
        return sorted({int(name.split("/")[1]) for name in self.state.statistics if name.startswith(_PREFIX)})

    def keep(self) -> None:
        """Take a snapshot of the policy now; of too many the second oldest goes, the first policy stays."""
        module = self.state.modules["policy"]
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.state.statistics[f"{_PREFIX}{self.state.step:08d}/{name}"] = parameter.detach().clone()
        while len(self.steps()) > self.limit:
            gone = f"{_PREFIX}{self.steps()[1]:08d}/"
            for name in [name for name in self.state.statistics if name.startswith(gone)]:
                del self.state.statistics[name]

    def pick(self, which: Literal["initial", "latest", "random"], generator: torch.Generator) -> int:
        """The step of the chosen snapshot."""
        steps = self.steps()
        if which == "random":
            return steps[int(torch.randint(len(steps), (1,), generator=generator).item())]
        return steps[0] if which == "initial" else steps[-1]

    @torch.no_grad()
    def load(self, step: int, module: nn.Module) -> None:
        """Write a snapshot into a copy of the policy."""
        for name, parameter in module.named_parameters():
            key = f"{_PREFIX}{step:08d}/{name}"
            if key in self.state.statistics:
                parameter.copy_(self.state.statistics[key])


def prefer(pieces: Preference, policy: DiffusionPolicy, pairs: Callable[[torch.Generator], Pairs], state: TrainState
           ) -> Iterator[Iteration]:
    """Train state.modules["policy"] (the policy's denoiser) and yield after every step up to pieces.fitting.steps.

    Metrics: `gain/winner` and `gain/other`, how much lower the policy's denoising loss is than the reference's, and
    `behind`, the share of winners that the reference fits better: those whose opponents the anchor flips.

    Raises: ValueError if losers are missing; NonFinite.
    """
    history = History(state, pieces.history)
    if not history.steps():
        history.keep()
    frozen = frozen_copy(state.modules["policy"])
    reference = replace(policy, denoiser=cast(Denoiser, frozen))

    def loss(generator: torch.Generator) -> tuple[Tensor, Metrics]:
        batch = pairs(generator)
        history.load(history.pick(pieces.reference, generator), frozen)
        other = batch.loser
        if pieces.opponent == "sampled":
            other = reference.act(batch.cond, generator=generator).action
        if other is None:
            raise ValueError("opponent: given needs losers beside the winners; this data has none, use sampled (SePPO)")
        rows = len(batch.winner)
        t = draw_times(pieces.fitting, policy, rows, generator)
        eps = torch.randn(batch.winner.shape, generator=generator, device=batch.winner.device)

        def errors(x0: Tensor) -> tuple[Tensor, Tensor]:
            """The policy's and the reference's loss on the same noise and time."""
            with torch.no_grad():
                held = denoising_loss(reference, x0, batch.cond, t, eps)
            return denoising_loss(policy, x0, batch.cond, t, eps), held

        won, lost = errors(batch.winner), errors(other)
        gain, gain_other = (held - new.detach() for new, held in (won, lost))
        metrics = {"gain/winner": float(gain.mean()), "gain/other": float(gain_other.mean()),
                   "behind": float((gain < 0).float().mean())}
        return preference_loss(won, lost, beta=pieces.beta, anchor=pieces.anchor).mean(), metrics

    for iteration in regress(pieces.fitting, loss, state):
        if state.step % pieces.snapshot_every == 0:
            history.keep()
        yield iteration
