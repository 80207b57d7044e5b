"""Several processes: what torchrun or `accelerate launch` started is joined into one group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_PATIENCE = timedelta(hours=6)  # the first process evaluates alone while the others wait
_MANY = ("image_finetune",)
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}  # set by `accelerate launch`


@contextmanager
def processes(job_type: str) -> Iterator[None]:
    """torch.distributed from WORLD_SIZE, RANK, LOCAL_RANK and MASTER_*; without them, or with one process, nothing.

    Raises: ValueError for a job that one process must run, and under a launcher that was told to shard the model: here
    every process holds all of it, so that the setting would do nothing.
    """
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ValueError(f"accelerate was told to use {name}, which shards a model; here every process holds the "
                             "whole model and gradients are summed. Launch with configs/accelerate/ddp.yaml, and save "
                             "memory by model.lora, model.gradient_checkpointing or a smaller model.batch_rows")
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
