"""robomimic's diffusion policy on low-dimensional observations: its own U-Net, as a policy of ours and back.

A checkpoint is one file that robomimic's train.py saved. robomimic 0.5 builds and runs it; PyPI's 0.3 has no such
policy (docs/robomimic.md says how to install it).

Legend: N rows, n observations of a history, Do observation features, Ta actions of the horizon, Te executed ones, Da
action features.
"""

from __future__ import annotations

import copy as copying
import json
import math
import pickle
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import DDPM, ODE, Schedule, VPPath
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.normalize import Normalizer
from diffalign_robot.native.table import TableUNet
from diffalign_robot.networks import ChunkDenoiser

_FILE = "policy.pth"  # in a folder of ours
_UNET = "policy.noise_pred_net."  # before the names of its weights
_SAVED = ("algo_name", "config", "model", "shape_metadata")
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class Native:
    """A checkpoint as robomimic itself opens it, on the CPU. policy: its RolloutPolicy, with the weights it runs."""

    config: dict[str, Any]
    policy: Any

    @classmethod
    def open(cls, path: Path) -> Native:
        """Raises: ValueError for what is no such checkpoint or another policy; ImportError without robomimic 0.5."""
        stored = _stored(path)
        said = _config(path, stored)
        with redirect_stdout(sys.stderr):  # it prints as it loads; our stdout is for results
            try:
                from robomimic.algo import diffusion_policy  # noqa: F401 - 0.3 lacks it
                from robomimic.utils import file_utils
            except ImportError as error:
                raise ImportError(f"robomimic with its diffusion policy is needed ({error}); PyPI's 0.3 has none, "
                                  "docs/robomimic.md says how to install 0.5") from error
            try:
                policy, _ = file_utils.policy_from_checkpoint(ckpt_dict=_evaluated(stored, said),
                                                              device=torch.device("cpu"))
            except RuntimeError as error:
                raise ValueError(f"the weights of {path} do not fit the network that the installed robomimic builds; "
                                 f"install the one that trained it. {error}"[:600]) from error
        return cls(said, policy)

    @property
    def observed(self) -> dict[str, tuple[int, ...]]:
        """The observations that the policy sees with their shapes, in the order in which its U-Net takes them."""
        return {key: tuple(shape) for key, shape in self.policy.policy.obs_shapes.items()}

    def split(self, obs: Float[Tensor, "N nDo"]) -> dict[str, Tensor]:
        """Our observations (a history, oldest first) by robomimic's names, each [N, n, *shape]."""
        history = self.config["algo"]["horizon"]["observation_horizon"]
        widths = [math.prod(shape) for shape in self.observed.values()]
        parts = obs.reshape(len(obs), history, -1).split(widths, 2)
        return {key: part.reshape(len(obs), history, *shape)
                for (key, shape), part in zip(self.observed.items(), parts, strict=True)}

    def chunk(self, obs: Float[Tensor, "N nDo"], *, seed: int) -> Float[Tensor, "N Te Da"]:
        """What robomimic itself does: the actions of one decision, all of its noise drawn from the seed."""
        from robomimic.utils import obs_utils, python_utils

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seen = self.policy._prepare_observation(self.split(obs), batched_ob=True)
            drawn: Tensor = self.policy.policy._get_action_trajectory(obs_dict=seen)
        stats = self.policy.action_normalization_stats
        if stats is None:
            return drawn
        keys = self.config["train"]["action_keys"]
        parts = python_utils.vector_to_action_dict(drawn.flatten(0, 1).numpy(), action_keys=keys, action_shapes={
            key: stats[key]["offset"].shape[1:] for key in stats})
        real = python_utils.action_dict_to_vector(obs_utils.unnormalize_dict(parts, stats), action_keys=keys)
        return torch.from_numpy(real).float().reshape(drawn.shape)


def observed(path: Path) -> tuple[str, ...]:
    """The observations that the policy sees, in the order in which it takes them.

    Raises: ValueError for what is no such checkpoint.
    """
    stored = _stored(path)
    low_dim = _config(path, stored)["observation"]["modalities"]["obs"]["low_dim"]
    return tuple(key for key in stored["shape_metadata"]["all_shapes"] if key in low_dim)


def copy(path: Path, to: Path) -> None:
    """The checkpoint without the optimizer's state, in a new folder. Raises: ValueError if it is none."""
    stored = _stored(path)
    _config(path, stored)
    to.mkdir(parents=True)
    torch.save(stored, to / _FILE)


def read(path: Path, denoising_steps: int | None = None) -> DiffusionPolicy:
    """The policy of a checkpoint, with the averaged weights where robomimic runs those; its actions for equal noise.

    It sees observation_horizon observations, each the parts in the checkpoint's order, denoises prediction_horizon
    actions and executes action_horizon of them from the last observation on. denoising_steps: None keeps those of its
    config; fewer than its noise table has are those of its DDIM.

    Raises: ValueError for a checkpoint with images, another algorithm, or a sampler that is not known here; ImportError
    without robomimic 0.5.
    """
    native = Native.open(path)
    algo = native.config["algo"]
    name = _sampler(algo)
    sampler, horizon = algo[name], algo["horizon"]
    table, history = sampler["num_train_timesteps"], horizon["observation_horizon"]
    steps = denoising_steps or sampler["num_inference_timesteps"]
    if name == "ddpm" and denoising_steps is None and steps != table:
        raise ValueError(f"{path} takes {steps} of the {table} steps of its ddpm, which diffusers 0.11 does as if none "
                         f"was left out and later versions do not; set denoising_steps={steps} to sample by its ddim")
    path_ = VPPath(betas=sampler["beta_schedule"], train_steps=table)
    shift, scale = _affine(native.policy.obs_normalization_stats,
                           {key: math.prod(shape) for key, shape in native.observed.items()})
    observations = Normalizer.of(shift.repeat(history), scale.repeat(history))
    keys = native.config["train"]["action_keys"]
    stats = native.policy.action_normalization_stats
    actions = Normalizer.of(*_affine(stats, {key: np.size(stats[key]["scale"]) for key in keys} if stats else
                                     {"actions": native.policy.policy.ac_dim}))
    net = TableUNet(native.policy.policy.nets["policy"]["noise_pred_net"], path_, torch.zeros_like(observations.shift))
    denoiser = ChunkDenoiser(net, horizon["prediction_horizon"], observations, actions, history=history)
    first = history - 1
    return DiffusionPolicy(denoiser, path_, DDPM() if name == "ddpm" and steps == table else ODE(),
                           Schedule(steps=steps, leading=table), denoiser.event,
                           clip_x0=1.0 if sampler["clip_sample"] else None, clipped_eps=False,
                           executed=(first, min(first + horizon["action_horizon"], horizon["prediction_horizon"])))


def write(policy: DiffusionPolicy, source: Path, to: Path) -> None:
    """Write the policy, read from `source` and trained since, as a checkpoint: the new weights and sampler.

    The averaged weights become the new ones too. Raises: ValueError for a way of sampling that robomimic does not have.
    """
    stored, denoiser = _stored(source), policy.denoiser
    said = _config(source, stored)
    assert isinstance(denoiser, ChunkDenoiser)
    assert isinstance(denoiser.net, TableUNet)
    before = said["algo"][_sampler(said["algo"])]
    table, steps = before["num_train_timesteps"], policy.schedule.steps
    if policy.zero_noise or not isinstance(policy.kernel, DDPM | ODE) or (isinstance(policy.kernel, DDPM)
                                                                           and steps != table):
        samples = "from zero noise" if policy.zero_noise else f"by {policy.kernel} in {steps} steps"
        raise ValueError(f"robomimic samples by all {table} steps of its ddpm or by the ode (its ddim) from random "
                         f"noise, this policy {samples}; export with --sampler ode")
    used = "ddpm" if isinstance(policy.kernel, DDPM) else "ddim"
    for name in ("ddpm", "ddim"):
        said["algo"][name]["enabled"] = name == used
    exact = {"set_alpha_to_one": True, "steps_offset": 0} if used == "ddim" else {}
    same = {key: before[key] for key in ("num_train_timesteps", "beta_schedule", "clip_sample", "prediction_type")}
    said["algo"][used].update({**same, **exact, "num_inference_timesteps": steps})
    fresh = {_UNET + name: value.detach().cpu().clone() for name, value in denoiser.net.unet.state_dict().items()}
    weights = {**stored["model"]["nets"], **fresh}
    averaged = weights if said["algo"]["ema"]["enabled"] else None
    torch.save({**stored, "config": json.dumps(said, indent=4), "model": {"nets": weights, "ema": averaged}}, to)


def difference(policy: DiffusionPolicy, path: Path, obs: Float[Tensor, "N nDo"]) -> float:
    """The largest difference between our actions and robomimic's for the checkpoint, in robot units, on equal noise.

    obs: observations in the environment's units.
    """
    native, generator = Native.open(path), torch.Generator().manual_seed(0)
    draws = [torch.randn(len(obs), *policy.event, generator=generator)  # as it draws: none after the last step
             for _ in range(policy.schedule.steps)]
    steps = torch.stack([*draws[1:], torch.zeros_like(draws[0])], 1)
    decision = policy.act({"obs": obs}, generator=generator, noise=draws[0], step_noise=steps)
    assert isinstance(policy.denoiser, ChunkDenoiser)
    ours = policy.denoiser.action_normalizer.unnormalize(decision.action)
    return float((ours - native.chunk(obs, seed=0)).abs().max())


def _stored(path: Path) -> dict[str, Any]:
    """What the file holds, the optimizer's state left out; its numbers stay on the disk until they are used."""
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is no file; a checkpoint of robomimic is needed (models/model_epoch_N.pth of a run)")
    number: Any = np.float64(0).__reduce__()[0]
    numbers = [number, (number, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype("f8")), type(np.dtype("f4"))]
    try:
        with torch.serialization.safe_globals(numbers):  # the best returns of a run are NumPy's, of version 1 or 2
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read as a checkpoint of numbers and texts: {error}") from error
    missing = [key for key in _SAVED if not isinstance(stored, Mapping) or key not in stored]
    if missing:
        raise ValueError(f"{file} is no checkpoint of robomimic's train.py: it has no {missing}")
    return {**stored, "model": {name: stored["model"].get(name) for name in ("nets", "ema")}}


def _config(path: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    if stored["algo_name"] != "diffusion_policy":
        raise ValueError(f"{path} holds a policy of robomimic's {stored['algo_name']!r}; only diffusion_policy is "
                         "supported")
    said: dict[str, Any] = json.loads(stored["config"])
    algo, seen = said["algo"], said["observation"]
    if not algo["unet"]["enabled"]:
        raise ValueError(f"{path} has no unet enabled; only diffusion policies with robomimic's U-Net are supported")
    others = [key for kind, keys in seen["modalities"]["obs"].items() if kind != "low_dim" for key in keys]
    if others:
        raise ValueError(f"{path} sees {others}; only policies on low_dim observations are supported")
    core = seen["encoder"]["low_dim"]
    if core["core_class"] is not None or core["obs_randomizer_class"] is not None:
        raise ValueError(f"{path} encodes low_dim observations by {core['core_class']} and "
                         f"{core['obs_randomizer_class']}; only ones that are taken as they are, null, are supported")
    forms = {key: form["format"] for key, form in said["train"]["action_config"].items() if form.get("format")}
    if forms:
        raise ValueError(f"{path} converts its actions at run time, {forms}; only ones without a format are supported")
    sampler = algo[_sampler(algo)]
    for name, known in (("beta_schedule", _BETAS), ("prediction_type", ("epsilon",)), ("set_alpha_to_one", (True,)),
                        ("steps_offset", (0,))):
        if sampler.get(name, known[0]) not in known:
            raise ValueError(f"{path} has the {name} {sampler[name]!r}; one of {list(known)} is needed")
    return said


def _sampler(algo: Mapping[str, Any]) -> str:
    return "ddpm" if algo["ddpm"]["enabled"] else "ddim"  # robomimic's own order


def _evaluated(stored: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint with the weights that robomimic runs in the place of those that it trains.

    The same policy, without the EMAModel of diffusers 0.11, which later versions do not have.
    """
    averaged = said["algo"]["ema"]["enabled"]
    algo = {**said["algo"], "ema": {**said["algo"]["ema"], "enabled": False}}
    given = {**stored, "config": json.dumps({**said, "algo": algo}),
             "model": {"nets": stored["model"]["ema" if averaged else "nets"]}}
    for name in ("obs_normalization_stats", "action_normalization_stats"):
        if name in stored:
            given[name] = copying.deepcopy(stored[name])  # it writes arrays in there
    return given


def _affine(stats: Mapping[str, Any] | None, widths: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """(shift, scale) of all the parts, one after the other; the identity without statistics."""
    if stats is None:
        count = sum(widths.values())
        return torch.zeros(count), torch.ones(count)
    shift, scale = (torch.cat([torch.as_tensor(np.asarray(stats[key][name]), dtype=torch.float32).flatten()
                               for key in widths]) for name in ("offset", "scale"))
    return shift, scale
