"""LeRobot's DiffusionPolicy on states (extra [lerobot]): its own U-Net and processors, as a policy of ours and back.

Legend: N rows, n observations of a history, Do observation features, Ta actions of the horizon, Da action features.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import DDPM, ODE, Prediction, Schedule, VPPath
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.normalize import Normalizer
from diffalign_robot.native.table import TableUNet
from diffalign_robot.networks import ChunkDenoiser

_STATE, _WORLD, _ACTION = "observation.state", "observation.environment_state", "action"
_STEPS = {"RenameObservationsProcessorStep", "AddBatchDimensionProcessorStep", "DeviceProcessorStep",
          "NormalizerProcessorStep", "UnnormalizerProcessorStep"}
_RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0"}


@dataclass(frozen=True)
class Native:
    """A policy folder as lerobot itself opens it, on the CPU. device: where its config wants to run."""

    policy: Any
    before: Any
    after: Any
    device: str | None

    @classmethod
    def open(cls, folder: Path) -> Native:
        """Raises: ValueError naming what is missing, or of what kind the policy is; ModuleNotFoundError for lerobot."""
        import lerobot  # says which extra is missing before anything else is looked at

        said = _config(folder)
        import draccus
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as LeRobotDiffusion
        from lerobot.policies.factory import make_pre_post_processors

        try:
            config: Any = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
        except draccus.utils.DecodingError as error:
            raise ValueError(f"{folder}/config.json is not one of LeRobot {lerobot.__version__} ({error}); read it "
                             "with the version that wrote it, 0.6 needs Python 3.12") from None
        config.device = "cpu"
        with redirect_stdout(sys.stderr):  # it prints where it loads from; our stdout is for results
            policy = LeRobotDiffusion.from_pretrained(folder, config=config, local_files_only=True, strict=True)
        here = {"device_processor": {"device": "cpu"}}
        before, after = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=here,
                                                 postprocessor_overrides=here)
        unknown = [type(step).__name__ for step in (*before.steps, *after.steps) if type(step).__name__ not in _STEPS]
        if unknown:
            raise ValueError(f"{folder}: the processing steps {unknown} are not known here; known are {sorted(_STEPS)}")
        return cls(policy, before, after, said.get("device"))

    @property
    def observed(self) -> list[str]:
        """The observations that the policy sees, in the order in which its U-Net takes them."""
        return [_STATE, _WORLD] if self.policy.config.env_state_feature else [_STATE]

    def split(self, obs: Float[Tensor, "N nDo"]) -> dict[str, Float[Tensor, "N n D"]]:
        """Our observations (a history, oldest first, each the state and then the environment's) by lerobot's names."""
        config = self.policy.config
        widths = [config.input_features[key].shape[0] for key in self.observed]
        parts = obs.reshape(len(obs), config.n_obs_steps, -1).split(widths, 2)
        return dict(zip(self.observed, parts, strict=True))

    def chunk(self, obs: Float[Tensor, "N nDo"], noise: Float[Tensor, "N Ta Da"], *, seed: int
              ) -> Float[Tensor, "N Te Da"]:
        """What lerobot itself does: the actions from given initial noise, its steps' noise drawn from the seed."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seen = self.before(self.split(obs))
            actions: Tensor = self.after(self.policy.diffusion.generate_actions(seen, noise=noise))
        return actions

    def save(self, to: Path) -> None:
        """Write the folder with lerobot's own means."""
        config, steps = self.policy.config, [*self.before.steps, *self.after.steps]
        found = [step for step in steps[:-1] if type(step).__name__ == "DeviceProcessorStep"]
        for owner in (config, *found):  # the last one brings the actions back to the CPU
            owner.device = self.device
        self.policy.save_pretrained(to)
        self.before.save_pretrained(to)
        self.after.save_pretrained(to)


def copy(folder: Path, to: Path) -> None:
    """The files that make up the policy, without a trainer's state. Raises: ValueError if one is missing."""
    _config(folder)
    to.mkdir(parents=True)
    for pattern in ("config.json", "*.safetensors", "policy_*processor.json"):
        for file in sorted(folder.glob(pattern)):
            shutil.copy(file, to)


def read(folder: Path, denoising_steps: int | None = None) -> DiffusionPolicy:
    """The policy of a folder that lerobot's save_pretrained wrote; its actions are lerobot's for equal noise.

    It sees n_obs_steps observations, each `observation.state` followed by `observation.environment_state`, denoises
    the whole horizon and executes n_action_steps of it. denoising_steps: None keeps those of its config. A feature that
    was constant in its data is normalized to -1 there and by 1 + the change elsewhere, where lerobot divides by 1e-8.

    Raises: ValueError for a policy with cameras or of another kind.
    """
    native = Native.open(folder)
    config = native.policy.config
    path = VPPath(betas=config.beta_schedule, train_steps=config.num_train_timesteps, beta_start=config.beta_start,
                  beta_end=config.beta_end)
    norms, before, after = _mended(native), _step(native.before, "Normalizer"), _step(native.after, "Unnormalizer")
    each = [_affine(norms, before, key, config.input_features[key]) for key in native.observed]
    low, scale, offset = (torch.cat(parts * config.n_obs_steps) for parts in map(list, zip(*each, strict=True)))
    observations = Normalizer.of(low, scale)
    low, scale, offset_of_actions = _affine(_statistics(after), after, _ACTION, config.action_feature)
    actions = Normalizer.of(low + offset_of_actions * scale, scale)
    net = TableUNet(native.policy.diffusion.unet, path, offset)
    # lerobot concatenates [state, environment] of one observation, then the next one's: as our histories are
    denoiser = ChunkDenoiser(net, config.horizon, observations, actions, history=config.n_obs_steps,
                             prediction=_PREDICTIONS[config.prediction_type])
    kernel = DDPM() if config.noise_scheduler_type == "DDPM" else ODE()
    steps = denoising_steps or config.num_inference_steps or config.num_train_timesteps
    schedule, first = Schedule(steps=steps, leading=config.num_train_timesteps), config.n_obs_steps - 1
    return DiffusionPolicy(denoiser, path, kernel, schedule, denoiser.event,
                           clip_x0=config.clip_sample_range if config.clip_sample else None, clipped_eps=False,
                           executed=(first, first + config.n_action_steps))


def write(policy: DiffusionPolicy, source: Path, to: Path) -> None:
    """Write the policy, read from `source` and trained since, as lerobot saves it: the new weights and sampler.

    Raises: ValueError for a way of sampling that lerobot does not have.
    """
    native, denoiser = Native.open(source), policy.denoiser
    assert isinstance(denoiser, ChunkDenoiser)
    assert isinstance(denoiser.net, TableUNet)
    if policy.zero_noise or not isinstance(policy.kernel, DDPM | ODE):
        said = "from zero noise" if policy.zero_noise else f"with {policy.kernel}"
        raise ValueError(f"lerobot samples by ddpm or by the ode (its DDIM) from random noise, this policy {said}; "
                         "export with --sampler ode")
    config = native.policy.config
    config.noise_scheduler_type = "DDPM" if isinstance(policy.kernel, DDPM) else "DDIM"
    config.num_inference_steps = policy.schedule.steps
    native.policy.diffusion.unet.load_state_dict(denoiser.net.unet.state_dict())
    flat = {f"{key}.{name}": value for key, stats in _mended(native).items() for name, value in stats.items()}
    _step(native.before, "Normalizer").load_state_dict(flat)
    native.save(to)


def difference(policy: DiffusionPolicy, folder: Path, obs: Float[Tensor, "N nDo"]) -> float:
    """The largest difference between our actions and those of lerobot for the folder, in robot units, on equal noise.

    obs: observations in the environment's units.
    """
    native, rows = Native.open(folder), len(obs)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(rows, *policy.event, generator=generator) for _ in range(policy.schedule.steps)]  # as it draws
    noise = torch.randn(rows, *policy.event, generator=generator)
    decision = policy.act({"obs": obs}, generator=generator, noise=noise, step_noise=torch.stack(steps, 1))
    assert isinstance(policy.denoiser, ChunkDenoiser)
    ours = policy.denoiser.action_normalizer.unnormalize(decision.action)
    return float((ours - native.chunk(obs, noise, seed=0)).abs().max())


def _config(folder: Path) -> dict[str, Any]:
    for name in ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; a folder written by lerobot's save_pretrained is needed, with "
                             "its processors (…/checkpoints/last/pretrained_model of lerobot-train)")
    said: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if said.get("type") != "diffusion":
        raise ValueError(f"{folder} holds a LeRobot policy of type {said.get('type')!r}; only diffusion is supported")
    cameras = [key for key, feature in said["input_features"].items() if feature["type"] == "VISUAL"]
    if cameras:
        raise ValueError(f"{folder} sees the cameras {cameras}; only policies on states are supported")
    if said.get("compile_model"):
        raise ValueError(f"{folder} has compile_model set, whose weights have other names; save it without")
    if said["beta_schedule"] not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        raise ValueError(f"{folder} has the beta_schedule {said['beta_schedule']!r}; linear, scaled_linear or "
                         "squaredcos_cap_v2 is needed")
    return said


def _step(pipeline: Any, name: str) -> Any:
    return next(step for step in pipeline.steps if type(step).__name__ == f"{name}ProcessorStep")


def _statistics(step: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in step.state_dict().items():
        key, _, which = name.rpartition(".")
        found.setdefault(key, {})[which] = value
    return found


def _mended(native: Native) -> dict[str, dict[str, Tensor]]:
    """The statistics with a range of 2 and a std of 1 where a feature of the observations was constant."""
    found = _statistics(_step(native.before, "Normalizer"))
    for key in native.observed:
        stats = found.get(key, {})
        for low, high in _RANGES.values():
            if low in stats:
                stats[high] = torch.where(stats[high] == stats[low], stats[low] + 2, stats[high])
        if "std" in stats:
            stats["std"] = torch.where(stats["std"] == 0, 1.0, stats["std"])
    return found


def _affine(statistics: Mapping[str, Mapping[str, Tensor]], step: Any, key: str, feature: Any
            ) -> tuple[Tensor, Tensor, Tensor]:
    """(low, scale, offset) of x -> (x - low) / scale - offset: what a processing step does to one feature.

    IDENTITY where it has no statistics of it.
    """
    mode, stats = step.norm_map.get(feature.type), statistics.get(key)
    zero, one = torch.zeros(feature.shape), torch.ones(feature.shape)
    if mode is None or mode.name == "IDENTITY" or stats is None:
        return zero, one, zero
    if mode.name == "MEAN_STD":
        inverse = type(step).__name__ == "UnnormalizerProcessorStep"  # which multiplies by std and no more
        scale = torch.where(stats["std"] == 0, step.eps, stats["std"] + (0 if inverse else step.eps))
        return stats["mean"], scale, zero
    low, high = (stats[which] for which in _RANGES[mode.name])
    return low, torch.where(high == low, step.eps, high - low) / 2, one
