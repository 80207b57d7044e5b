"""A run's policy as a controller package: policy.onnx (and policy.pt2), manifest.json and report.json, or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from diffalign.train import checkpoint
from diffalign.train.run import Run
from diffalign_robot.envs import make
from diffalign_robot.evaluate import Sampler, describe, evaluation_policy
from diffalign_robot.evaluation import TrainedJob
from diffalign_robot.exported import ExportedPolicy
from diffalign_robot.formats import OPSET, Decide, Precision, open_archive, open_graph, write_archive, write_graph
from diffalign_robot.parity import difference, latency, random_observations, real_observations
from diffalign_robot.runs import config_of
from diffalign_robot.source import chunk_denoiser

FORMAT = 1
GRAPH, ARCHIVE = "policy.onnx", "policy.pt2"
TOLERANCE = 1e-4  # of a chunk's numbers, in robot units; float32 keeps it
_ARCHIVE_SAMPLES = 100  # an archive is run by eager torch, ten times as slow
_MEANING = {"obs": "observation, as the environment gives it; of a history the oldest first",
            "noise": "standard normal draws: where the chains start",
            "step_noise": "standard normal draws: the noise of the denoising steps",
            "previous": "real-time chunking: the actions of the previous chunk from now on, in the environment's units",
            "weight": "real-time chunking: how much each of them holds, 1 (will be executed) to 0 (free)"}


@runtime_checkable
class ExportableJob(TrainedJob, Protocol):
    """What an export, and a rehearsal of it in the simulator, need from a robot job."""

    @property
    def type(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a policy is packed.

    precision: of the networks' products in policy.onnx. archive: also policy.pt2 of torch.export, always in fp32.
    chunking: with the inputs of real-time chunking.
    tolerance: the largest difference to the torch policy, in robot units; None is 1e-4 for fp32, else no limit.
    samples, calls: of the parity and latency report.

    Raises: ValueError if fp32 is to be held to anything but 1e-4, or a tolerance is not positive.
    """

    precision: Precision = "fp32"
    archive: bool = False
    chunking: bool = False
    tolerance: float | None = None
    samples: int = 1000
    calls: int = 500

    def __post_init__(self) -> None:
        if self.tolerance is not None and self.precision == "fp32":
            raise ValueError(f"fp32 is always held to {TOLERANCE:g}, got a tolerance of {self.tolerance:g}; it is for "
                             "--precision fp16 and int8")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"a tolerance must be above 0, got {self.tolerance:g}")

    @property
    def limit(self) -> float | None:
        """The largest difference that is allowed, None for any."""
        return TOLERANCE if self.precision == "fp32" else self.tolerance


def export_run(run: Run, job: ExportableJob, to: Path, packing: Packing, *, sampler: Sampler | None = None
               ) -> dict[str, Any]:
    """Write the package of a run's trained policy into the folder `to`; returns its report.

    sampler: None takes the one that the run's recipe evaluates with.

    Raises: ValueError if `to` holds anything, if a part of the policy cannot be exported, or if a file differs from
    the torch policy by more than its limit; nothing is left behind then. ModuleNotFoundError without the export extra.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is not an empty folder; choose another --to, or remove it")
    sampler = sampler or job.evaluation.sampler
    policy = ExportedPolicy(evaluation_policy(job.trained_policy(run), sampler), packing.chunking)
    partial = to.parent / f".{to.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_graph(policy, partial / GRAPH, packing.precision)
        if packing.archive:
            write_archive(policy, partial / ARCHIVE)
        report = measure(policy, partial, demonstrations_of(run.path), packing)
        _write(partial / "manifest.json", manifest(policy, run, job, sampler, partial, packing))
        _write(partial / "report.json", report)
        os.replace(partial, to)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def measure(policy: ExportedPolicy, folder: Path, demonstrations: Path | None, packing: Packing) -> dict[str, Any]:
    """parity (in robot units) on random and, where there are any, recorded observations; size, loading and latency.

    Raises: ValueError if a file is not the policy.
    """
    generator = torch.Generator().manual_seed(0)
    seen = {"random": random_observations(policy, packing.samples, generator)}
    if demonstrations is not None:
        seen["recorded"] = real_observations(demonstrations, packing.samples, policy.history, generator)

    def parity(file: str, decide: Decide, limit: float | None, samples: int) -> dict[str, Any]:
        some = {name: obs[:samples] for name, obs in seen.items()}
        found = {name: {"observations": len(obs), **difference(policy, decide, obs, generator)}
                 for name, obs in some.items()}
        refuse_difference(file, {name: each["max_abs_difference"] for name, each in found.items()}, limit)
        return {**found, "tolerance": limit}

    start = time.perf_counter()
    decide = open_graph(folder / GRAPH)
    loaded_ms = 1000 * (time.perf_counter() - start)
    report = {"precision": packing.precision, "parity": parity(GRAPH, decide, packing.limit, packing.samples)}
    if packing.archive:
        report["archive_parity"] = parity(ARCHIVE, open_archive(folder / ARCHIVE), TOLERANCE, _ARCHIVE_SAMPLES)
    return {**report, "graph": {"bytes": (folder / GRAPH).stat().st_size, "load_ms": loaded_ms},
            "latency": latency(policy, decide, calls=packing.calls, generator=generator)}


def refuse_difference(file: str, found: dict[str, float], limit: float | None) -> None:
    """Raises: ValueError if a file is further from the policy than its limit."""
    for name, value in found.items():
        if limit is not None and not value <= limit:
            raise ValueError(f"the exported {file} differs from the torch policy by {value:.3g} on {name} "
                             f"observations, at most {limit:g} is allowed; nothing was written. If the policy ranks "
                             "candidates, two may be as good as equal: look at the critic; in fp16 or int8 try a "
                             "higher precision; otherwise report this as a defect")


def manifest(policy: ExportedPolicy, run: Run, job: ExportableJob, sampler: Sampler, folder: Path,
             packing: Packing) -> dict[str, Any]:
    """What a controller must know to run the policy, and where it comes from; no path of this machine."""
    denoiser, episode = chunk_denoiser(policy.policy), make(job.environment)
    low, high, rate_hz = episode.action_low.tolist(), episode.action_high.tolist(), episode.control_rate_hz
    episode.close()
    chunk, action_dim = denoiser.event
    newest = checkpoint.latest(run.path / "checkpoints")
    normalizers = {"observation": denoiser.observation_normalizer, "action": denoiser.action_normalizer}
    return {
        "format": FORMAT,
        "inputs": [{"name": name, "shape": list(shape), "dtype": "float32", "meaning": _MEANING[name]}
                   for name, shape in policy.shapes.items()],
        "outputs": [{"name": "chunk", "shape": [1, chunk, action_dim], "dtype": "float32",
                     "meaning": "actions in the environment's units, one a control step, not clipped to the limits"}],
        "precision": packing.precision,
        "chunk": chunk,
        "history": policy.history,
        "action": {"low": _finite(low), "high": _finite(high)},
        "control_rate_hz": rate_hz,
        "sampler": describe(policy.policy, sampler),
        "normalizers": {name: {"shift": part.shift.tolist(), "scale": part.scale.tolist(),
                               "note": f"already inside {GRAPH}"} for name, part in normalizers.items()},
        "environment": dataclasses.asdict(job.environment),
        "provenance": {"run": run.path.resolve().name, "type": job.type, "checkpoint": newest and newest.name,
                       "opset": OPSET,
                       "versions": {name: version(name) for name in ("diffalign", "torch", "onnx", "onnxscript")}},
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
                   for name in (GRAPH, ARCHIVE) if (folder / name).is_file()},
    }


def demonstrations_of(folder: Path) -> Path | None:
    """The folder of recorded episodes that a run goes back to, None if it is gone."""
    config = config_of(folder, "diffalign train CONFIG")
    said = [config["data"]] if "data" in config else [*config.get("demonstrations", ()), config.get("base")]
    for found in (Path(name) for name in said if name is not None):
        if (found / "demonstrations.safetensors").is_file():
            return found
        if (found / "config.yaml").is_file():
            return demonstrations_of(found)
    return None


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
