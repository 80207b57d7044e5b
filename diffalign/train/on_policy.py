"""The on-policy loop: collect -> advantages -> rows -> minibatch updates, as a generator.

Legend: H decisions, B episodes of this process, N = H * B, R rows, M rows of a microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser
from diffalign.rl.advantages import Estimate, Outcome, tied_fraction
from diffalign.rl.likelihoods import ExampleSet
from diffalign.rl.rollouts import Rollout, RolloutSource
from diffalign.train import distributed, sharding, update
from diffalign.train.adaptive import adapt, penalized
from diffalign.train.losses import Metrics, RatioDrift, anchors, cloning_loss, policy_loss, value_loss
from diffalign.train.pieces import OnPolicy, Optimization
from diffalign.train.state import Iteration, TrainState, cosine, scale_learning_rates
from diffalign.train.supervised import Batch

__all__ = ["OnPolicy", "Optimization", "RatioDrift", "optimize"]


def optimize(pieces: OnPolicy, policy: DiffusionPolicy, source: RolloutSource, state: TrainState, *,
             reference: Denoiser | None = None, demonstrations: Batch | None = None) -> Iterator[Iteration]:
    """Improve state.modules["policy"], which is the policy's denoiser, forever; one Iteration per rollout.

    A restored state simply goes on: everything random comes from state.generator.

    Raises: ValueError if a needed reference, critic or demonstrations are missing; RatioDrift; NonFinite.
    """
    _require(pieces, policy, state, reference, demonstrations)
    while True:
        if pieces.optimization.decay_iterations is not None:
            scale_learning_rates(state, cosine(min(1.0, state.step / pieces.optimization.decay_iterations)))
        seed = int(torch.randint(2**62, (1,), generator=state.generator, device=state.generator.device).item())
        collector = torch.Generator(state.generator.device).manual_seed(seed + distributed.rank())
        with _behavior(pieces, state):
            rollout = source.collect(policy.during(state.step), generator=collector)
            estimate, metrics = _estimate(pieces, rollout, state)
            advantage = estimate.advantage.flatten()
            decisions = _decisions(pieces, advantage)
            before, _, after = _counts(len(decisions), state.generator)
            examples = pieces.likelihood.examples(policy, rollout.trajectory, advantage, generator=state.generator,
                                                  decisions=decisions, others=(before, after))
        metrics |= _update_policy(penalized(pieces, state), policy, rollout, examples, estimate, state, reference,
                                  demonstrations)
        metrics |= adapt(pieces, state, metrics)
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
    if "gaussian step" in pieces.likelihood.provides and not policy.kernel.stochastic:
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
    returns = outcome.episode_return
    metrics = {"reward/mean": float(returns.mean()), "reward/std": float(returns.std(correction=0)),
               "advantage/std": float(chosen.std(correction=0)),
               "advantage/zero_fraction": float((chosen == 0).float().mean())}
    if bool((outcome.group.unique(return_counts=True)[1] > 1).any()):
        metrics["advantage/tied_groups"] = tied_fraction(returns, outcome.group)
    own = distributed.own_columns
    target = None if estimate.target is None else own(estimate.target)
    if estimate.target is not None and value is not None:
        left = (estimate.target - value)[outcome.valid].var(correction=0)
        total = estimate.target[outcome.valid].var(correction=0)
        metrics["value/explained"] = float(1 - left / total.clamp(min=1e-12))
    return Estimate(own(estimate.advantage), target, estimate.statistics), metrics


def _decisions(pieces: OnPolicy, advantage: Tensor) -> Tensor:
    """Those that the surrogate can learn from: all, or the ones of non-zero weight if there are any."""
    chosen = advantage.nonzero().flatten()
    selective = pieces.surrogate.selective or pieces.optimization.skip_zero_advantage
    if selective and distributed.sum_scalar(float(len(chosen))):
        return chosen
    return torch.arange(len(advantage), device=advantage.device)


def _behavior(pieces: OnPolicy, state: TrainState) -> AbstractContextManager[None]:
    return state.ema_modules() if pieces.behavior == "averaged" else nullcontext()


def _update_policy(pieces: OnPolicy, policy: DiffusionPolicy, rollout: Rollout, examples: ExampleSet,
                   estimate: Estimate, state: TrainState, reference: Denoiser | None,
                   demonstrations: Batch | None) -> Metrics:
    """All optimizer steps of one rollout; the mean of their metrics."""
    plan = pieces.optimization
    held = anchors(pieces, policy, state, reference)
    kept = rollout.valid.flatten()
    collected: list[Metrics] = []
    for _ in range(plan.epochs):
        chunks = _minibatches(len(examples), plan.minibatches, state.generator, examples.place)
        value_chunks = _minibatches(rollout.reward.numel(), plan.minibatches, state.generator)
        for index, decisions in zip(chunks, value_chunks, strict=True):
            losses: list[tuple[float, update.Loss]] = []
            first = not collected and pieces.behavior == "live"
            if state.step >= plan.critic_warmup:
                index = index[kept[examples.decision[index]]]
                losses += [(weight, partial(policy_loss, pieces, policy, examples, part, held, first))
                           for weight, part in _microbatches(index, plan.microbatch_rows, state.modules["policy"])]
                if demonstrations is not None and pieces.behavior_cloning:
                    share = 1 / distributed.world_size()  # every rank draws the same demonstrations
                    losses.append((share, partial(cloning_loss, pieces, policy, demonstrations, state.generator)))
            if pieces.needs_critic and estimate.target is not None:
                decisions = decisions[kept[decisions]]
                losses += [(weight, partial(value_loss, pieces, rollout, estimate.target, part, state))
                           for weight, part in _microbatches(decisions, plan.microbatch_rows, state.modules["critic"])]
            collected.append(update.step(state, losses, max_grad_norm=plan.max_grad_norm))
    metrics = {name: sum(m[name] for m in collected if name in m) / sum(name in m for m in collected)
               for name in collected[-1]}
    if "ratio_drift" in collected[0]:
        metrics["ratio_drift"] = collected[0]["ratio_drift"]
    return metrics


def _minibatches(rows: int, count: int, generator: torch.Generator, place: Tensor | None = None
                 ) -> tuple[Tensor, ...]:
    """`count` parts of a permutation of this process's rows.

    The permutation runs over the rows of all processes and every rank keeps its own, so that the ranks' parts make up
    the parts that one process would use. place: where each row would be in one process; None: rank after rank.
    """
    first, total, _ = _counts(rows, generator)
    if total < count:
        raise ValueError(f"{total} rows cannot fill {count} minibatches; collect more or lower minibatches")
    order = torch.randperm(total, generator=generator, device=generator.device)
    everything = torch.arange(total, device=generator.device)
    turn = torch.empty_like(order).scatter_(0, order, everything)[first + everything[:rows] if place is None else place]
    own = turn.argsort()
    return tuple(own[(turn[own] >= part[0]) & (turn[own] <= part[-1])] for part in everything.tensor_split(count))


def _counts(rows: int, generator: torch.Generator) -> tuple[int, int, int]:
    """How many rows the earlier processes have, all of them, and the later ones."""
    of_ranks = distributed.gather_columns(torch.tensor([rows], device=generator.device)).tolist()
    before, total = sum(of_ranks[: distributed.rank()]), sum(of_ranks)
    return before, total, total - before - rows


def _microbatches(index: Tensor, size: int, module: nn.Module) -> list[tuple[float, Tensor]]:
    """(fraction of the minibatch over all processes, rows) pairs; some without rows if the module is sharded."""
    total = distributed.sum_scalar(float(len(index)))
    parts = [part for part in index.split(size) if len(part)]
    parts += [index[:0]] * sharding.shortfall(module, len(parts))
    return [(len(part) / total, part) for part in parts]
