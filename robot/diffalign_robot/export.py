"""A run's policy as a controller package: policy.onnx, manifest.json and report.json, complete or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from diffalign.train import checkpoint
from diffalign.train.run import Run
from diffalign_robot.choices import Environment
from diffalign_robot.envs import make
from diffalign_robot.evaluate import RobotPolicy, Sampler, describe, evaluation_policy
from diffalign_robot.evaluation import Evaluation
from diffalign_robot.exported import ExportedPolicy
from diffalign_robot.graphs import record
from diffalign_robot.parity import difference, latency, open_session, random_observations, real_observations
from diffalign_robot.runs import config_of
from diffalign_robot.source import chunk_denoiser

FORMAT = 1
OPSET = 18
TOLERANCE = 1e-4  # of a chunk's numbers, in robot units
_MEANING = {"obs": "observation, as the environment gives it", "noise": "standard normal draws: where the chains start",
            "step_noise": "standard normal draws: the noise of the denoising steps"}


@runtime_checkable
class ExportableJob(Protocol):
    """What an export needs from a robot job."""

    @property
    def type(self) -> str: ...
    @property
    def environment(self) -> Environment: ...
    @property
    def evaluation(self) -> Evaluation: ...
    def trained_policy(self, run: Run) -> RobotPolicy: ...


def export_run(run: Run, job: ExportableJob, to: Path, *, sampler: Sampler | None = None, samples: int = 1000,
               calls: int = 500) -> dict[str, Any]:
    """Write the package of a run's trained policy into the folder `to`; returns its report.

    sampler: None takes the one that the run's recipe evaluates with. samples, calls: of the parity and latency report.

    Raises: ValueError if `to` holds anything, if a part of the policy cannot be exported, or if the graph differs from
    the torch policy by more than 1e-4; nothing is left behind then. ModuleNotFoundError without the export extra.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is not an empty folder; choose another --to, or remove it")
    sampler = sampler or job.evaluation.sampler
    policy = ExportedPolicy(evaluation_policy(job.trained_policy(run), sampler))
    partial = to.parent / f".{to.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_graph(policy, partial / "policy.onnx")
        report = measure(policy, partial / "policy.onnx", demonstrations_of(run.path), samples=samples, calls=calls)
        refuse_difference(report["parity"])
        _write(partial / "manifest.json", manifest(policy, run, job, sampler, partial / "policy.onnx"))
        _write(partial / "report.json", report)
        os.replace(partial, to)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def write_graph(policy: ExportedPolicy, file: Path) -> None:
    """policy.onnx: one decision, the chain unrolled; what depends on no input is a constant."""
    import onnx  # noqa: F401 - says which extra is missing before the work
    import onnxscript  # noqa: F401

    examples = {name: torch.randn(shape) for name, shape in policy.shapes.items()}
    graph = record(policy, examples).eval()
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it misses torchvision, of which nothing is used
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own parts about each other
            torch.onnx.export(graph, tuple(examples.values()), str(file), input_names=list(examples),
                              output_names=["chunk"], opset_version=OPSET, dynamo=True, external_data=False,
                              verbose=False)
    finally:
        registration.setLevel(level)


def measure(policy: ExportedPolicy, file: Path, demonstrations: Path | None, *, samples: int, calls: int
            ) -> dict[str, Any]:
    """parity (max abs difference in robot units) on random and, where there are any, recorded observations; latency."""
    generator, session = torch.Generator().manual_seed(0), open_session(file)
    seen = {"random": random_observations(policy, samples, generator)}
    if demonstrations is not None:
        seen["recorded"] = real_observations(demonstrations, samples, generator)
    parity = {name: {"observations": len(obs), "max_abs_difference": difference(policy, session, obs, generator)}
              for name, obs in seen.items()}
    return {"parity": {**parity, "tolerance": TOLERANCE},
            "latency": latency(policy, session, calls=calls, generator=generator)}


def refuse_difference(parity: dict[str, Any]) -> None:
    """Raises: ValueError if the graph is not the policy."""
    for name in ("random", "recorded"):
        found = parity.get(name, {"max_abs_difference": 0.0})["max_abs_difference"]
        if not found <= TOLERANCE:
            raise ValueError(f"the exported graph differs from the torch policy by {found:.3g} on {name} observations, "
                             f"at most {TOLERANCE:g} is allowed; nothing was written. If the policy ranks candidates, "
                             "two may be as good as equal: look at the critic; otherwise report this as a defect")


def manifest(policy: ExportedPolicy, run: Run, job: ExportableJob, sampler: Sampler, file: Path) -> dict[str, Any]:
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
        "chunk": chunk,
        "action": {"low": _finite(low), "high": _finite(high)},
        "control_rate_hz": rate_hz,
        "sampler": describe(policy.policy, sampler),
        "normalizers": {name: {"shift": part.shift.tolist(), "scale": part.scale.tolist(),
                               "note": "already inside policy.onnx"} for name, part in normalizers.items()},
        "environment": dataclasses.asdict(job.environment),
        "provenance": {"run": run.path.resolve().name, "type": job.type, "checkpoint": newest and newest.name,
                       "opset": OPSET,
                       "versions": {name: version(name) for name in ("diffalign", "torch", "onnx", "onnxscript")}},
        "sha256": {"policy.onnx": hashlib.sha256(file.read_bytes()).hexdigest()},
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
