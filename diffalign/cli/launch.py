"""Several processes: what torchrun or `accelerate launch` started is joined into one group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_PATIENCE = timedelta(hours=6)  # the first process evaluates alone while the others wait
_MANY = ("image_finetune",)


@contextmanager
def processes(job_type: str, *, shards: bool = False) -> Iterator[None]:
    """torch.distributed from WORLD_SIZE, RANK, LOCAL_RANK and MASTER_*; without them, or with one process, nothing.

    shards: the job spreads its model over the processes.

    Raises: ValueError for a job that one process must run, and under an `accelerate launch` that was told to shard the
    model where the job does not, or by DeepSpeed, so that the setting would do nothing.
    """
    if _told("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("accelerate was told to use DeepSpeed, which is not used here. Launch with "
                         "configs/accelerate/ddp.yaml; model.shard: true spreads a model over the processes (FSDP2)")
    if _told("ACCELERATE_USE_FSDP") and not shards:
        raise ValueError("accelerate was told to use FSDP, and this recipe leaves the whole model on every process. "
                         "Set model.shard: true (image_finetune), or launch with configs/accelerate/ddp.yaml")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if job_type not in _MANY:
        raise ValueError(f"a {job_type} job runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}; jobs for "
                         f"several are {', '.join(_MANY)}. Start it without torchrun or accelerate launch")
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _told(variable: str) -> bool:
    """Whether `accelerate launch` set a switch."""
    return os.environ.get(variable, "false").lower() in ("true", "1")
