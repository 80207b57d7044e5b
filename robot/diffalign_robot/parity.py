"""How far an exported file is from the torch policy that it was made of, and how fast both are.

Legend: N observations, Do observation features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign_robot.demos import Demonstrations
from diffalign_robot.exported import ExportedPolicy
from diffalign_robot.formats import Decide
from diffalign_robot.source import chunk_denoiser


def random_observations(policy: ExportedPolicy, count: int, generator: torch.Generator) -> Float[Tensor, "N Do"]:
    """Normal draws with the mean and spread of the training observations."""
    normalizer = chunk_denoiser(policy.policy).observation_normalizer
    return normalizer.unnormalize(torch.randn(count, len(normalizer.shift), generator=generator))


def real_observations(folder: Path, count: int, history: int, generator: torch.Generator) -> Float[Tensor, "N Do"]:
    """As many observations of recorded episodes as there are, at most `count`, without replacement.

    history: each comes with that many less one before it, as the policy sees them.
    """
    obs = Demonstrations.load(folder).with_history(history).obs
    return obs[torch.randperm(len(obs), generator=generator)[:count]]


def difference(policy: ExportedPolicy, decide: Decide, obs: Float[Tensor, "N Do"], generator: torch.Generator
               ) -> dict[str, float]:
    """max_abs_difference and mean_abs_difference of the chunks of all observations, in robot units, on the same noise.

    Raises: ValueError if the file's chunks are not finite.
    """
    noise = policy.draw(len(obs), generator)
    wanted = policy(obs, **noise).numpy()
    found = chunks_of(policy, decide, obs, noise)
    if not np.isfinite(found).all():
        raise ValueError("the exported file decides NaN or infinity where the torch policy does not; nothing was "
                         "written. With --precision fp16 a number may be too large for it; use fp32")
    apart = np.abs(found - wanted)
    return {"max_abs_difference": float(apart.max()), "mean_abs_difference": float(apart.mean())}


def chunks_of(policy: ExportedPolicy, decide: Decide, obs: Float[Tensor, "N Do"], noise: Mapping[str, Tensor]
              ) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The chunks [N, Ta, Da] that an exported file decides, one observation at a time."""
    each = {name: values.numpy() for name, values in {"obs": obs, **noise}.items()}
    rows = {name: shape[0] for name, shape in policy.shapes.items()}
    return np.concatenate([decide({name: values[i * rows[name] : (i + 1) * rows[name]]
                                   for name, values in each.items()}) for i in range(len(obs))])


def latency(policy: ExportedPolicy, decide: Decide, *, calls: int, generator: torch.Generator) -> dict[str, Any]:
    """Milliseconds of one decision, p50 and p99, by onnxruntime and by eager torch on one thread, in turns."""
    inputs = {"obs": random_observations(policy, 1, generator), **policy.draw(1, generator)}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _in_turns({"onnxruntime": lambda: decide(arrays), "torch": lambda: policy(**inputs)}, calls)
    finally:
        torch.set_num_threads(threads)
    measured = {name: {f"p{p}_ms": float(np.percentile(spent, p)) for p in (50, 99)} for name, spent in times.items()}
    speedup = measured["torch"]["p50_ms"] / measured["onnxruntime"]["p50_ms"]
    return {**measured, "speedup_p50": speedup, "calls": calls, "threads": 1, "batch": 1}


def _in_turns(contenders: Mapping[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(calls + 20):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if number >= 20:  # the first calls allocate
                spent[name].append(1000 * (time.perf_counter() - start))
    return spent
