"""The losses of the on-policy loop: surrogate plus penalties, value regression, behaviour cloning.

Legend: M rows of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser, select_rows
from diffalign.rl.likelihoods import ExampleSet, Rows, Scored
from diffalign.rl.regularizers import reference_kl, velocity_mse
from diffalign.rl.rollouts import Rollout
from diffalign.train.pieces import OnPolicy
from diffalign.train.state import TrainState, holding
from diffalign.train.supervised import Batch, denoising_loss

Metrics = dict[str, float]
Anchor = Callable[[Rows], Scored]


class RatioDrift(ValueError):
    """The likelihood ratio was not 1 on the first minibatch after a rollout: sampling and scoring disagree."""


def anchors(pieces: OnPolicy, policy: DiffusionPolicy, state: TrainState, reference: Denoiser | None
            ) -> Mapping[str, Anchor]:
    """The scores of the policies that hold this update back, by name; the average is that of before the update."""
    anchors: dict[str, Anchor] = {}
    score = pieces.likelihood.score
    if reference is not None and pieces.needs_reference:
        anchors["reference"] = partial(score, replace(policy, denoiser=reference))
    if pieces.ema_velocity and state.ema is not None:
        weights = {name: weight.clone() for name, weight in state.ema.weights.items()}

        def averaged(rows: Rows) -> Scored:
            with holding(state.modules["policy"], weights):
                return score(policy, rows)

        anchors["ema"] = averaged
    return anchors


def policy_loss(pieces: OnPolicy, policy: DiffusionPolicy, examples: ExampleSet, index: Tensor,
                anchors: Mapping[str, Anchor], first: bool) -> tuple[Tensor, Metrics]:
    """Mean surrogate plus weighted penalties of a microbatch; `first` checks that the ratio is 1.

    A microbatch without rows has loss 0, and asks the same networks as any other.

    Raises: RatioDrift.
    """
    rows = examples.rows(index)
    with torch.no_grad():  # before the policy is asked: an anchor may hold other weights in its network meanwhile
        anchored = {name: score(rows) for name, score in anchors.items()}
    new = pieces.likelihood.score(policy, rows)
    if not len(index):
        return new.log_prob.sum(), {}
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
    penalties = _penalties(pieces, new, anchored)
    for name, (weight, penalty) in penalties.items():
        loss = loss + weight * penalty
        metrics[name] = float(penalty.detach().mean())
    return loss.mean(), metrics


def _penalties(pieces: OnPolicy, new: Scored, anchored: Mapping[str, Scored]) -> dict[str, tuple[float, Tensor]]:
    """(weight, penalty [M]) by metric name."""
    found: dict[str, tuple[float, Tensor]] = {}
    if pieces.reference_kl:
        found["kl/reference"] = pieces.reference_kl, reference_kl(new, anchored["reference"])
    if pieces.reference_velocity:
        found["velocity/reference"] = pieces.reference_velocity, velocity_mse(new, anchored["reference"])
    if pieces.entropy and new.gaussian is not None:
        found["entropy/minus"] = pieces.entropy, -new.gaussian.entropy() / new.dims
    if pieces.ema_velocity:
        found["velocity/ema"] = pieces.ema_velocity, velocity_mse(new, anchored["ema"])
    return found


def value_loss(pieces: OnPolicy, rollout: Rollout, target: Tensor, index: Tensor, state: TrainState
               ) -> tuple[Tensor, Metrics]:
    """value_loss times the squared error to the value targets of decisions `index`."""
    value = state.modules["critic"](select_rows(rollout.trajectory.cond, index))
    error = ((value - target.flatten()[index]) ** 2).mean()
    return pieces.value_loss * error, {"value/loss": float(error.detach())}


def cloning_loss(pieces: OnPolicy, policy: DiffusionPolicy, demonstrations: Batch, generator: torch.Generator
                 ) -> tuple[Tensor, Metrics]:
    """behavior_cloning times the pre-training loss on a batch of demonstrations, on the policy's own grid."""
    x0, cond = demonstrations(generator)
    grid = policy.schedule.times()[:-1].to(x0.device)
    t = grid[torch.randint(len(grid), (x0.shape[0],), generator=generator, device=x0.device)]
    eps = torch.randn(x0.shape, generator=generator, device=x0.device)
    error = denoising_loss(policy, x0, cond, t, eps).mean()
    return pieces.behavior_cloning * error, {"behavior_cloning": float(error.detach())}
