"""Demonstrations: collected from a scripted expert, kept as safetensors, sampled as chunks.

Legend: T steps over all episodes, Do observation features, Da action features, Ta actions of a chunk, N windows, V
cameras of S x S pixels.
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
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign_controller.functions import function_at
from diffalign_robot.cameras import Picture, images_of
from diffalign_robot.choices import Environment, MetaWorld
from diffalign_robot.envs import Array, PartOfState, simulator

Expert = Callable[[Array], Array]


@dataclass(frozen=True)
class Demonstrations:
    """Episodes laid end to end; `lengths` says where each ends. Actions are as executed (after clipping).

    intervention: 1 where a person acted and not the policy, None where nobody recorded that. image: what the cameras
    showed, None without any.
    """

    obs: Float[Tensor, "T Do"]
    action: Float[Tensor, "T Da"]
    lengths: Int[Tensor, "E"]
    success: Int[Tensor, "E"]
    intervention: Int[Tensor, "T"] | None = None
    image: UInt8[Tensor, "T V 3 S S"] | None = None

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Write demonstrations.safetensors and demonstrations.json into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"obs": self.obs, "action": self.action, "lengths": self.lengths, "success": self.success}
        optional = {"intervention": self.intervention, "image": self.image}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
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
                              None if self.intervention is None else self.intervention[steps],
                              None if self.image is None else self.image[steps])

    def seen(self, starts: Int[Tensor, "N"]) -> dict[str, Tensor]:
        """The condition at some steps: obs [N, Do] and, where there are any, image [N, V, 3, S, S]."""
        obs = {"obs": self.obs[starts]}
        return obs if self.image is None else {**obs, "image": self.image[starts]}

    def starts(self, chunk: int) -> Int[Tensor, "N"]:
        """Every step that is followed by a whole chunk of actions within its episode.

        The last chunk - 1 steps of an episode start no window: nothing is padded past its end.

        Raises: ValueError if no episode is as long as a chunk.
        """
        found = torch.cat([torch.arange(start, max(start, end - chunk + 1)) for start, end in self.spans()])
        if len(found) == 0:
            raise ValueError(f"no demonstration is as long as a chunk of {chunk} (longest: {int(self.lengths.max())})")
        return found

    def chunks(self, starts: Int[Tensor, "N"], chunk: int) -> Float[Tensor, "N Ta Da"]:
        """The actions from these steps on."""
        return self.action[starts[:, None] + torch.arange(chunk)]

    def windows(self, chunk: int, lead: int = 0) -> tuple[Float[Tensor, "N Do"], Float[Tensor, "N Ta Da"]]:
        """Every (observation, the chunk of actions that followed it) that lies inside one episode; see starts.

        lead: how many actions of the chunk came before the observation (of the policies of others that denoise them
        too).
        """
        starts = self.starts(chunk)
        return self.obs[starts + lead], self.chunks(starts, chunk)


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


# (obs [T, Do], action [T, Da], success) and, of an environment with images, these [T, V, 3, S, S]
Recording = tuple[Array, Array, bool, *tuple[Picture, ...]]


def collect(spec: Environment, expert: Callable[[], Expert], *, seeds: list[int], action_noise: float,
            noise_seed: int, action_bias: Sequence[float] = ()) -> Iterator[Recording]:
    """One episode per seed, with Gaussian noise and a bias on every action; the expert sees the simulator's state.

    Raises: ValueError if the bias has not one number per action feature.
    """
    rng = np.random.default_rng(noise_seed)
    world = simulator(spec)
    seen = world if spec.images is None else PartOfState(world, spec.images)
    if len(action_bias) not in (0, world.action_dim):
        raise ValueError(f"action_bias needs {world.action_dim} numbers, one per action feature, or none, got "
                         f"{list(action_bias)}")
    bias = np.array(action_bias or [0.0] * world.action_dim, np.float32)
    for seed in seeds:
        act = expert()
        world.reset(seed)
        observations, actions, success = [], [], False
        images: list[Picture] = []
        while True:
            observations.append(seen.observe())
            if spec.images is not None:
                images.append(images_of(seen.frame, spec.images))
            noise = action_noise * rng.standard_normal(world.action_dim).astype(np.float32)
            action = np.clip(act(world.observe()) + bias + noise, world.action_low, world.action_high)
            actions.append(action.astype(np.float32))
            step = world.advance(actions[-1])
            success = success or step.success
            if step.terminated or step.truncated:
                break
        yield np.stack(observations), np.stack(actions), success, *([np.stack(images)] if images else [])
    world.close()


def join(episodes: Sequence[Recording]) -> Demonstrations:
    """Demonstrations from single episodes."""
    obs, action, success, *image = zip(*episodes, strict=True)
    return Demonstrations(torch.from_numpy(np.concatenate(obs)), torch.from_numpy(np.concatenate(action)),
                          torch.tensor([len(part) for part in obs]), torch.tensor([int(won) for won in success]),
                          image=torch.from_numpy(np.concatenate(image[0])) if image else None)
