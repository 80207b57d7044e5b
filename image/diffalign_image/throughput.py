"""Where the time of an iteration goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4}  # dense bf16, SXM (NVIDIA's data sheets); PCIe and NVL have less


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


class Utilization:
    """Model FLOP utilization (MFU) of one process's device; nothing where its peak is not known.

    peak_tflops: the device's peak in 10^12 FLOP/s for the precision in use; None takes that of an H100 or H200 in bf16.
    """

    def __init__(self, peak_tflops: float | None) -> None:
        self.peak_tflops = known_peak() if peak_tflops is None else peak_tflops
        self.flops: int | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the FLOPs of the first block, of this thread alone: sampling, decoding and updates, not the rewards.

        Matrix products, convolutions and attention count, forward, backward and what gradient checkpointing repeats.
        """
        if self.peak_tflops is None or self.flops is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def of(self, seconds: float) -> dict[str, float]:
        """`mfu`, the share of the peak, and `tflops` of an iteration that took this long."""
        if self.peak_tflops is None or self.flops is None:
            return {}
        return {"tflops": self.flops / 1e12, "mfu": self.flops / 1e12 / seconds / self.peak_tflops}


def known_peak() -> float | None:
    """The current GPU's entry in PEAK_TFLOPS, or None."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if "PCIe" in name or "NVL" in name:
        return None
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
