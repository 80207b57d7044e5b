"""The on-policy loop: collect -> advantages -> rows -> minibatch updates, as a generator.

Legend: H decisions, B episodes of this process, N = H * B, R rows, M rows of a microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser, select_rows
from diffalign.rl.advantages import AdvantageEstimator, Estimate, Outcome
from diffalign.rl.likelihoods import ExampleSet, Likelihood, Rows, Scored
from diffalign.rl.regularizers import reference_kl, velocity_mse
from diffalign.rl.rollouts import Rollout, RolloutSource
from diffalign.rl.surrogates import Surrogate
from diffalign.spec import spec
from diffalign.train import distributed, update
from diffalign.train.state import Iteration, TrainState, frozen_copy
from diffalign.train.supervised import Batch, denoising_loss

Metrics = dict[str, float]


class RatioDrift(ValueError):
    """The likelihood ratio was not 1 on the first minibatch after a rollout: sampling and scoring disagree."""


@spec
class Optimization:
    """How gradients are taken, the same for every algorithm.

    epochs x minibatches optimizer steps per rollout; microbatch_rows bounds memory and does not change the result.
    ratio_tolerance: largest |log ratio| in nats allowed on the first minibatch after a rollout.
    ema_decay: keep averaged policy weights (per optimizer step), used for evaluation.
    critic_warmup: iterations in which only the critic learns.
    """

    learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    microbatch_rows: int = 4096
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    ratio_tolerance: float = 0.05
    critic_warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "microbatch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "critic_learning_rate", "ratio_tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class OnPolicy:
    """A composition of pieces; the algorithm specs build it.

    reference_kl / reference_velocity hold the policy near the frozen reference, ema_velocity near its own average,
    behavior_cloning near demonstrations; value_loss weighs the critic's squared error.

    Raises: ValueError where the pieces do not fit each other.
    """

    likelihood: Likelihood
    advantage: AdvantageEstimator
    surrogate: Surrogate
    optimization: Optimization
    reference_kl: float = 0.0
    reference_velocity: float = 0.0
    ema_velocity: float = 0.0
    behavior_cloning: float = 0.0
    value_loss: float = 0.5

    def __post_init__(self) -> None:
        for name in ("reference_kl", "reference_velocity", "ema_velocity", "behavior_cloning", "value_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.surrogate.needs_density and not self.likelihood.has_density:
            raise ValueError(f"{type(self.surrogate).__name__} needs the exact KL of Gaussian steps, which the "
                             f"{type(self.likelihood).__name__} likelihood has not; use PPOClip or SimplePO")
        if self.reference_kl and not self.likelihood.has_density:
            raise ValueError(f"reference_kl={self.reference_kl} needs Gaussian steps, which the "
                             f"{type(self.likelihood).__name__} likelihood has not; use reference_velocity")
        if self.ema_velocity and self.optimization.ema_decay is None:
            raise ValueError(f"ema_velocity={self.ema_velocity} needs averaged weights; set optimization.ema_decay")

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference denoiser must be given."""
        return self.reference_kl > 0 or self.reference_velocity > 0

    @property
    def needs_critic(self) -> bool:
        """Whether state.modules must hold a "critic"."""
        return self.advantage.needs_critic


def optimize(pieces: OnPolicy, policy: DiffusionPolicy, source: RolloutSource, state: TrainState, *,
             reference: Denoiser | None = None, demonstrations: Batch | None = None) -> Iterator[Iteration]:
    """Improve state.modules["policy"], which is the policy's denoiser, forever; one Iteration per rollout.

    A restored state simply goes on: everything random comes from state.generator.

    Raises: ValueError if a needed reference, critic or demonstrations are missing; RatioDrift; NonFinite.
    """
    _require(pieces, policy, state, reference, demonstrations)
    while True:
        seed = int(torch.randint(2**62, (1,), generator=state.generator, device=state.generator.device).item())
        collector = torch.Generator(state.generator.device).manual_seed(seed + distributed.rank())
        rollout = source.collect(policy, generator=collector)
        estimate, metrics = _estimate(pieces, rollout, state)
        metrics |= _update_policy(pieces, policy, rollout, estimate, state, reference, demonstrations)
        state.step += 1
        yield Iteration(state.step, {**rollout.stats, **metrics})


def _require(pieces: OnPolicy, policy: DiffusionPolicy, state: TrainState, reference: Denoiser | None,
             demonstrations: Batch | None) -> None:
    denoiser: object = policy.denoiser
    if state.modules["policy"] is not denoiser:
        raise ValueError('state.modules["policy"] must be the policy\'s denoiser, got another module')
    if pieces.needs_reference and reference is None:
        raise ValueError(f"reference_kl={pieces.reference_kl}, reference_velocity={pieces.reference_velocity} need a "
                         "reference denoiser, got None")
    if pieces.needs_critic and "critic" not in state.modules:
        raise ValueError(f"the {type(pieces.advantage).__name__} advantage needs a critic in state.modules, "
                         f"got {sorted(state.modules)}")
    if pieces.behavior_cloning and demonstrations is None:
        raise ValueError(f"behavior_cloning={pieces.behavior_cloning} needs demonstrations, got None")
    if pieces.likelihood.has_density and not policy.kernel.stochastic:
        raise ValueError(f"{policy.kernel} is deterministic and has no transition density; use DDPM, DDIM(eta > 0), "
                         "FlowSDE or CPS, or the matching likelihood (awm)")


def _estimate(pieces: OnPolicy, rollout: Rollout, state: TrainState) -> tuple[Estimate, Metrics]:
    """Advantages of this process's episodes, computed on the episodes of all processes."""
    value = next_value = None
    if pieces.needs_critic:
        critic = state.modules["critic"]
        with torch.no_grad():
            value = distributed.gather_columns(critic(rollout.trajectory.cond).reshape(rollout.reward.shape))
            next_value = distributed.gather_columns(critic(rollout.next_cond).reshape(rollout.reward.shape))
    gather = distributed.gather_columns
    outcome = Outcome(gather(rollout.reward), gather(rollout.terminated), gather(rollout.truncated),
                      gather(rollout.valid), gather(rollout.group), gather(rollout.prompt), value, next_value)
    estimate = pieces.advantage(outcome, state.statistics)
    state.statistics = dict(estimate.statistics)
    chosen = estimate.advantage[outcome.valid]
    metrics = {"reward/mean": float(outcome.episode_return.mean()), "reward/std": float(outcome.episode_return.std()),
               "advantage/std": float(chosen.std()), "advantage/zero_fraction": float((chosen == 0).float().mean())}
    own = distributed.own_columns
    target = None if estimate.target is None else own(estimate.target)
    if estimate.target is not None and value is not None:
        spread = (estimate.target - value)[outcome.valid].var()
        metrics["value/explained"] = float(1 - spread / estimate.target[outcome.valid].var().clamp(min=1e-12))
    return Estimate(own(estimate.advantage), target, estimate.statistics), metrics


def _update_policy(pieces: OnPolicy, policy: DiffusionPolicy, rollout: Rollout, estimate: Estimate, state: TrainState,
                   reference: Denoiser | None, demonstrations: Batch | None) -> Metrics:
    """All optimizer steps of one rollout; the mean of their metrics."""
    plan = pieces.optimization
    examples = pieces.likelihood.examples(policy, rollout.trajectory, estimate.advantage.flatten(),
                                          generator=state.generator)
    anchors = _anchors(pieces, policy, state, reference)
    kept = rollout.valid.flatten()
    collected: list[Metrics] = []
    for _ in range(plan.epochs):
        chunks = _minibatches(len(examples), plan.minibatches, state.generator)
        value_chunks = _minibatches(rollout.reward.numel(), plan.minibatches, state.generator)
        for index, decisions in zip(chunks, value_chunks, strict=True):
            losses: list[tuple[float, update.Loss]] = []
            if state.step >= plan.critic_warmup:
                index = index[kept[examples.decision[index]]]
                losses += [(weight, partial(_policy_loss, pieces, policy, examples, part, anchors, not collected))
                           for weight, part in _microbatches(index, plan.microbatch_rows)]
                if demonstrations is not None and pieces.behavior_cloning:
                    losses.append((1.0, partial(_cloning_loss, pieces, policy, demonstrations, state.generator)))
            if pieces.needs_critic and estimate.target is not None:
                decisions = decisions[kept[decisions]]
                losses += [(weight, partial(_value_loss, pieces, rollout, estimate.target, part, state))
                           for weight, part in _microbatches(decisions, plan.microbatch_rows)]
            collected.append(update.step(state, losses, max_grad_norm=plan.max_grad_norm))
    metrics = {name: sum(m[name] for m in collected if name in m) / sum(name in m for m in collected)
               for name in collected[-1]}
    if "ratio_drift" in collected[0]:
        metrics["ratio_drift"] = collected[0]["ratio_drift"]
    return metrics


def _anchors(pieces: OnPolicy, policy: DiffusionPolicy, state: TrainState, reference: Denoiser | None
             ) -> Mapping[str, DiffusionPolicy]:
    """The policies that hold this update back, by name."""
    anchors = {}
    if reference is not None and pieces.needs_reference:
        anchors["reference"] = replace(policy, denoiser=reference)
    if pieces.ema_velocity and state.ema is not None:
        average = frozen_copy(state.modules["policy"])
        state.ema.copy_to(average)
        anchors["ema"] = replace(policy, denoiser=_as_denoiser(average))
    return anchors


def _as_denoiser(module: nn.Module) -> Denoiser:
    if not hasattr(module, "prediction"):
        raise TypeError(f"{type(module).__name__} has no `prediction`; a trained denoiser must state its kind")
    return module  # type: ignore[return-value]


def _minibatches(rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """`count` parts of a permutation of this process's rows.

    The permutation runs over the rows of all processes and every rank keeps its own, so that the ranks' parts make up
    the parts that one process would use.
    """
    world = distributed.world_size()
    if rows * world < count:
        raise ValueError(f"{rows * world} rows cannot fill {count} minibatches; collect more or lower minibatches")
    order = torch.randperm(rows * world, generator=generator, device=generator.device)
    parts = torch.tensor_split(order, count)
    first = distributed.rank() * rows
    return tuple(part[(part >= first) & (part < first + rows)] - first for part in parts)


def _microbatches(index: Tensor, size: int) -> list[tuple[float, Tensor]]:
    """(fraction of the minibatch over all processes, rows) pairs."""
    total = distributed.sum_scalar(float(len(index)))
    return [(len(part) / total, part) for part in index.split(size) if len(part)]


def _policy_loss(pieces: OnPolicy, policy: DiffusionPolicy, examples: ExampleSet, index: Tensor,
                 anchors: Mapping[str, DiffusionPolicy], first: bool) -> tuple[Tensor, Metrics]:
    rows = examples.rows(index)
    new = pieces.likelihood.score(policy, rows)
    log_ratio = (new.log_prob - rows.old_log_prob).detach()
    metrics = {"log_ratio/mean": float(log_ratio.mean()), "log_ratio/std": float(log_ratio.std(correction=0))}
    if first:
        drift = float(log_ratio.abs().max())
        metrics["ratio_drift"] = drift
        if not drift <= pieces.optimization.ratio_tolerance:
            raise RatioDrift(f"on the first minibatch the log-ratio reaches {drift:.3g} nats and must be 0 to within "
                             f"ratio_tolerance={pieces.optimization.ratio_tolerance}: sampling and scoring disagree "
                             "(dropout on, other precision, a schedule or kernel that changed), or the kernel's std "
                             "is so small that rounding matters; nothing was updated")
    surrogate = pieces.surrogate(new, rows)
    loss = surrogate.loss
    metrics |= {"clip/low": float(surrogate.held_low.float().mean()),
                "clip/high": float(surrogate.held_high.float().mean())}
    if new.gaussian is not None and rows.old is not None:
        metrics["kl/old"] = float(rows.old.kl(new.gaussian).detach().mean())
    penalties = _penalties(pieces, new, rows, anchors)
    for name, (weight, penalty) in penalties.items():
        loss = loss + weight * penalty
        metrics[name] = float(penalty.detach().mean())
    return loss.mean(), metrics


def _penalties(pieces: OnPolicy, new: Scored, rows: Rows, anchors: Mapping[str, DiffusionPolicy]
               ) -> dict[str, tuple[float, Tensor]]:
    """(weight, penalty [M]) by metric name."""
    with torch.no_grad():
        scored = {name: pieces.likelihood.score(anchor, rows) for name, anchor in anchors.items()}
    found: dict[str, tuple[float, Tensor]] = {}
    if pieces.reference_kl:
        found["kl/reference"] = pieces.reference_kl, reference_kl(new, scored["reference"])
    if pieces.reference_velocity:
        found["velocity/reference"] = pieces.reference_velocity, velocity_mse(new, scored["reference"])
    if pieces.ema_velocity:
        found["velocity/ema"] = pieces.ema_velocity, velocity_mse(new, scored["ema"])
    return found


def _value_loss(pieces: OnPolicy, rollout: Rollout, target: Tensor, index: Tensor, state: TrainState
                ) -> tuple[Tensor, Metrics]:
    value = state.modules["critic"](select_rows(rollout.trajectory.cond, index))
    error = ((value - target.flatten()[index]) ** 2).mean()
    return pieces.value_loss * error, {"value/loss": float(error.detach())}


def _cloning_loss(pieces: OnPolicy, policy: DiffusionPolicy, demonstrations: Batch, generator: torch.Generator
                  ) -> tuple[Tensor, Metrics]:
    x0, cond = demonstrations(generator)
    grid = policy.schedule.times()[:-1].to(x0.device)
    t = grid[torch.randint(len(grid), (x0.shape[0],), generator=generator, device=x0.device)]
    eps = torch.randn(x0.shape, generator=generator, device=x0.device)
    error = denoising_loss(policy, x0, cond, t, eps).mean()
    weight = pieces.behavior_cloning / distributed.world_size()
    return weight * error, {"behavior_cloning": float(error.detach())}
