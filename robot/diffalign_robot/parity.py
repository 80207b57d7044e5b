"""How far an ONNX graph is from the torch policy that it was made of, and how fast both are.

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
from diffalign_robot.source import chunk_denoiser


def open_session(file: Path) -> Any:
    """An onnxruntime session on one CPU thread. Raises: ModuleNotFoundError without the export extra."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def random_observations(policy: ExportedPolicy, count: int, generator: torch.Generator) -> Float[Tensor, "N Do"]:
    """Normal draws with the mean and spread of the training observations."""
    normalizer = chunk_denoiser(policy.policy).observation_normalizer
    return normalizer.unnormalize(torch.randn(count, len(normalizer.shift), generator=generator))


def real_observations(folder: Path, count: int, generator: torch.Generator) -> Float[Tensor, "N Do"]:
    """As many observations of recorded episodes as there are, at most `count`, without replacement."""
    obs = Demonstrations.load(folder).obs
    return obs[torch.randperm(len(obs), generator=generator)[:count]]


def difference(policy: ExportedPolicy, session: Any, obs: Float[Tensor, "N Do"], generator: torch.Generator) -> float:
    """The largest |torch - onnxruntime| over the chunks of all observations, in robot units, on the same noise."""
    noise = policy.draw(len(obs), generator)
    wanted = policy(obs, **noise).numpy()
    each = {"obs": obs.numpy(), **{name: values.numpy() for name, values in noise.items()}}
    rows = {name: shape[0] for name, shape in policy.shapes.items()}
    found = []
    for i in range(len(obs)):
        inputs = {name: values[i * rows[name] : (i + 1) * rows[name]] for name, values in each.items()}
        found.append(session.run(None, inputs)[0])
    return float(np.abs(np.concatenate(found) - wanted).max())


def latency(policy: ExportedPolicy, session: Any, *, calls: int, generator: torch.Generator) -> dict[str, Any]:
    """Milliseconds of one decision, p50 and p99, by onnxruntime and by eager torch on one thread, in turns."""
    inputs = {"obs": random_observations(policy, 1, generator), **policy.draw(1, generator)}
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _in_turns({"onnxruntime": lambda: session.run(None, arrays), "torch": lambda: policy(**inputs)}, calls)
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
