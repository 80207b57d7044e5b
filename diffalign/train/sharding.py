"""Weights spread over the processes: torch's fully sharded data parallelism (FSDP2), all that is known of it here.

Every rank holds a slice of each weight, and of its gradient, moments and average. A call of a sharded module, and its
backward pass, is a collective: all ranks must make the same calls in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffalign.train import distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def shard(module: nn.Module, device: torch.device, *, kept: frozenset[nn.Parameter] = frozenset()) -> None:
    """Spread a module's weights over all ranks, in place; they may lie on the CPU and move to the device in parts.

    The members of its outermost module lists are gathered one at a time when they are called, what is left as one
    more. Gradients are summed over the ranks, not averaged. kept: parameters that every rank holds whole; their
    gradients are not touched.

    Raises: ValueError if this torch cannot sum instead of average.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"sharding needs a torch whose FSDP2 can sum gradients, got {torch.__version__}; install the "
                         "one that constraints.txt names")
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for part in (*_blocks(module), module):
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=set(kept))
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo can neither average nor scale


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether this rank holds only a slice of a tensor."""
    known = sys.modules.get("torch.distributed.tensor")  # takes seconds to import; before that, none is sharded
    return known is not None and isinstance(tensor, known.DTensor)


def any_sharded(module: nn.Module) -> bool:
    """Whether this rank holds only a slice of some weight of a module."""
    return any(is_sharded(parameter) for parameter in module.parameters())


def shortfall(module: nn.Module, calls: int) -> int:
    """How many calls of a module, beside this rank's own, another rank will make; 0 for one that is not sharded.

    All ranks must ask, and then call it for nothing that often.
    """
    if distributed.world_size() == 1 or not any_sharded(module):
        return 0
    return distributed.largest(calls) - calls


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all slices, on every rank; all ranks must ask. One that is not sharded is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name in the CPU's memory of the first rank, none on the others; all ranks must ask."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if distributed.leads():
            found[name] = full.cpu()
    return found


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, spread as `like` is; if that is whole, the tensor itself."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
