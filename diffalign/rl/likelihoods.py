"""What counts as the log-likelihood of a decision, and the rows it is scored on.

Legend: N decisions, K denoising steps, *E event axes, M rows of a minibatch, R all rows of a rollout.
Rows are indices until `rows` materializes a minibatch: conditioning is never copied R times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.gaussian import Gaussian, standard_normal
from diffalign.diffusion.paths import convert, training_target
from diffalign.diffusion.schedules import shifted
from diffalign.diffusion.trajectories import DenoisingTrajectory
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import select_rows
from diffalign.spec import spec

# What a likelihood gives and a surrogate or penalty may ask for: a log-density in nats, the Gaussian denoising step of
# the rollout policy, its error on the pre-training target, the policy's (x0, eps) predictions.
Signal = Literal["density", "gaussian step", "old error", "prediction"]
_SMALL = 1e-10  # keeps the gradient of a root finite; AWM's number


@dataclass(frozen=True)
class Rows:
    """A minibatch. `old` is the Gaussian step of the rollout policy (None where the likelihood has no density).

    `position` in [0, 1] tells how late the row's denoising step is among the trained ones (1 = last).
    """

    data: Mapping[str, Tensor]
    cond: Mapping[str, Tensor]
    advantage: Float[Tensor, "M"]
    old_log_prob: Float[Tensor, "M"]
    old: Gaussian | None
    position: Float[Tensor, "M"]


@dataclass(frozen=True)
class Scored:
    """A policy's view of rows: log-likelihood [M] in nats, its Gaussian, its predicted (x0, eps), event size D.

    predicted is None where the denoiser was not asked; leverage is |d mean / d output| of a denoising step. error is
    the network's output minus the pre-training target, and x0_scale |d x0 / d output| there.
    """

    log_prob: Float[Tensor, "M"]
    gaussian: Gaussian | None
    predicted: tuple[Float[Tensor, "M *E"], Float[Tensor, "M *E"]] | None
    dims: int
    leverage: Float[Tensor, "M"] | None = None
    error: Float[Tensor, "M *E"] | None = None
    x0_scale: Float[Tensor, "M"] | None = None

    @property
    def velocity(self) -> Float[Tensor, "M *E"]:
        """eps - x0. Raises: ValueError if the denoiser was not asked."""
        if self.predicted is None:
            raise ValueError("this likelihood does not ask the denoiser, so it has no velocity; use reference_kl")
        x0, eps = self.predicted
        return eps - x0


@runtime_checkable
class ExampleSet(Protocol):
    """All rows of one rollout, lazily."""

    def __len__(self) -> int: ...
    def rows(self, index: Int[Tensor, "M"]) -> Rows: ...

    @property
    def decision(self) -> Int[Tensor, "R"]: ...

    @property
    def place(self) -> Int[Tensor, "R"]:
        """Where each row would be if one process had the rows of all."""
        ...


@runtime_checkable
class Likelihood(Protocol):
    """A spec that turns a rollout into scored rows."""

    @property
    def provides(self) -> frozenset[Signal]: ...
    def examples(self, policy: DiffusionPolicy, trajectory: DenoisingTrajectory, advantage: Float[Tensor, "N"],
                 *, decisions: Int[Tensor, "n"], generator: torch.Generator, others: tuple[int, int] = (0, 0)
                 ) -> ExampleSet:
        """The rows of the given decisions; `others` counts those of earlier and of later processes.

        What is drawn for a decision does not depend on how the decisions are spread over processes.
        """
        ...

    def score(self, policy: DiffusionPolicy, rows: Rows) -> Scored: ...


@dataclass(frozen=True)
class TransitionExamples:
    """Rows (decision n, trained denoising step k)."""

    trajectory: DenoisingTrajectory
    advantage: Float[Tensor, "N"]
    discount: float
    decision: Int[Tensor, "R"]
    place: Int[Tensor, "R"]
    step: Int[Tensor, "R"]

    def __len__(self) -> int:
        return self.decision.shape[0]

    def rows(self, index: Int[Tensor, "M"]) -> Rows:
        """Materialize a minibatch; the advantage is discounted by gamma_denoise^(steps left after k)."""
        n, k, path = self.decision[index], self.step[index], self.trajectory
        trained = path.trained.nonzero().flatten()
        first, last = int(trained[0]), int(trained[-1])
        spread = max(1, last - first)
        position = torch.ones_like(k, dtype=torch.float32) if last == first else (k - first) / spread
        data = {"x": path.x[n, k], "x_next": path.x[n, k + 1], "t": path.times[k], "t_next": path.times[k + 1]}
        old = Gaussian(path.mean[n, k], path.std[n, k])
        left = (path.trained.shape[0] - 1 - k).to(self.advantage.dtype)
        return Rows(data, select_rows(path.cond, n), self.advantage[n] * self.discount**left, path.log_prob[n, k], old,
                    position.float())


@spec
class Transition:
    """log p(x_{k+1} | x_k, cond) of each trained reverse step (DDPO, Flow-GRPO, DPPO).

    denoising_discount is DPPO's gamma_denoise (eq. 5): noisier steps count less. Old log-probs are the rollout's own.
    """

    type: Literal["transition"] = "transition"
    denoising_discount: float = 1.0
    provides: ClassVar[frozenset[Signal]] = frozenset({"density", "gaussian step", "prediction"})

    def __post_init__(self) -> None:
        if not 0 < self.denoising_discount <= 1:
            raise ValueError(f"denoising_discount must lie in (0, 1], got {self.denoising_discount}")

    def examples(self, policy: DiffusionPolicy, trajectory: DenoisingTrajectory, advantage: Float[Tensor, "N"],
                 *, decisions: Int[Tensor, "n"], generator: torch.Generator, others: tuple[int, int] = (0, 0)
                 ) -> TransitionExamples:
        """All (n, k) with n chosen and k trained. Raises: ValueError if no step of the chain has a density."""
        steps = trajectory.trained.nonzero().flatten().to(advantage.device)
        if len(steps) == 0:
            raise ValueError(f"{policy.kernel} has no stochastic trained step, so there is no transition density to "
                             "improve; use DDPM, DDIM(eta > 0), FlowSDE or CPS, widen the trained steps, or use the "
                             "matching likelihood (awm)")
        rows = len(decisions) * len(steps)
        place = others[0] * len(steps) + torch.arange(rows, device=decisions.device)
        return TransitionExamples(trajectory, advantage, self.denoising_discount,
                                  decisions.repeat_interleave(len(steps)), place, steps.repeat(len(decisions)))

    def score(self, policy: DiffusionPolicy, rows: Rows) -> Scored:
        """Density of the stored x_next under the policy's kernel at the stored x."""
        data, cond = rows.data, policy.encoded(rows.cond)
        x0, eps = policy.predict(data["x"], data["t"], cond)
        gaussian = policy.step(data["x"], data["t"], data["t_next"], x0, eps, cond)
        leverage = policy.leverage(data["t"], data["t_next"])
        return Scored(gaussian.log_prob(data["x_next"]), gaussian, (x0, eps), gaussian.dims, leverage)


@dataclass(frozen=True)
class MatchingExamples:
    """Rows (decision n, draw j): noise and time drawn once (common random numbers), and the old policy's error."""

    trajectory: DenoisingTrajectory
    advantage: Float[Tensor, "N"]
    decision: Int[Tensor, "R"]
    place: Int[Tensor, "R"]
    t: Float[Tensor, "R"]
    eps: Float[Tensor, "R *E"]
    old_log_prob: Float[Tensor, "R"]
    old_error: Float[Tensor, "R *E"]

    def __len__(self) -> int:
        return self.decision.shape[0]

    def rows(self, index: Int[Tensor, "M"]) -> Rows:
        """Materialize a minibatch."""
        n = self.decision[index]
        data = {"x0": self.trajectory.x[n, -1], "eps": self.eps[index], "t": self.t[index],
                "old_error": self.old_error[index]}
        return Rows(data, select_rows(self.trajectory.cond, n), self.advantage[n], self.old_log_prob[index], None,
                    torch.ones_like(self.t[index]))


@spec
class Matching:
    """Minus the pre-training loss on the policy's own samples: -w(t) ||target - prediction||^2 (AWM, eq. 9; FPO).

    Any sampler may have made the samples. `draws` noise-time pairs per sample, shared by the old and the new policy.
    time: the sampler's own grid without its first step (AWM's discrete_wo_init), or uniform, moved towards 1 by `shift`
    s: s t / (1 + (s - 1) t) (SD3, eq. 23).
    Unit `per_dim` of the surrogate gives AWM's mean over the event. weight huber and ghuber are AWM's powers p = 1/2
    and 1/4 of the mean error l: -D (t / p) [(l + 1e-10)^p - 1e-10^p], for huber without the 1 / p; small errors count
    more.
    """

    type: Literal["matching"] = "matching"
    draws: int = 4
    weight: Literal["one", "t", "t2", "huber", "ghuber"] = "one"
    time: Literal["grid", "uniform"] = "grid"
    shift: float = 1.0
    provides: ClassVar[frozenset[Signal]] = frozenset({"old error", "prediction"})

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if not self.shift > 0 or (self.time == "grid" and self.shift != 1.0):
            raise ValueError(f"shift must be positive, and 1 with time: grid (schedules shift too), got {self.shift}")

    def examples(self, policy: DiffusionPolicy, trajectory: DenoisingTrajectory, advantage: Float[Tensor, "N"],
                 *, decisions: Int[Tensor, "n"], generator: torch.Generator, others: tuple[int, int] = (0, 0)
                 ) -> MatchingExamples:
        """Draw (t, eps) and score the current policy as the old one, draw by draw."""
        device = trajectory.x.device
        decision = decisions.repeat(self.draws)
        before, count = others[0], others[0] + len(decisions) + others[1]

        def own(drawn: Tensor) -> Tensor:
            """This process's part of a draw for the decisions of all."""
            parts: Tensor = drawn.unflatten(0, (self.draws, count))
            return parts[:, before : before + len(decisions)].flatten(0, 1)

        if self.time == "grid":
            grid = trajectory.times[1:-1] if len(trajectory.times) > 2 else trajectory.times[:1]
            t = grid[own(torch.randint(len(grid), (self.draws * count,), generator=generator, device=device))]
        else:
            t = shifted(1 - own(torch.rand(self.draws * count, generator=generator, device=device)), self.shift)
        eps = own(standard_normal(self.draws * count, tuple(trajectory.x.shape[2:]), device).sample(generator))
        place = own(torch.arange(self.draws * count, device=device))
        empty = MatchingExamples(trajectory, advantage, decision, place, t, eps, torch.zeros_like(t),
                                 torch.zeros_like(eps))
        with torch.no_grad():
            blocks = [self.score(policy, empty.rows(block))
                      for block in torch.arange(len(decision), device=device).tensor_split(self.draws)]
        return replace(empty, old_log_prob=torch.cat([block.log_prob for block in blocks]),
                       old_error=torch.cat([block.error for block in blocks if block.error is not None]))

    def score(self, policy: DiffusionPolicy, rows: Rows) -> Scored:
        """Weighted squared error of the prediction at (t, eps), summed over the event."""
        x0, eps, t = rows.data["x0"], rows.data["eps"], rows.data["t"]
        level = policy.path.level(t, x0.ndim - 1)
        x, prediction = level.alpha * x0 + level.sigma * eps, policy.denoiser.prediction
        output = policy.denoiser(x, t, rows.cond)
        error = output - training_target(prediction, x0, eps, level)
        flat = policy.path.level(t, 1)
        unit = torch.ones_like(flat.alpha)
        x0_scale = convert(prediction, unit, torch.zeros_like(unit), flat)[0].abs().flatten()
        return Scored(-self._weighted((error**2).flatten(1), t), None, convert(prediction, output, x, level),
                      x0.shape[1:].numel(), error=error, x0_scale=x0_scale)

    def _weighted(self, squares: Float[Tensor, "M D"], t: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
        """The matching loss of squared errors at times t, summed over the event."""
        total, dims = squares.sum(1), squares.shape[1]
        if self.weight in ("huber", "ghuber"):
            power, scale = (0.5, 1.0) if self.weight == "huber" else (0.25, 4.0)
            rooted: Tensor = (total / dims + _SMALL) ** power - _SMALL**power
            return dims * scale * t * rooted
        return {"one": torch.ones_like(t), "t": t, "t2": t**2}[self.weight] * total
