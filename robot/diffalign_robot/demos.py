"""Demonstrations: collected from a scripted expert, kept as safetensors, sampled as chunks.

Legend: T steps over all episodes, Do observation features, Da action features, Ta actions of a chunk, N windows.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign_controller.functions import function_at
from diffalign_robot.choices import Environment, MetaWorld
from diffalign_robot.envs import Array, make

Expert = Callable[[Array], Array]


@dataclass(frozen=True)
class Demonstrations:
    """Episodes laid end to end; `lengths` says where each ends. Actions are as executed (after clipping).

    intervention: 1 where a person acted and not the policy, None where nobody recorded that.
    """

    obs: Float[Tensor, "T Do"]
    action: Float[Tensor, "T Da"]
    lengths: Int[Tensor, "E"]
    success: Int[Tensor, "E"]
    intervention: Int[Tensor, "T"] | None = None

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Write demonstrations.safetensors and demonstrations.json into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"obs": self.obs, "action": self.action, "lengths": self.lengths, "success": self.success}
        if self.intervention is not None:
            tensors["intervention"] = self.intervention
        save_file(tensors, folder / "demonstrations.safetensors")
        (folder / "demonstrations.json").write_text(json.dumps(metadata, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Demonstrations:
        """Read what `save` wrote. Raises: ValueError naming the command that makes them if they are missing."""
        file = folder / "demonstrations.safetensors"
        if not file.is_file():
            raise ValueError(f"{folder} holds no demonstrations; make them with "
                             f"`diffalign train configs/robot/pick_place_collect.yaml --run {folder}`")
        return cls(**load_file(file))

    def spans(self) -> list[tuple[int, int]]:
        """First and one-past-last step of every episode."""
        ends = self.lengths.cumsum(0).tolist()
        return [(end - length, end) for length, end in zip(self.lengths.tolist(), ends, strict=True)]

    def with_history(self, count: int) -> Demonstrations:
        """Every observation as [count * Do] with those before it, oldest first; an episode's first one is repeated."""
        first = torch.tensor([start for start, _ in self.spans()]).repeat_interleave(self.lengths)[:, None]
        index = torch.arange(len(self.obs))[:, None] + torch.arange(1 - count, 1)
        return replace(self, obs=self.obs[index.maximum(first)].flatten(1))

    def successful(self) -> Demonstrations:
        """The successful episodes. Raises: ValueError if there are none."""
        kept = self.success.bool()
        if not bool(kept.any()):
            raise ValueError(f"none of the {len(kept)} recorded episodes succeeded; record others")
        steps = kept.repeat_interleave(self.lengths)
        return Demonstrations(self.obs[steps], self.action[steps], self.lengths[kept], self.success[kept],
                              None if self.intervention is None else self.intervention[steps])

    def windows(self, chunk: int, lead: int = 0) -> tuple[Float[Tensor, "N Do"], Float[Tensor, "N Ta Da"]]:
        """Every (observation, the chunk of actions that followed it) that lies inside one episode.

        lead: how many actions of the chunk came before the observation (of the policies of others that denoise them
        too). Nothing is padded at the ends of an episode: the last chunk - lead - 1 observations have no window.

        Raises: ValueError if no episode is as long as a chunk.
        """
        starts = torch.cat([torch.arange(start, max(start, end - chunk + 1)) for start, end in self.spans()])
        if len(starts) == 0:
            raise ValueError(f"no demonstration is as long as a chunk of {chunk} (longest: {int(self.lengths.max())})")
        return self.obs[starts + lead], self.action[starts[:, None] + torch.arange(chunk)]


def scripted_expert(spec: Environment, place: str | None = None) -> Callable[[], Expert]:
    """A factory of controllers, one an episode: that at `place` (module:function), else Meta-World's for the task.

    Raises: ValueError where there is none.
    """
    if place is not None:
        return function_at(place, "expert")
    if not isinstance(spec, MetaWorld):
        raise ValueError(f"environment type {spec.type!r} has no scripted expert of its own; set expert to "
                         "module:function (see configs/robot/lift_collect.yaml)")
    from metaworld.policies import ENV_POLICY_MAP

    if spec.task not in ENV_POLICY_MAP:
        close = difflib.get_close_matches(spec.task, ENV_POLICY_MAP, n=1)
        raise ValueError(f"no scripted expert for {spec.task!r}; did you mean {close}?")
    policy = ENV_POLICY_MAP[spec.task]

    def build() -> Expert:
        expert = policy()

        def act(obs: Array) -> Array:
            with warnings.catch_warnings():  # "Constant(s) may be too high": actions are clipped below
                warnings.simplefilter("ignore")
                return np.asarray(expert.get_action(obs.astype(np.float64)), np.float32)

        return act

    return build


def collect(spec: Environment, expert: Callable[[], Expert], *, seeds: list[int], action_noise: float,
            noise_seed: int, action_bias: Sequence[float] = ()) -> Iterator[tuple[Array, Array, bool]]:
    """One episode (obs [T, Do], action [T, Da], success) per seed, with Gaussian noise and a bias on every action.

    Raises: ValueError if the bias has not one number per action feature.
    """
    rng = np.random.default_rng(noise_seed)
    simulator = make(spec)
    if len(action_bias) not in (0, simulator.action_dim):
        raise ValueError(f"action_bias needs {simulator.action_dim} numbers, one per action feature, or none, got "
                         f"{list(action_bias)}")
    bias = np.array(action_bias or [0.0] * simulator.action_dim, np.float32)
    for seed in seeds:
        act = expert()
        simulator.reset(seed)
        observations, actions, success = [], [], False
        while True:
            obs = simulator.observe()
            noise = action_noise * rng.standard_normal(simulator.action_dim).astype(np.float32)
            action = np.clip(act(obs) + bias + noise, simulator.action_low, simulator.action_high).astype(np.float32)
            step = simulator.advance(action)
            observations.append(obs)
            actions.append(action)
            success = success or step.success
            if step.terminated or step.truncated:
                break
        yield np.stack(observations), np.stack(actions), success
    simulator.close()


def join(episodes: list[tuple[Array, Array, bool]]) -> Demonstrations:
    """Demonstrations from single episodes."""
    return Demonstrations(torch.from_numpy(np.concatenate([obs for obs, _, _ in episodes])),
                          torch.from_numpy(np.concatenate([action for _, action, _ in episodes])),
                          torch.tensor([len(obs) for obs, _, _ in episodes]),
                          torch.tensor([int(success) for _, _, success in episodes]))
