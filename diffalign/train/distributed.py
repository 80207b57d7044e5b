"""The few collectives that data-parallel training needs; identities in one process.

Every rank holds the same TrainState (and the same generator) and collects its own episodes; advantages are computed
on the gathered batch and gradients are summed, so that neither depends on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 in one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    """Whether this process is the one that writes the run folder."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def from_leader(value: T) -> T:
    """The first rank's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_columns(x: Tensor) -> Tensor:
    """Concatenate [..., B] of every rank along the last axis, in rank order; B must be equal on all ranks."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    if x.dtype == torch.bool:
        return gather_columns(x.to(torch.uint8)).bool()
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, -1)


def own_columns(x: Tensor) -> Tensor:
    """This rank's slice of a gathered [..., world * B]."""
    width = x.shape[-1] // world_size()
    return x[..., rank() * width : (rank() + 1) * width]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks; a gradient that is missing on every rank stays missing.

    A zero instead would make the optimizer count a step (and decay weights) that one process does not take.
    """
    parameters = list(parameters)
    if world_size() == 1 or not parameters:
        return
    holders = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(holders)
    for parameter, count in zip(parameters, holders.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def sum_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """By name the sum over all ranks; a rank without the name adds nothing."""
    if world_size() == 1:
        return dict(metrics)
    parts: list[dict[str, float]] = [{} for _ in range(world_size())]
    dist.all_gather_object(parts, dict(metrics))
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def largest(count: int) -> int:
    """The largest of the ranks' numbers."""
    if world_size() == 1:
        return count
    found = torch.tensor(count)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def sum_scalar(value: float) -> float:
    """The sum of a number over all ranks."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
