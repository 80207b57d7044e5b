"""One optimizer step: accumulate microbatches, check, clip, step, average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from diffalign.train import distributed, sharding
from diffalign.train.state import TrainState

Loss = Callable[[], tuple[Tensor, Mapping[str, float]]]


class NonFinite(FloatingPointError):
    """Raised before an optimizer step would spread a NaN or an infinity; the weights are the last good ones."""


def step(state: TrainState, losses: Iterable[tuple[float, Loss]], *, max_grad_norm: float | None) -> dict[str, float]:
    """Mean metrics of one optimizer step.

    `losses` are (weight, closure) pairs, one per microbatch: the weights are the fractions of the rows, so that the
    gradient does not depend on how a batch is split. Each group's gradient is clipped to max_grad_norm by its own
    norm. Metrics gain `grad_norm/<module>` (before clipping).

    Raises: NonFinite naming the first bad loss, metric or gradient; nothing was updated then.
    """
    state.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, float] = {}
    for weight, loss_of in losses:
        loss, metrics = loss_of()
        for name, value in {**metrics, "loss": float(loss.detach())}.items():
            if not abs(value) < float("inf"):
                raise NonFinite(f"{name} is {value} at step {state.step}; the weights are those before this update. "
                                "Lower the learning rate or the trust region, or check the rewards and the data")
            totals[name] = totals.get(name, 0.0) + weight * value
        (weight * loss).backward()
    totals = distributed.sum_metrics(totals)
    distributed.sum_gradients(p for group in state.optimizer.param_groups for p in group["params"]
                              if not sharding.is_sharded(p))  # those were summed by their backward pass
    for group in state.optimizer.param_groups:
        totals[f"grad_norm/{group['name']}"] = _clip(state, group, max_grad_norm)
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update(state.modules["policy"])
    return totals


def _clip(state: TrainState, group: Mapping[str, object], max_grad_norm: float | None) -> float:
    module = state.modules[str(group["name"])]
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    norm = sharding.whole(torch.nn.utils.get_total_norm(gradients.values()))
    if not bool(torch.isfinite(norm)):
        bad = [name for name, gradient in gradients.items()
               if not bool(torch.isfinite(sharding.whole(gradient)).all())]
        what = f"gradient of {group['name']}.{bad[0]}" if bad else f"the gradient norm of {group['name']}"
        raise NonFinite(f"{what} is not finite at step {state.step}; "
                        "the weights are those before this update. Lower the learning rate or the trust region")
    if max_grad_norm is not None:
        scale = float(max_grad_norm / (norm + 1e-6))
        if scale < 1:
            for gradient in gradients.values():
                gradient.mul_(scale)
    return float(norm)
