"""Improvement operators: how a critic, and mostly a small actor, change what a frozen base policy does.

All of them approximate the base policy tilted by a function of the advantage; they differ in where the change lives:
    OnNoise     w = box * actor(s), then the base's ODE from w                     DSRL (arXiv 2506.15799)
    OnActions   clip(a + scale * actor(s, a)), a from the base                     ResFiT (2509.19301)
                argmax Q of {a_i} and {clip(a_i + scale * actor(s, a_i))}          EXPO (2507.07986)
                argmax Q of {a_i}                                                  IDQL (2304.10573), V-GPS (2410.13816)

Legend: N rows, n base samples of a row, m scored candidates of a row, *E event axes of E numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.gaussian import standard_normal
from diffalign.diffusion.kernels import ODE
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.actors import BoundedActor
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import BasePolicy, num_rows, repeat_rows
from diffalign.spec import spec


@dataclass(frozen=True)
class Candidates:
    """What the critic scores, and the log-density in nats of the actor's output behind it (0 where it had no part).

    The density is that of u in (-1, 1)^E, not of box * u or scale * u: an entropy target then means the same for every
    scale (in units of a box of 0.05 a target of -E / 2 could not be reached).
    """

    value: Float[Tensor, "N m *E"]
    log_prob: Float[Tensor, "N m"]


@runtime_checkable
class Operator(Protocol):
    """A spec of an improvement.

    needs_actor: it trains one; takes_action: that actor reads a base action. scores_actions: the critic sees executed
    actions (so that demonstrations can be used), not noise. distills: the actor moves in another space than the
    critic scores, and needs a second critic there.
    """

    @property
    def needs_actor(self) -> bool: ...
    @property
    def takes_action(self) -> bool: ...
    @property
    def scores_actions(self) -> bool: ...
    @property
    def distills(self) -> bool: ...
    def ask(self, base: BasePolicy, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """What the base says at a state, to be remembered with the decision; every leaf [N, ...]."""
        ...

    def fallback(self, base: BasePolicy, cond: Cond, signals: Cond, *, generator: torch.Generator) -> Candidates:
        """The base's own behaviour as one candidate (m = 1), for warm-up."""
        ...

    def candidates(self, base: BasePolicy, actor: BoundedActor | None, cond: Cond, signals: Cond, *,
                   generator: torch.Generator | None) -> Candidates:
        """What may be done; without a generator with the actor's mean."""
        ...

    def moves(self, actor: BoundedActor, cond: Cond, signals: Cond, *, generator: torch.Generator) -> Candidates:
        """The candidates through which the actor is trained, with gradient."""
        ...

    def execute(self, base: BasePolicy, cond: Cond, chosen: Float[Tensor, "N *E"]) -> Float[Tensor, "N *E"]:
        """The action of a chosen candidate."""
        ...


@spec
class OnNoise:
    """The base's initial noise is the action: its chain is run by the ODE from w in [-box, box]^E (DSRL).

    scores = noise: the critic sees w (DSRL-SAC). actions: it sees the denoised action, and a second critic on w is
    regressed on it (DSRL-NA, noise aliasing), so that data without noise, demonstrations, can be used. steps: of the
    ODE, null for as many as the base's; every update of the noise-aliased variant runs the chain twice.
    """

    type: Literal["noise"] = "noise"
    box: float = 1.5
    scores: Literal["noise", "actions"] = "noise"
    steps: int | None = None
    needs_actor = True
    takes_action = False

    def __post_init__(self) -> None:
        if not self.box > 0:
            raise ValueError(f"box must be positive, got {self.box}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1 or null, got {self.steps}")

    @property
    def scores_actions(self) -> bool:
        """Whether the critic sees executed actions."""
        return self.scores == "actions"

    @property
    def distills(self) -> bool:
        """Whether a noise critic is learned from the action critic."""
        return self.scores_actions

    def ask(self, base: BasePolicy, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing: the base is a function of w."""
        return {}

    def fallback(self, base: BasePolicy, cond: Cond, signals: Cond, *, generator: torch.Generator) -> Candidates:
        """w from N(0, I), clipped to the box."""
        return _single(self._seen(base, cond, self.prior(base, cond, generator)))

    def candidates(self, base: BasePolicy, actor: BoundedActor | None, cond: Cond, signals: Cond, *,
                   generator: torch.Generator | None) -> Candidates:
        """One: the actor's noise, or the action that it denoises to."""
        w, log_prob = self._draw(_need(actor), cond, generator)
        return _single(self._seen(base, cond, w), log_prob)

    def moves(self, actor: BoundedActor, cond: Cond, signals: Cond, *, generator: torch.Generator) -> Candidates:
        """The actor's noise."""
        return _single(*self._draw(actor, cond, generator))

    def execute(self, base: BasePolicy, cond: Cond, chosen: Float[Tensor, "N *E"]) -> Float[Tensor, "N *E"]:
        """The end of the ODE from the chosen noise."""
        return chosen if self.scores_actions else self.denoise(base, cond, chosen)

    def prior(self, base: BasePolicy, cond: Cond, generator: torch.Generator) -> Float[Tensor, "N *E"]:
        """A draw of N(0, I) clipped to the box."""
        device = next(iter(cond.values())).device
        return standard_normal(num_rows(cond), base.event, device).sample(generator).clamp(-self.box, self.box)

    def denoise(self, base: BasePolicy, cond: Cond, w: Float[Tensor, "N *E"]) -> Float[Tensor, "N *E"]:
        """The base's deterministic chain from w; no gradient flows through it."""
        if not isinstance(base, DiffusionPolicy):
            raise ValueError(f"only a denoising chain can be steered by its noise, got a {type(base).__name__}; use "
                             "residual, expo or rerank, or decide once a chunk")
        unused = torch.Generator(w.device)
        schedule = base.schedule if self.steps is None else replace(base.schedule, steps=self.steps)
        return base.with_sampler(ODE(), schedule).act(cond, generator=unused, noise=w.detach()).action

    def _draw(self, actor: BoundedActor, cond: Cond, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        u, log_prob = actor(cond, None, generator=generator)
        return self.box * u, log_prob

    def _seen(self, base: BasePolicy, cond: Cond, w: Tensor) -> Tensor:
        return self.denoise(base, cond, w) if self.scores_actions else w


@spec
class OnActions:
    """n samples of the base, each with a bounded correction: a residual, an edit, or (scale None) neither.

    samples = 1 with keep_base False is a residual policy; n samples beside their corrections, the best of the 2n by
    the critic in acting and in the backup, are EXPO's on-the-fly policy; scale None is best-of-n re-ranking, at most
    log n - (n - 1) / n nats from the base. The base samples are remembered with the state: drawn again in the backup
    they would not be the action that the actor sees next (residual) and would cost n chains a row.
    """

    type: Literal["actions"] = "actions"
    samples: int = 1
    scale: float | None = 0.1
    keep_base: bool = False
    takes_action = True
    scores_actions = True
    distills = False

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale <= 2:
            raise ValueError(f"scale must lie in (0, 2] (actions are normalized to [-1, 1]) or be None, "
                             f"got {self.scale}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.scale is None and (self.samples < 2 or not self.keep_base):
            raise ValueError("without a correction (scale None) there must be base samples to choose from: "
                             f"samples >= 2 and keep_base true, got {self.samples} and {self.keep_base}")

    @property
    def needs_actor(self) -> bool:
        """Whether there are corrections."""
        return self.scale is not None

    def ask(self, base: BasePolicy, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """base [N, n, *E]: the base's actions here."""
        action = base.act(repeat_rows(cond, self.samples), generator=generator).action
        return {"base": action.reshape(-1, self.samples, *action.shape[1:])}

    def fallback(self, base: BasePolicy, cond: Cond, signals: Cond, *, generator: torch.Generator) -> Candidates:
        """The first base sample."""
        return _single(signals["base"][:, 0])

    def candidates(self, base: BasePolicy, actor: BoundedActor | None, cond: Cond, signals: Cond, *,
                   generator: torch.Generator | None) -> Candidates:
        """The base samples where they are kept, then their corrections."""
        samples = signals["base"]
        kept = Candidates(samples, samples.new_zeros(samples.shape[:2]))
        if self.scale is None:
            return kept
        moved = self._corrected(_need(actor), cond, samples, generator)
        if not self.keep_base:
            return moved
        return Candidates(torch.cat([kept.value, moved.value], 1), torch.cat([kept.log_prob, moved.log_prob], 1))

    def moves(self, actor: BoundedActor, cond: Cond, signals: Cond, *, generator: torch.Generator) -> Candidates:
        """The corrections of all base samples."""
        return self._corrected(actor, cond, signals["base"], generator)

    def execute(self, base: BasePolicy, cond: Cond, chosen: Float[Tensor, "N *E"]) -> Float[Tensor, "N *E"]:
        """The candidate itself."""
        return chosen

    def _corrected(self, actor: BoundedActor, cond: Cond, samples: Float[Tensor, "N n *E"],
                   generator: torch.Generator | None) -> Candidates:
        if self.scale is None:
            raise ValueError("scale is None: there are no corrections to train")
        u, log_prob = actor(repeat_rows(cond, samples.shape[1]), samples.flatten(0, 1), generator=generator)
        value = (samples + self.scale * u.reshape(samples.shape)).clamp(-1, 1)
        return Candidates(value, log_prob.reshape(samples.shape[:2]))


def _single(value: Float[Tensor, "N *E"], log_prob: Float[Tensor, "N"] | None = None) -> Candidates:
    return Candidates(value[:, None], value.new_zeros(value.shape[0], 1) if log_prob is None else log_prob[:, None])


def _need(actor: BoundedActor | None) -> BoundedActor:
    if actor is None:
        raise ValueError("this operator needs an actor, got None")
    return actor
