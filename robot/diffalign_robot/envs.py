"""One simulated episode at a time, behind the same five methods for every simulator.

No torch here: worker processes import this module.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign_robot.choices import Environment, Gymnasium, MetaWorld

Array = NDArray[np.float32]


class Step(NamedTuple):
    """What one control step did; `success` is what the task reports, independent of reward."""

    reward: float
    terminated: bool
    truncated: bool
    success: bool


class Episode(Protocol):
    """A simulator. `observe` is separate from `advance`, so that a chunk observes (or renders) once.

    control_rate_hz: how many actions make a second of simulated time, None where that is not known.
    """

    obs_dim: int
    action_dim: int
    action_low: Array
    action_high: Array
    control_rate_hz: float | None

    def reset(self, seed: int) -> None: ...
    def advance(self, action: Array) -> Step: ...
    def observe(self) -> Array: ...
    def frame(self) -> NDArray[np.uint8]: ...
    def close(self) -> None: ...


def make(spec: Environment) -> Episode:
    """The simulator of a spec.

    Raises: ValueError for an unknown task, naming the closest; ModuleNotFoundError without the robot extra.
    """
    if isinstance(spec, MetaWorld):
        from diffalign_robot.meta_world import MetaWorldEpisode

        return MetaWorldEpisode(spec)
    return GymnasiumEpisode(spec)


def choose_renderer() -> None:
    """Set MUJOCO_GL=egl on a Linux machine without a display; must run before mujoco is imported."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


class GymnasiumEpisode:
    """A registered Gymnasium environment."""

    def __init__(self, spec: Gymnasium) -> None:
        choose_renderer()
        import gymnasium

        try:
            self._env: Any = gymnasium.make(spec.id, max_episode_steps=spec.horizon)
        except gymnasium.error.Error as error:
            raise ValueError(f"Gymnasium cannot make {spec.id!r}: {error}") from None
        for name in ("observation_space", "action_space"):
            space = getattr(self._env, name)
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                raise ValueError(f"{spec.id} has {name} {space}; a flat Box is needed")
        self.obs_dim, self.action_dim = self._env.observation_space.shape[0], self._env.action_space.shape[0]
        self.action_low = self._env.action_space.low.astype(np.float32)
        self.action_high = self._env.action_space.high.astype(np.float32)
        self.control_rate_hz: float | None = None
        self._id, self._viewer = spec.id, None
        self._obs = np.zeros(self.obs_dim, np.float32)

    def reset(self, seed: int) -> None:
        """Start an episode from the seed."""
        self._obs = np.asarray(self._env.reset(seed=seed)[0], np.float32)

    def advance(self, action: Array) -> Step:
        """One control step with the action clipped to the space."""
        clipped = np.clip(action, self.action_low, self.action_high)
        obs, reward, terminated, truncated, info = self._env.step(clipped)
        self._obs = np.asarray(obs, np.float32)
        success = bool(info.get("success", info.get("is_success", False)))
        return Step(float(reward), bool(terminated), bool(truncated) and not terminated, success)

    def observe(self) -> Array:
        """The last observation."""
        return self._obs

    def frame(self) -> NDArray[np.uint8]:
        """Refused: build the environment with a render mode to film it."""
        raise ValueError(f"{self._id} was made without rendering; videos are available for Meta-World")

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
