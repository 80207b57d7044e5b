"""The losses of the on-policy loop: surrogate plus penalties, value regression, behaviour cloning.

Legend: M rows of a microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser, select_rows
from diffalign.rl.likelihoods import ExampleSet, Rows, Scored
from diffalign.rl.regularizers import reference_kl, velocity_mse
from diffalign.rl.rollouts import Rollout
from diffalign.train.pieces import OnPolicy
from diffalign.train.state import TrainState, frozen_copy
from diffalign.train.supervised import Batch, denoising_loss

Metrics = dict[str, float]


class RatioDrift(ValueError):
    """The likelihood ratio was not 1 on the first minibatch after a rollout: sampling and scoring disagree."""


def anchors(pieces: OnPolicy, policy: DiffusionPolicy, state: TrainState, reference: Denoiser | None
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


def policy_loss(pieces: OnPolicy, policy: DiffusionPolicy, examples: ExampleSet, index: Tensor,
                anchors: Mapping[str, DiffusionPolicy], first: bool) -> tuple[Tensor, Metrics]:
    """Mean surrogate plus weighted penalties of a microbatch; `first` checks that the ratio is 1.

    Raises: RatioDrift.
    """
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
    if pieces.entropy and new.gaussian is not None:
        found["entropy/minus"] = pieces.entropy, -new.gaussian.entropy() / new.dims
    if pieces.ema_velocity:
        found["velocity/ema"] = pieces.ema_velocity, velocity_mse(new, scored["ema"])
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
