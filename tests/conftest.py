"""One thread, no network, fixed seeds: what every test of this project runs under."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Iterator

# Before torch, transformers or mujoco are imported; subprocesses of tests inherit it.
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(prefix="diffalign_hf_"),
                   "WANDB_MODE": "offline", "MUJOCO_GL": "egl", "TOKENIZERS_PARALLELISM": "false"})

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Busy machines make single examples slow; derandomize, so that a run either passes or fails.
settings.register_profile("diffalign", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("diffalign")


@pytest.fixture(autouse=True)
def _fixed_start() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code draws from the legacy generator
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)  # a command that a test runs in this process sets its own


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections leave this machine nowhere; loopback and Unix sockets (torch.distributed, wandb) are allowed."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guard(address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
            raise OSError(f"tests must not use the network, got a connection to {host}")

    def guarded(self: socket.socket, address: object) -> None:
        guard(address)
        connect(self, address)

    def guarded_ex(self: socket.socket, address: object) -> int:
        guard(address)
        return connect_ex(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_ex)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
