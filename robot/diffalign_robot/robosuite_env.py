"""robosuite tasks with robomimic's low-dimensional observations."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np

from diffalign_robot.cameras import Picture, shared_camera
from diffalign_robot.choices import Robosuite
from diffalign_robot.envs import PIXELS, Array, Step, choose_renderer

_OF_ROBOMIMIC = {"object": "object-state"}  # robomimic's name of an observation -> robosuite's


class RobosuiteEpisode:
    """A task whose placements come from the episode's seed; the model is built once, not at every reset."""

    def __init__(self, spec: Robosuite) -> None:
        """Raises: ValueError for an unknown task or observation, naming the known ones."""
        choose_renderer()
        self._spec, self._env = spec, _build(spec)
        self._keys = [_OF_ROBOMIMIC.get(key, key) for key in spec.keys]
        self._steps = 0
        self._seen = self._env.observation_spec()
        missing = [key for key in self._keys if np.ndim(self._seen.get(key)) != 1]
        if missing:
            raise ValueError(f"{spec.task} has no flat observations {missing}; set keys to some of {list(self._seen)}")
        self.obs_dim = len(self.observe())
        low, high = self._env.action_spec
        self.action_low, self.action_high = low.astype(np.float32), high.astype(np.float32)
        self.action_dim = len(low)
        self.control_rate_hz: float | None = float(spec.control_rate_hz)

    def reset(self, seed: int) -> None:
        """Place robot and objects from the seed; robosuite draws from NumPy's global state, which is left as it was."""
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        try:
            self._seen = self._env.reset()
        finally:
            np.random.set_state(state)  # noqa: NPY002
        self._steps = 0

    def advance(self, action: Array) -> Step:
        """One control step with the action clipped to the limits; the time limit is the spec's horizon."""
        self._seen, reward, _, _ = self._env.step(np.clip(action, self.action_low, self.action_high))
        self._steps += 1
        success = bool(self._env._check_success())
        ends = success and self._spec.success_ends
        paid = float(success) if self._spec.reward == "sparse" else float(reward)
        return Step(paid, ends, not ends and self._steps >= self._spec.horizon, success)

    def observe(self) -> Array:
        """The parts that the spec's keys name, one after the other."""
        return np.asarray(np.concatenate([self._seen[key] for key in self._keys]), np.float32)

    def frame(self, camera: str | None = None, size: int = PIXELS) -> Picture:
        """A picture [size, size, 3] from one of robosuite's cameras, by default agentview."""
        model, data = self._env.sim.model._model, self._env.sim.data._data
        return shared_camera(_model, self._spec, size).picture(model, data, camera or "agentview")

    def close(self) -> None:
        """End the simulator."""
        self._env.close()


def _model(spec: Robosuite) -> Any:
    return _build(spec).sim.model._model


def _build(spec: Robosuite) -> Any:
    import robosuite

    if spec.task not in robosuite.ALL_ENVIRONMENTS:
        close = difflib.get_close_matches(spec.task, robosuite.ALL_ENVIRONMENTS, n=1)
        raise ValueError(f"robosuite has no task {spec.task!r}; did you mean {close or robosuite.ALL_ENVIRONMENTS}?")
    return robosuite.make(spec.task, robots=list(spec.robots), has_renderer=False, has_offscreen_renderer=False,
                          use_camera_obs=False, control_freq=spec.control_rate_hz, ignore_done=True, hard_reset=False,
                          reward_shaping=spec.reward == "dense")
