"""A registered Gymnasium environment of two numbers, importable by worker processes as `toy_env:ToyPoint-v0`."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

POINT = "toy_env:ToyPoint-v0"


class PointRobot(gymnasium.Env):
    """A point that moves by its action; within 0.2 of the origin it succeeds, is paid 1, and the episode ends."""

    observation_space = Box(-5, 5, (2,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain
        self.position = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)
        self.position = np.array([np.cos(angle), np.sin(angle)], np.float32)
        return self.position.copy(), {}

    def step(self, action):
        action = np.clip(action, -1, 1)
        self.position = np.clip(self.position + self.gain * action, -5, 5).astype(np.float32)
        success = bool(np.linalg.norm(self.position) < 0.2)
        return self.position.copy(), float(success), success, False, {"success": success}



class GoalPoint(gymnasium.Wrapper):
    """The point with the Dict observation of goal environments; the origin is shown as a goal beside it."""

    observation_space = Dict({"achieved_goal": Box(-5, 5, (2,), np.float32),
                              "desired_goal": Box(-5, 5, (3,), np.float64), "observation": Box(-5, 5, (2,), np.float32),
                              "picture": Box(0, 255, (4, 4, 3), np.uint8)})

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.seen(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        return self.seen(obs), *rest

    def seen(self, obs):
        return {"achieved_goal": obs + 1, "desired_goal": np.full(3, 0.5), "observation": obs,
                "picture": np.zeros((4, 4, 3), np.uint8)}


def make_goal_point():
    """A factory, as `toy_env:make_goal_point`."""
    return GoalPoint(PointRobot())


class ShownPoint(PointRobot):
    """The point that can be seen: render() is 32 x 32, with a white square of 4 pixels where it is in [-1, 1]."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, gain: float = 1.0, render_mode: str | None = None) -> None:
        super().__init__(gain)
        self.render_mode, self.renders = render_mode, 0

    def render(self):
        self.renders += 1
        picture = np.zeros((32, 32, 3), np.uint8)
        x, y = np.clip(np.round(14 + 14 * self.position), 0, 28).astype(int)
        picture[y : y + 4, x : x + 4] = 255
        return picture


def make_blind_point():
    """A factory of a point that nobody can see, as `toy_env:make_blind_point`."""
    return PointRobot()


gymnasium.register("ToyPoint-v0", entry_point=PointRobot, max_episode_steps=50, kwargs={"gain": 1.0})
gymnasium.register("ToySlowPoint-v0", entry_point=PointRobot, max_episode_steps=16, kwargs={"gain": 0.25})
gymnasium.register("ToyGoalPoint-v0", entry_point=make_goal_point, max_episode_steps=50)
gymnasium.register("ToyShownPoint-v0", entry_point=ShownPoint, max_episode_steps=16, kwargs={"gain": 0.25})


class Diverging(gymnasium.ObservationWrapper):
    """The point, whose position is infinite where it has moved to more than 2 on the first axis."""

    def observation(self, obs):
        return np.where(obs > 2, np.inf, obs).astype(np.float32)


def make_diverging_point():
    """A factory, as `toy_env:make_diverging_point`."""
    return Diverging(PointRobot())
