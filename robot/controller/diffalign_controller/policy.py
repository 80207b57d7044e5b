"""An exported policy, read from its package and checked before it decides anything.

Legend: n chains, K denoising steps, Ta actions of a chunk, Da action features, h observations of a decision, Do
features of them all.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.inference import Plan

Array = NDArray[np.float32]
FORMAT = 1
_NOISE, _PLAN = ("noise", "step_noise"), ("previous", "weight")
_INPUTS = {"obs", *_NOISE, *_PLAN}


class Policy:
    """Decides chunks: a function of the observation and of standard normal noise that it draws from its seed.

    chunk, action_dim, obs_dim: Ta, Da, Do. history: h; a decision reads the newest observation after the h - 1 before
    it, one control period apart (history.History). low, high: the action limits [Da] in robot units, +-inf where there
    is none.
    """

    def __init__(self, folder: Path, *, seed: int = 0) -> None:
        """Raises: ValueError if the package is incomplete, of another format, or not the one that was exported."""
        import onnxruntime

        self.manifest = read_manifest(folder)
        self.shapes = {entry["name"]: tuple(entry["shape"]) for entry in self.manifest["inputs"]}
        self.chunk, self.action_dim = self.manifest["outputs"][0]["shape"][1:]
        self.obs_dim, self.history = self.shapes["obs"][1], self.manifest.get("history", 1)
        if self.obs_dim % self.history:
            raise ValueError(f"{folder / 'manifest.json'} says that {self.obs_dim} features are {self.history} "
                             "observations, which they cannot be; export the run again")
        limits = self.manifest["action"]
        self.low, self.high = _limit(limits["low"], -np.inf), _limit(limits["high"], np.inf)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(str(folder / "policy.onnx"), options,
                                                          providers=["CPUExecutionProvider"])
        _require_same_inputs(self._session, self.shapes)
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start the noise anew: the same seed and observations give the same chunks."""
        self._random = np.random.default_rng(seed)

    @property
    def reads_plan(self) -> bool:
        """Whether it was exported with the inputs of real-time chunking."""
        return set(_PLAN) <= set(self.shapes)

    def decide(self, obs: Array, plan: Plan | None = None) -> Array:
        """The chunk [Ta, Da] in robot units for h observations [Do]; it is not yet inside any limit.

        plan: what the chunk should go on from; None leaves it free.

        Raises: ValueError for an observation of another shape or with NaN or infinity in it, or for a plan where the
        policy was exported without the inputs of one.
        """
        noise = {name: self._random.standard_normal(shape, np.float32)
                 for name, shape in self.shapes.items() if name in _NOISE}
        return self.chunk_of(obs, noise, plan)

    def chunk_of(self, obs: Array, noise: dict[str, Array], plan: Plan | None = None) -> Array:
        """The chunk [Ta, Da] for h observations [Do] and given noise by input name."""
        if obs.shape != (self.obs_dim,):
            raise ValueError(f"this policy reads observations of shape ({self.obs_dim},), got {obs.shape}")
        if not np.isfinite(obs).all():
            raise ValueError(f"feature {int(np.argmin(np.isfinite(obs)))} of the observation is not finite")
        inputs = {"obs": obs[None].astype(np.float32), **noise, **self._planned(plan)}
        found: Array = self._session.run(None, inputs)[0][0]
        return found

    def _planned(self, plan: Plan | None) -> dict[str, Array]:
        if plan is not None and not self.reads_plan:
            raise ValueError("this policy was exported without real-time chunking and cannot be told a plan; export "
                             "the run with --real-time-chunking --sampler ode")
        if not self.reads_plan:
            return {}
        free = Plan(np.zeros((self.chunk, self.action_dim), np.float32), np.zeros(self.chunk, np.float32))
        return {name: part[None].astype(np.float32) for name, part in zip(_PLAN, plan or free)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a package whose files are those that were exported.

    Raises: ValueError if a file is missing, was changed, or has a format that this runtime does not know.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no controller package (it has no manifest.json); make one with "
                         f"`diffalign export RUN --to {folder}`")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); export the run again") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} has format {manifest.get('format')!r}, this runtime reads {FORMAT}; export the run "
                         "again, or install the runtime of the version that exported it")
    for name, wanted in manifest["sha256"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; export the run again")
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != wanted:
            raise ValueError(f"{folder / name} is not what was exported (sha256 {found[:12]}..., the manifest says "
                             f"{wanted[:12]}...); copy the package again, or export the run again")
    return manifest


def _require_same_inputs(session: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {value.name: tuple(value.shape) for value in session.get_inputs()}
    if found != shapes or not set(shapes) <= _INPUTS:
        raise ValueError(f"policy.onnx reads {found}, the manifest says {shapes}, and this runtime can give "
                         f"{sorted(_INPUTS)}; export the run again")


def _limit(values: list[float | None], missing: float) -> Array:
    return np.array([missing if value is None else value for value in values], np.float32)
