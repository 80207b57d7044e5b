"""One simulated episode at a time, behind the same five methods for every simulator.

No torch here: worker processes import this module.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.functions import function_at
from diffalign_robot.cameras import Picture, resized
from diffalign_robot.choices import Custom, Environment, Gymnasium, MetaWorld, Robosuite
from diffalign_robot.image_choices import Images

Array = NDArray[np.float32]
PIXELS = 240  # of videos


class Step(NamedTuple):
    """What one control step did; `success` is what the task reports, independent of reward."""

    reward: float
    terminated: bool
    truncated: bool
    success: bool


class Episode(Protocol):
    """A simulator. `observe` and `frame` are separate from `advance`, so that a chunk observes and renders once.

    control_rate_hz: how many actions make a second of simulated time, None where that is not known. frame: a picture
    [size, size, 3] of one of its cameras; without arguments one for videos.
    """

    obs_dim: int
    action_dim: int
    action_low: Array
    action_high: Array
    control_rate_hz: float | None

    def reset(self, seed: int) -> None: ...
    def advance(self, action: Array) -> Step: ...
    def observe(self) -> Array: ...
    def frame(self, camera: str | None = None, size: int = PIXELS) -> Picture: ...
    def close(self) -> None: ...


def make(spec: Environment) -> Episode:
    """What a policy sees of the simulator of a spec: where there are images, only a part of the state beside them.

    Raises: as simulator; ValueError if the images name places that the state does not have.
    """
    whole = simulator(spec)
    return whole if spec.images is None else PartOfState(whole, spec.images)


def simulator(spec: Environment) -> Episode:
    """The simulator of a spec with its whole state, as a scripted expert needs it.

    Raises: ValueError for an unknown task, naming the closest; ModuleNotFoundError without the robot extra.
    """
    if isinstance(spec, MetaWorld):
        from diffalign_robot.meta_world import MetaWorldEpisode

        return MetaWorldEpisode(spec)
    if isinstance(spec, Robosuite):
        from diffalign_robot.robosuite_env import RobosuiteEpisode

        return RobosuiteEpisode(spec)
    return GymnasiumEpisode(_gymnasium(spec), spec.id if isinstance(spec, Gymnasium) else spec.factory, spec.keys,
                            renders=spec.images is not None)


def _gymnasium(spec: Gymnasium | Custom) -> Any:
    """The environment of a registered id, or of a factory under the spec's time limit."""
    choose_renderer()
    import gymnasium

    if isinstance(spec, Gymnasium):
        try:
            rendering = {} if spec.images is None else {"render_mode": "rgb_array"}
            return gymnasium.make(spec.id, max_episode_steps=spec.horizon, **rendering)
        except gymnasium.error.Error as error:
            raise ValueError(f"Gymnasium cannot make {spec.id!r}: {error}") from None
    env = function_at(spec.factory, "factory")()
    if not isinstance(env, gymnasium.Env):
        raise ValueError(f"factory {spec.factory!r} must return a gymnasium.Env, got {type(env).__name__}")
    return env if spec.horizon is None else gymnasium.wrappers.TimeLimit(env, spec.horizon)


def choose_renderer() -> None:
    """Set MUJOCO_GL=egl on a Linux machine without a display; must run before mujoco is imported."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


class PartOfState:
    """An episode whose observation is a part of the state; the rest is seen in its images."""

    def __init__(self, inner: Episode, images: Images) -> None:
        """Raises: ValueError if images.state names a place that the observation does not have."""
        if max(images.state) >= inner.obs_dim:
            raise ValueError(f"images.state must name places of the state below {inner.obs_dim}, got "
                             f"{list(images.state)}")
        self._inner, self._places = inner, np.array(images.state)
        self.obs_dim, self.action_dim = len(images.state), inner.action_dim
        self.action_low, self.action_high = inner.action_low, inner.action_high
        self.control_rate_hz = inner.control_rate_hz

    def reset(self, seed: int) -> None:
        """Start an episode from the seed."""
        self._inner.reset(seed)

    def advance(self, action: Array) -> Step:
        """One control step."""
        return self._inner.advance(action)

    def observe(self) -> Array:
        """The part of the state."""
        part: Array = self._inner.observe()[self._places]
        return part

    def frame(self, camera: str | None = None, size: int = PIXELS) -> Picture:
        """A picture of the simulator."""
        return self._inner.frame(camera, size)

    def close(self) -> None:
        """Close the simulator."""
        self._inner.close()


class GymnasiumEpisode:
    """A Gymnasium environment; of a Dict observation the entries `keys`, flattened and joined."""

    def __init__(self, env: Any, name: str, keys: tuple[str, ...], *, renders: bool = False) -> None:
        """Raises: ValueError unless the actions are a flat Box and what is read of the observations flat Boxes, or if
        pictures are wanted of an environment that does not give them.
        """
        from gymnasium.spaces import Box, Dict

        if renders and env.render_mode != "rgb_array":
            raise ValueError(f"{name} has the render mode {env.render_mode!r}; images need rgb_array")
        self._renders = renders

        self._env, self._id, self._keys = env, name, keys
        spaces = {"action_space": env.action_space, "observation_space": env.observation_space}
        if isinstance(env.observation_space, Dict):
            entries = spaces.pop("observation_space")
            missing = [key for key in keys if key not in entries.spaces]
            if missing:
                raise ValueError(f"the observation of {name} has no {missing}; set keys to some of {list(entries)}")
            spaces |= {key: entries[key] for key in keys}
        for what, space in spaces.items():
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise ValueError(f"{name} has {what} {space}; a flat Box is needed")
        self.obs_dim = sum(space.shape[0] for what, space in spaces.items() if what != "action_space")
        self.action_dim = env.action_space.shape[0]
        self.action_low = env.action_space.low.astype(np.float32)
        self.action_high = env.action_space.high.astype(np.float32)
        self.control_rate_hz: float | None = None
        self._obs = np.zeros(self.obs_dim, np.float32)

    def reset(self, seed: int) -> None:
        """Start an episode from the seed."""
        self._obs = self._flat(self._env.reset(seed=seed)[0])

    def advance(self, action: Array) -> Step:
        """One control step with the action clipped to the space."""
        clipped = np.clip(action, self.action_low, self.action_high)
        obs, reward, terminated, truncated, info = self._env.step(clipped)
        self._obs = self._flat(obs)
        success = bool(info.get("success", info.get("is_success", False)))
        return Step(float(reward), bool(terminated), bool(truncated) and not terminated, success)

    def observe(self) -> Array:
        """The last observation."""
        return self._obs

    def frame(self, camera: str | None = None, size: int = PIXELS) -> Picture:
        """What its render() shows, at size x size. Raises: ValueError if the spec asks for no images."""
        if not self._renders:
            raise ValueError(f"{self._id} was made without rendering; give its environment images to film it")
        return resized(self._env.render(), size)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _flat(self, obs: Any) -> Array:
        joined = np.concatenate([obs[key] for key in self._keys]) if isinstance(obs, dict) else obs
        return np.asarray(joined, np.float32)
