"""DPPO's checkpoints (github.com/irom-princeton/dppo) of MLP policies on states, as policies of ours and back.

Their `state_N.pt` holds weights alone: the folder must also have the config.yaml of the run (or `.hydra/config.yaml`)
and the normalization.npz that the config's normalization_path names.

Legend: N rows, n observations of a history, Do observation features, Ta actions of the horizon, Da action features.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import DDPM, ODE, Schedule, VPPath
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.normalize import Normalizer
from diffalign_robot.native.dppo_net import Staged, StateMLP
from diffalign_robot.networks import ChunkDenoiser


def copy(folder: Path, to: Path) -> None:
    """The newest checkpoint with its config and normalization. Raises: ValueError if one of them is missing."""
    to.mkdir(parents=True)
    for file in _files(folder):
        shutil.copy(file, to)


def read(folder: Path, denoising_steps: int | None = None) -> DiffusionPolicy:
    """The policy of the folder's newest checkpoint: its averaged weights, where it has some.

    After fine-tuning the last ft_denoising_steps are another network's, and so they are here. denoising_steps: None
    keeps those of its config. Their clamp of drawn noise to 3 or 10 standard deviations is left out.

    Raises: ValueError for a policy that is no state MLP.
    """
    file, said, stored = _opened(folder)
    config, net = said["model"], _network(said, stored, file)
    horizon, history, steps = said["horizon_steps"], said.get("cond_steps", 1), said["denoising_steps"]
    limits = np.load(_files(folder)[2])
    low, high = (torch.from_numpy(limits[f"obs_{which}"]).float() for which in ("min", "max"))
    half = (high - low + 1e-6) / 2  # theirs
    observations = Normalizer.of((low + half).repeat(history), half.repeat(history))
    low, high = (torch.from_numpy(limits[f"action_{which}"]).float() for which in ("min", "max"))
    actions = Normalizer.of((high + low) / 2, (high - low) / 2)
    denoiser = ChunkDenoiser(net, horizon, observations, actions, history=history,
                             prediction="eps" if config.get("predict_epsilon", True) else "x0")
    implicit, act_steps = config.get("use_ddim", False), said.get("act_steps", horizon)
    chosen = denoising_steps or (config["ddim_steps"] if implicit else steps)
    return DiffusionPolicy(denoiser, VPPath(train_steps=steps), ODE() if implicit else DDPM(),
                           Schedule(steps=chosen, leading=steps), denoiser.event,
                           clip_x0=config.get("denoised_clip_value", 1.0),
                           executed=None if act_steps == horizon else (0, act_steps))


def write(policy: DiffusionPolicy, source: Path, to: Path) -> None:
    """Write the policy, read from `source` and trained since, as a checkpoint with its config and normalization.

    A pre-training checkpoint stays one, a fine-tuning one keeps its critic.

    Raises: ValueError if the policy samples in another way than the config says.
    """
    file, _, stored = _opened(source)
    before = read(source)
    if (policy.kernel, policy.schedule, policy.zero_noise) != (before.kernel, before.schedule, False):
        said = "from zero noise" if policy.zero_noise else f"by {policy.kernel} in {policy.schedule.steps} steps"
        raise ValueError(f"the config of {source} samples by {before.kernel} in {before.schedule.steps} steps, this "
                         f"policy {said}; export with --sampler "
                         f"{'ode' if isinstance(before.kernel, ODE) else 'stochastic'}")
    assert isinstance(policy.denoiser, ChunkDenoiser)
    net, tuned = policy.denoiser.net, "ema" not in stored
    assert isinstance(net, Staged)
    early = net.late if net.early is None else net.early
    parts = {"network": early, "actor": early, "actor_ft": net.late} if tuned else {"network": net.late}
    fresh = {f"{part}.{name}": value.detach().clone() for part, module in parts.items()
             for name, value in module.state_dict().items()}
    for kind in ("model", "ema"):
        if kind in stored:
            stored[kind] = {**stored[kind], **fresh}
    copy(source, to)
    torch.save(stored, to / file.name)


def difference(policy: DiffusionPolicy, folder: Path, obs: Float[Tensor, "N nDo"]) -> float:
    """The largest difference between our actions and those of the folder as read again, on equal noise.

    (DPPO itself is no package that could be asked.)
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(obs), *policy.event, generator=generator)
    steps = torch.randn(len(obs), policy.schedule.steps, *policy.event, generator=generator)
    first, second = (each.act({"obs": obs}, generator=generator, noise=noise, step_noise=steps).action
                     for each in (policy, read(folder)))
    assert isinstance(policy.denoiser, ChunkDenoiser)
    unnormalize = policy.denoiser.action_normalizer.unnormalize
    return float((unnormalize(first) - unnormalize(second)).abs().max())


def _checkpoints(folder: Path) -> list[Path]:
    found = [*folder.glob("state_*.pt"), *folder.glob("checkpoint/state_*.pt")]
    return sorted(found, key=lambda file: int(file.stem.rpartition("_")[2]))


def _files(folder: Path) -> tuple[Path, Path, Path]:
    """(the newest checkpoint, config.yaml, normalization.npz)."""
    found = _checkpoints(folder)
    config = next((file for file in (folder / "config.yaml", folder / ".hydra/config.yaml") if file.is_file()), None)
    limits = folder / "normalization.npz"
    for there, name in ((found, "state_N.pt"), (config, "config.yaml"), (limits.is_file(), "normalization.npz")):
        if not there:
            raise ValueError(f"{folder} has no {name}; a DPPO checkpoint is needed with the config.yaml of its "
                             "run and the normalization.npz that the config names")
    assert config is not None
    return found[-1], config, limits


def _opened(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    file, config, _ = _files(folder)
    said: dict[str, Any] = yaml.safe_load(config.read_text())
    stored: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return file, said, stored


def _network(said: Mapping[str, Any], stored: Mapping[str, Any], file: Path) -> Staged:
    """The network of every step; the last ones' is another after fine-tuning.

    Raises: ValueError if the config names another kind of network, or one that the weights do not fit.
    """
    model = said["model"]
    options = model.get("network") or model.get("actor") or {}
    kind = str(options.get("_target_", "nothing")).rpartition(".")[2]
    if kind != "DiffusionMLP":
        raise ValueError(f"the config of {file} names the network {kind}; only DiffusionMLP, on states, is supported")
    weights, tuned = stored.get("ema", stored.get("model")), "ema" not in stored
    event, obs_dim = (said["horizon_steps"], said["action_dim"]), said["obs_dim"] * said.get("cond_steps", 1)

    def filled(part: str) -> StateMLP:
        net = StateMLP(options, event, obs_dim)
        own = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
        try:
            net.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"the {part} in {file} does not fit its config: {error}") from error
        return net

    if not tuned:
        return Staged(None, filled("network"), said["denoising_steps"], said["denoising_steps"])
    grid = said["denoising_steps"] // model["ddim_steps"] if model.get("use_ddim") else 1
    return Staged(filled("actor"), filled("actor_ft"), said["denoising_steps"], grid * said["ft_denoising_steps"])
