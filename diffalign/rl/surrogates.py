"""Policy surrogates on a log-likelihood ratio, with trust regions in nats.

Every surrogate returns one loss per row whose gradient at ratio 1 is -A grad log p, whatever its unit.
Legend: M rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign.rl.likelihoods import Rows, Scored, Signal
from diffalign.spec import spec

Unit = Literal["nats", "per_dim"]


@dataclass(frozen=True)
class SurrogateLoss:
    """Loss per row, and which rows are held by the trust region from below and from above."""

    loss: Float[Tensor, "M"]
    held_low: Bool[Tensor, "M"]
    held_high: Bool[Tensor, "M"]


@runtime_checkable
class Surrogate(Protocol):
    """A spec: (policy's scores, rows) -> loss per row."""

    @property
    def needs(self) -> Signal | None: ...
    @property
    def selective(self) -> bool:
        """Whether rows of zero advantage have no loss and are left out before anything is computed for them."""
        ...

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss: ...


def tempered(log_ratio: Float[Tensor, "M"], unit: Unit, dims: int) -> tuple[Float[Tensor, "M"], float]:
    """(ratio, scale): exp(log_ratio) and 1 in nats; exp(log_ratio / D), as published, and D per_dim.

    A loss times the scale has at ratio 1 the gradient of the joint ratio.
    """
    if unit == "nats":
        return log_ratio.exp(), 1.0
    return (log_ratio / dims).exp(), float(dims)


def bounds(low: Tensor, high: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """Ratio limits: [exp(-low), exp(high)] in nats, the authors' [1 - low, 1 + high] per_dim."""
    return ((-low).exp(), high.exp()) if unit == "nats" else (1 - low, 1 + high)


def clipped(ratio: Float[Tensor, "M"], advantage: Float[Tensor, "M"], low: Float[Tensor, "M"], high: Float[Tensor, "M"],
            dual: float | None) -> SurrogateLoss:
    """max(-A r, -A clip(r, low, high)), and for A < 0 at most -dual A (Ye et al. 2020).

    Schulman et al. 2017, eq. 7. low and high are ratio limits.
    """
    loss = torch.maximum(-advantage * ratio, -advantage * torch.minimum(torch.maximum(ratio, low), high))
    if dual is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)
    return SurrogateLoss(loss, (ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0))


def step_factor(position: Float[Tensor, "M"], start: float, rate: float) -> Float[Tensor, "M"]:
    """DPPO's clip schedule over denoising steps: start + (1 - start) (e^(rate p) - 1) / (e^rate - 1).

    p = 0 is the noisiest trained step, 1 the last; a single one has p = 1 (the public code divides 0 by 0 there).
    """
    return start + (1 - start) * torch.expm1(rate * position) / math.expm1(rate)


def positive(owner: object, *names: str) -> None:
    """Raises: ValueError naming the first of these settings that is not above 0."""
    for name in names:
        value = getattr(owner, name)
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def leaves_lower_limit(name: str, value: float, unit: Unit) -> None:
    """Raises: ValueError naming a bound whose per_dim limits 1 +- value have a lower one that is not positive."""
    if unit == "per_dim" and value >= 1:
        raise ValueError(f"a per_dim {name} of {value} leaves no lower limit (1 - {name} must be positive)")


def above_one(dual: float | None) -> None:
    """Raises: ValueError for a cap that already holds at ratio 1."""
    if dual is not None and dual <= 1:
        raise ValueError(f"dual must exceed 1, got {dual}")


@spec
class PPOClip:
    """PPO's clip. low/high bound the log-ratio in joint nats, or with unit per_dim the mean-over-dims ratio.

    A published clip of 1e-4 per_dim is 1e-4 * D nats: 1.6 for SD1.5, 0.003 for a 28-number chunk. dual caps the loss of
    negative advantages at dual * |A|. step_start < 1 tightens noisier steps (DPPO's schedule, rate step_rate).
    """

    type: Literal["ppo_clip"] = "ppo_clip"
    low: float = 0.2
    high: float = 0.2
    unit: Unit = "nats"
    dual: float | None = None
    step_start: float = 1.0
    step_rate: float = 3.0
    needs: ClassVar[Signal | None] = None
    selective = False

    def __post_init__(self) -> None:
        positive(self, "low", "high", "step_rate", "step_start")
        leaves_lower_limit("low", self.low, self.unit)
        above_one(self.dual)

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss:
        """Clipped loss, scaled so that its gradient starts as -A grad log p."""
        ratio, scale = tempered(new.log_prob - rows.old_log_prob, self.unit, new.dims)
        factor = step_factor(rows.position, self.step_start, self.step_rate)
        result = clipped(ratio, rows.advantage, *bounds(self.low * factor, self.high * factor, self.unit), self.dual)
        return SurrogateLoss(scale * result.loss, result.held_low, result.held_high)


@spec
class SimplePO:
    """-[r A - |A| (r - 1)^2 / (2 e)]: pulls to r = 1 +- e instead of switching the gradient off (Xie et al. 2024).

    e = exp(limit) - 1 in joint nats or, per_dim, the limit of the mean-over-dims ratio.
    """

    type: Literal["simple_po"] = "simple_po"
    limit: float = 0.2
    unit: Unit = "nats"
    needs: ClassVar[Signal | None] = None
    selective = False

    def __post_init__(self) -> None:
        positive(self, "limit")

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss:
        """Quadratically penalized loss."""
        ratio, scale = tempered(new.log_prob - rows.old_log_prob, self.unit, new.dims)
        radius = math.expm1(self.limit) if self.unit == "nats" else self.limit
        advantage = rows.advantage
        loss = -(ratio * advantage - advantage.abs() * (ratio - 1) ** 2 / (2 * radius))
        held_low, held_high = (ratio < 1 - radius) & (advantage < 0), (ratio > 1 + radius) & (advantage > 0)
        return SurrogateLoss(scale * loss, held_low, held_high)


@spec
class DivergenceGate:
    """-A r with the gradient off where the exact KL(old || new) >= limit and the update moves further away.

    Flow-DPPO / divergence-gated PPO (image_peers 2.9). limit in joint nats, or nats per element with unit per_dim.
    """

    type: Literal["divergence_gate"] = "divergence_gate"
    limit: float = 0.05
    unit: Unit = "nats"
    needs: ClassVar[Signal | None] = "gaussian step"
    selective = False

    def __post_init__(self) -> None:
        positive(self, "limit")

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss:
        """Gated loss. Raises: ValueError on a likelihood without Gaussian steps."""
        if new.gaussian is None or rows.old is None:
            raise ValueError("divergence_gate needs the exact KL of Gaussian steps; use the transition likelihood")
        ratio, scale = tempered(new.log_prob - rows.old_log_prob, self.unit, new.dims)
        far = rows.old.kl(new.gaussian).detach() >= self.limit * scale
        low, high = far & (ratio < 1) & (rows.advantage < 0), far & (ratio > 1) & (rows.advantage > 0)
        kept = torch.where(low | high, ratio.detach(), ratio)
        return SurrogateLoss(-scale * rows.advantage * kept, low, high)


@spec
class GuardClip:
    """GRPO-Guard (arXiv 2510.22319): PPO's clip on a centred ratio, and the same gradient scale at every step.

    c = log r + KL(old || new) = sum(noise * shift of the mean) / std has mean 0 under the old policy, while log r lies
    below 0 on average and rarely meets the upper clip. Unit per_dim clips the published exp(c std / D), nats exp(c).
    The gradient at the start is -A (std / leverage) grad log p: a step's gradient no longer grows with
    leverage / std, so the last steps do not drown the others. dual, as PPOClip's, holds negative advantages of rows
    whose mean moved far: their log r = c - KL is far below 0, c as often far above. Departures: c and std are per row
    (their code averages the KL over the batch); the leverage |d mean / d output| of the network replaces 1/|dt| (equal
    up to a constant for Flow-SDE; of the velocity, an eps network's noisiest step would have 1 / alpha the gradient).
    """

    type: Literal["guard_clip"] = "guard_clip"
    low: float = 0.2
    high: float = 0.2
    unit: Unit = "nats"
    dual: float | None = None
    needs: ClassVar[Signal | None] = "gaussian step"
    selective = False

    def __post_init__(self) -> None:
        positive(self, "low", "high")
        above_one(self.dual)

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss:
        """Clipped loss. Raises: ValueError on a likelihood without Gaussian steps."""
        if new.gaussian is None or rows.old is None or new.leverage is None:
            raise ValueError("guard_clip needs the stored Gaussian steps of the rollout; use the transition likelihood")
        std = rows.old.std.flatten()
        if len(std) != len(rows.advantage):
            raise ValueError("guard_clip scales a step by its one std, and learned noise has one per number, got "
                             f"{tuple(rows.old.std.shape)}; use ppo_clip")
        centred = new.log_prob - rows.old_log_prob + rows.old.kl(new.gaussian)
        power = torch.ones_like(std) if self.unit == "nats" else std / new.dims
        ratio = (power * centred).exp()
        low, high = (torch.full_like(ratio, value) for value in (self.low, self.high))
        result = clipped(ratio, rows.advantage, *bounds(low, high, self.unit), self.dual)
        return SurrogateLoss(std / (power * new.leverage) * result.loss, result.held_low, result.held_high)


@spec
class ContrastiveMatching:
    """DiffusionNFT (arXiv 2509.16117): regress an implicit positive and an implicit negative prediction on the target.

    With p = clamp(A / advantage_clip, -1, 1) / 2 + 1/2 and the errors e(+-) = e_old +- beta (e_new - e_old):
    [p |e(+)|^2 / w+ + (1 - p) |e(-)|^2 / w-] / beta, summed over the event, w the mean absolute error (a constant). It
    is the policy gradient A / advantage_clip of a matching likelihood, |e_new|^2 / w, plus beta |e_new - e_old|^2 / w,
    which pulls to the old policy: convex, unlike AWM's loss for A < 0.
    space: the errors are those of x0, as published for flow networks, or of the network's own output. An eps network's
    x0 grows as 1 / alpha near t = 1 and with it the loss: a robot policy that predicts eps diverged in x0.
    Departure: the authors' factor 5 (advantage_clip) is left out, and the event is summed, as everywhere here.
    """

    type: Literal["contrastive_matching"] = "contrastive_matching"
    beta: float = 1.0
    advantage_clip: float = 5.0
    space: Literal["x0", "network"] = "x0"
    needs: ClassVar[Signal | None] = "old error"
    selective = False

    def __post_init__(self) -> None:
        positive(self, "beta", "advantage_clip")

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss:
        """The loss; nothing is clipped. Raises: ValueError on a likelihood without stored errors."""
        if new.error is None or new.x0_scale is None or "old_error" not in rows.data:
            raise ValueError("contrastive_matching needs the old policy's error, which the matching likelihood stores; "
                             "use it with the nft algorithm")
        scale = new.x0_scale[:, None] if self.space == "x0" else 1.0
        old, current = scale * rows.data["old_error"].flatten(1), scale * new.error.flatten(1)
        better = (rows.advantage / self.advantage_clip).clamp(-1, 1) / 2 + 0.5
        loss = torch.zeros_like(better)
        for share, reach in ((better, self.beta), (1 - better, -self.beta)):
            error = old + reach * (current - old)
            width = error.detach().abs().mean(1).clamp(min=1e-5)
            loss = loss + share / self.beta * error.square().sum(1) / width
        never = torch.zeros_like(better, dtype=torch.bool)
        return SurrogateLoss(loss, never, never)


@spec
class WeightedRegression:
    """-w log p, no ratio: regression on the policy's own samples, weighted by how good they were.

    temperature T: w = min(exp(A / T), limit), AWR (Peng et al. 2019, eq. 10) and ORW-CFM (arXiv 2502.06061, sec. 4);
    its fixed point is the policy tilted by exp(A / T). None: w = A, for advantages that are weights already
    (best_of_group). Never concave, unlike a policy gradient with A < 0; every pass narrows the policy, so hold it with
    reference_velocity (ORW's W2 term) or stop.
    """

    type: Literal["weighted"] = "weighted"
    temperature: float | None = None
    limit: float = 20.0
    needs: ClassVar[Signal | None] = None

    def __post_init__(self) -> None:
        positive(self, "limit")
        if self.temperature is not None:
            positive(self, "temperature")

    @property
    def selective(self) -> bool:
        """With weights given, those of 0 select."""
        return self.temperature is None

    def __call__(self, new: Scored, rows: Rows) -> SurrogateLoss:
        """The weighted negative log-likelihood. Raises: ValueError for a negative weight."""
        weight = rows.advantage
        if self.temperature is not None:
            weight = (weight / self.temperature).exp().clamp(max=self.limit)
        elif bool((weight < 0).any()):
            raise ValueError(f"an advantage of {float(weight.min()):.3g} is no weight; set a temperature, or use the "
                             "best_of_group advantage")
        never = torch.zeros_like(weight, dtype=torch.bool)
        return SurrogateLoss(-weight * new.log_prob, never, never)
