"""Policies read from run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from diffalign.config import build
from diffalign.diffusion import DDPM, ODE, FlowPath, Prediction, Schedule, VPPath
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.injection import NoisyDenoiser, noisy
from diffalign.policy.normalize import Normalizer
from diffalign.policy.steering import steered
from diffalign.train import checkpoint
from diffalign_robot.choices import Environment, Network
from diffalign_robot.image_choices import Encoder, Images
from diffalign_robot.native import formats
from diffalign_robot.networks import ChunkDenoiser, build_network
from diffalign_robot.source import chunk_denoiser
from diffalign_robot.vision import ImageEncoder

_COMMAND = "diffalign train configs/robot/pick_place_bc.yaml"


def newest_checkpoint(folder: Path, command: str) -> Path:
    """The newest checkpoint of a run. Raises: ValueError naming the command that makes the run."""
    found = checkpoint.latest(folder / "checkpoints")
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint; make it with `{command} --run {folder}`")
    return found


def config_of(folder: Path, command: str) -> dict[str, Any]:
    """The resolved config of a run. Raises: ValueError naming the command that makes the run."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{folder} is no run folder (it has no config.yaml); make it with `{command} --run {folder}`")
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    return config


def build_policy(network: Network, chunk: int, obs_dim: int, action_dim: int, denoising_steps: int, *,
                 prediction: Prediction = "eps", normalizers: tuple[Normalizer, Normalizer] | None = None,
                 history: int = 1, encoder: ImageEncoder | None = None) -> DiffusionPolicy:
    """A chunk policy: K Euler steps of a flow for prediction `flow`, else a K-step cosine DDPM.

    clip_x0 is 1, because chunks are normalized to [-1, 1] (DPPO). obs_dim counts all the observations of a history, and
    the features of an encoder.
    """
    observations, actions = normalizers or (Normalizer(obs_dim), Normalizer(action_dim))
    schedule, event = Schedule(steps=denoising_steps), (chunk, action_dim)
    denoiser = ChunkDenoiser(build_network(network, event, obs_dim), chunk, observations, actions,
                             prediction=prediction, history=history, encoder=encoder)
    if prediction == "flow":
        return DiffusionPolicy(denoiser, FlowPath(), ODE(), schedule, event, clip_x0=1.0)
    return DiffusionPolicy(denoiser, VPPath(train_steps=denoising_steps), DDPM(), schedule, event, clip_x0=1.0)


def require_same_shapes(env_dims: tuple[int, int], policy_dims: tuple[int, int], environment: Environment) -> None:
    """Raises: ValueError if a policy was trained for another environment."""
    if env_dims != policy_dims:
        raise ValueError(f"the policy was trained for {policy_dims[0]} observation and {policy_dims[1]} action "
                         f"features, but {environment} has {env_dims[0]} and {env_dims[1]}; choose the matching base "
                         "or environment")


def packages() -> dict[str, str]:
    """Versions that decide what a simulation does, recorded beside data sets."""
    return {name: version(name) for name in ("mujoco", "metaworld", "gymnasium", "numpy")}


def load_policy(folder: Path) -> DiffusionPolicy:
    """The averaged policy of a robot_bc run, or of one that fine-tuned it (whose network is that of its base run).

    The checkpoint holds the normalizers, so the result acts on raw observations and decodes to robot units.
    """
    config_of(folder, _COMMAND)
    found = newest_checkpoint(folder, _COMMAND)
    policy = _unfilled(folder)
    denoiser: Any = policy.denoiser
    checkpoint.load_modules(found, {"policy": denoiser}, prefer_ema=True)
    return deployed(policy)


def deployed(policy: DiffusionPolicy) -> DiffusionPolicy:
    """The policy without the noise net of its training."""
    denoiser: object = policy.denoiser
    return replace(policy, denoiser=denoiser.denoiser) if isinstance(denoiser, NoisyDenoiser) else policy


def add_noise(policy: DiffusionPolicy, hidden: Sequence[int], *, seed: int) -> DiffusionPolicy:
    """The policy with a fresh net that learns from the observation how much noise a step injects (ReinFlow)."""
    normalizer = chunk_denoiser(policy).observation_normalizer
    return replace(policy, denoiser=noisy(policy.denoiser, policy.event, len(normalizer.shift), hidden, key="obs",
                                          normalizer=normalizer, seed=seed))


def _unfilled(folder: Path) -> DiffusionPolicy:
    """The policy of a run with its architecture, weights to come."""
    config = config_of(folder, _COMMAND)
    if config["type"] in ("robot_align", "robot_preference"):
        base = deployed(_unfilled(Path(config["base"])))
        if config.get("noise") is not None:
            return add_noise(base, config["noise"], seed=0)
        return base if config.get("steering") is None else steer(base, config["steering"], seed=0)
    if config["type"] == "robot_off_policy":
        raise ValueError(f"{folder} is a robot_off_policy run: its base policy is in {config['base']}, its actor and "
                         "critic improve that one; take the base run")
    if config["type"] == "robot_import":
        name, _ = formats.source(config["source"])
        return formats.read(name, formats.kept(folder), config["denoising_steps"])
    if config["type"] != "robot_bc":
        raise ValueError(f"{folder} is a {config['type']} run; a policy comes from a robot_bc, robot_import, "
                         "robot_align or robot_preference run")
    shapes = checkpoint.shapes(newest_checkpoint(folder, _COMMAND))
    obs_dim, action_dim = (shapes[f"policy.{name}_normalizer.shift"][0] for name in ("observation", "action"))
    file = str(folder / "config.yaml")
    encoder = None
    if config.get("encoder") is not None:
        encoder = ImageEncoder(build(Encoder, config["encoder"], file),
                               build(Images, config["environment"]["images"], file))
    return build_policy(build(Network, config["network"], file), config["chunk"], obs_dim, action_dim,
                        config["denoising_steps"], prediction=config.get("prediction", "eps"),
                        history=config.get("history", 1), encoder=encoder)


def steer(policy: DiffusionPolicy, hidden: Sequence[int], *, seed: int) -> DiffusionPolicy:
    """The policy with its weights frozen and its initial noise learned from the observation."""
    normalizer = chunk_denoiser(policy).observation_normalizer
    return replace(policy, denoiser=steered(policy.denoiser, policy.event, len(normalizer.shift), hidden, key="obs",
                                            normalizer=normalizer, seed=seed))
