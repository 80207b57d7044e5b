"""One simulated episode at a time, behind the same five methods for every simulator.

No torch here: worker processes import this module.
"""

from __future__ import annotations

import difflib
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
    """A simulator. `observe` is separate from `advance`, so that a chunk observes (or renders) once."""

    obs_dim: int
    action_dim: int
    action_low: Array
    action_high: Array

    def reset(self, seed: int) -> None: ...
    def advance(self, action: Array) -> Step: ...
    def observe(self) -> Array: ...
    def frame(self) -> NDArray[np.uint8]: ...
    def close(self) -> None: ...


def make(spec: Environment) -> Episode:
    """The simulator of a spec.

    Raises: ValueError for an unknown task, naming the closest; ModuleNotFoundError without the robot extra.
    """
    return MetaWorldEpisode(spec) if isinstance(spec, MetaWorld) else GymnasiumEpisode(spec)


def choose_renderer() -> None:
    """Set MUJOCO_GL=egl on a Linux machine without a display; must run before mujoco is imported."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


class MetaWorldEpisode:
    """Meta-World's v3 environments with the goal visible and every placement drawn from the episode's seed."""

    def __init__(self, spec: MetaWorld) -> None:
        choose_renderer()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        if spec.task not in ALL_V3_ENVIRONMENTS:
            close = difflib.get_close_matches(spec.task, ALL_V3_ENVIRONMENTS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it must be one of {', '.join(ALL_V3_ENVIRONMENTS)}"
            raise ValueError(f"Meta-World has no task {spec.task!r}{hint}")
        self._spec = spec
        self._env: Any = ALL_V3_ENVIRONMENTS[spec.task]()
        self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)  # cached for the hidden goal
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env._set_task_called = True
        self._renderer: Any = None
        self._obs = np.zeros(39, np.float32)
        self.obs_dim, self.action_dim = 39, 4
        self.action_low, self.action_high = -np.ones(4, np.float32), np.ones(4, np.float32)
        self._steps = 0

    def reset(self, seed: int) -> None:
        """Place object and goal from the seed."""
        self._env.seed(seed)
        self._obs = self._env.reset()[0].astype(np.float32)
        self._steps = 0

    def advance(self, action: Array) -> Step:
        """One control step; the time limit is the spec's horizon."""
        obs, reward, _, _, info = self._env.step(np.clip(action, -1, 1))
        self._obs = obs.astype(np.float32)
        self._steps += 1
        success = bool(info["success"])
        ends = success and self._spec.success_ends
        paid = float(success) if self._spec.reward == "sparse" else float(reward)
        return Step(paid, ends, not ends and self._steps >= self._spec.horizon, success)

    def observe(self) -> Array:
        """The state: gripper, objects, the previous frame of both, the goal; [39]."""
        return self._obs

    def frame(self) -> NDArray[np.uint8]:
        """A picture from the corner camera, [240, 240, 3]; shadows off, because they cost most of the time here."""
        import mujoco

        if self._renderer is None:
            self._env.model.vis.quality.shadowsize = 0
            self._env.model.vis.quality.offsamples = 4
            self._renderer = mujoco.Renderer(self._env.model, 240, 240)
        self._renderer.update_scene(self._env.data, camera="corner2")
        picture: NDArray[np.uint8] = self._renderer.render()[::-1]  # this camera is mounted upside down
        return picture

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()


class GymnasiumEpisode:
    """A registered Gymnasium environment."""

    def __init__(self, spec: Gymnasium) -> None:
        choose_renderer()
        import gymnasium

        try:
            self._env: Any = gymnasium.make(spec.id, max_episode_steps=spec.horizon, render_mode=None)
        except gymnasium.error.Error as error:
            raise ValueError(f"Gymnasium cannot make {spec.id!r}: {error}") from None
        for name in ("observation_space", "action_space"):
            space = getattr(self._env, name)
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                raise ValueError(f"{spec.id} has {name} {space}; a flat Box is needed")
        self.obs_dim, self.action_dim = self._env.observation_space.shape[0], self._env.action_space.shape[0]
        self.action_low = self._env.action_space.low.astype(np.float32)
        self.action_high = self._env.action_space.high.astype(np.float32)
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
