"""Recorded episodes together with what their file says about them.

Legend: T steps over all episodes, E episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from diffalign_robot.demos import Demonstrations


@dataclass(frozen=True)
class Dataset:
    """Episodes whose observations are named parts, one after the other.

    keys: the name of every part and how many numbers it has, in order. reward [T]: as recorded, None where it is not.
    says_success: whether the source tells which episodes succeeded; where it does not, all of them count as successful.
    rate_hz: control steps a second, None where it is not known. environment: the source's own description of it.
    """

    episodes: Demonstrations
    keys: Mapping[str, int]
    reward: Float[Tensor, "T"] | None = None
    says_success: bool = True
    rate_hz: float | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width = self.episodes.obs.shape[1]
        if sum(self.keys.values()) != width:
            raise ValueError(f"the observation parts {dict(self.keys)} do not make up {width} numbers")

    def part(self, key: str) -> Tensor:
        """The columns [T, width] of one part of the observations."""
        first = 0
        for name, width in self.keys.items():
            if name == key:
                return self.episodes.obs[:, first : first + width]
            first += width
        raise ValueError(f"the data set has no observation {key!r}; it has {list(self.keys)}")

    def select(self, keys: Sequence[str]) -> Dataset:
        """The data set with these parts of the observation, in this order. Raises: ValueError for one it lacks."""
        obs = torch.cat([self.part(key) for key in keys], 1)
        return replace(self, episodes=replace(self.episodes, obs=obs), keys={key: self.keys[key] for key in keys})

    def paid(self) -> Float[Tensor, "T"]:
        """The recorded reward, or 1 on the last step of every successful episode where none was recorded."""
        if self.reward is not None:
            return self.reward
        reward = torch.zeros(len(self.episodes.obs))
        reward[self.episodes.lengths.cumsum(0) - 1] = self.episodes.success.float()
        return reward

    def task(self) -> str:
        """The name of the environment or task, `unnamed task` where the source does not say."""
        found = next((self.environment[name] for name in ("task", "env_name", "id", "factory")
                      if self.environment.get(name)), "unnamed task")
        return str(found)


def assemble(episodes: Sequence[Mapping[str, NDArray[Any]]], *, reward: Sequence[NDArray[Any]] | None,
             action: Sequence[NDArray[Any]], success: Sequence[bool] | None, rate_hz: float | None = None,
             environment: Mapping[str, Any] | None = None) -> Dataset:
    """A data set from episodes given as {key: [T, width]}.

    success None: an episode succeeded if a step paid at least 1, and without rewards if it is there at all.

    Raises: ValueError if there is no episode, one is empty, or lengths within one differ.
    """
    if not episodes:
        raise ValueError("the data set holds no episodes")
    for number, (parts, acted) in enumerate(zip(episodes, action, strict=True)):
        lengths = {len(acted), *(len(part) for part in parts.values())}
        if len(lengths) != 1 or not len(acted):
            raise ValueError(f"episode {number} has {len(acted)} actions and observations of lengths "
                             f"{ {key: len(part) for key, part in parts.items()} }; equal ones above 0 are needed")
    if success is None:
        success = [True] * len(action) if reward is None else [bool((paid >= 1).any()) for paid in reward]
        says = reward is not None
    else:
        says = True
    keys = {key: part.shape[1] for key, part in episodes[0].items()}
    obs = np.concatenate([np.concatenate([parts[key] for key in keys], 1) for parts in episodes])
    joined = Demonstrations(_tensor(obs), _tensor(np.concatenate(list(action))),
                            torch.tensor([len(acted) for acted in action]),
                            torch.tensor([int(won) for won in success]))
    paid = None if reward is None else _tensor(np.concatenate(list(reward)))
    return Dataset(joined, keys, paid, says, rate_hz, environment or {})


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
