"""Where the time of an iteration goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by stage between two calls of `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done within the block; on a GPU its work is waited for."""
        begun = _now()
        try:
            yield
        finally:
            self.add(name, _now() - begun)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self, images: int, processes: int) -> dict[str, float]:
        """Rates and milliseconds since the last call, for `images` images of all processes; then start again.

        `update_ms` is what is neither sampling, decoding nor waiting for rewards. `reward_ms` is work of the rewards,
        in their own threads, and `reward_wait_ms` what of it was waited for. Peak memory only on a GPU.
        """
        total = _now() - self._begun
        own = sum(self._seconds.get(name, 0.0) for name in ("sample", "decode", "reward_wait"))
        found = {"images_per_s": images / total, "images_per_device_hour": 3600 * images / total / processes,
                 "iteration_ms": 1000 * total, "update_ms": 1000 * (total - own),
                 **{f"{name}_ms": 1000 * seconds for name, seconds in self._seconds.items()}}
        if torch.cuda.is_available():
            found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        self._seconds, self._begun = {}, time.perf_counter()
        return found


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
