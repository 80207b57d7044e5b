"""A scripted controller for gymnasium-robotics' FetchPickAndPlace: above the block, down, close, to the goal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffalign_robot.envs import Array

_GAIN, _HOVER, _NEAR = 6.0, 0.05, 0.01  # action per metre; metres
_CLOSING_STEPS = 4


def pick_and_place() -> Callable[[Array], Array]:
    """A controller for one episode: [observation 25, desired_goal 3] -> action [4], gripper last."""
    closing = 0

    def act(obs: Array) -> Array:
        nonlocal closing
        hand, block, goal = obs[0:3], obs[3:6], obs[25:28]
        off = np.asarray(block - hand, np.float64)
        move: NDArray[np.float64] = off
        if closing == 0 and np.linalg.norm(off[:2]) > _NEAR:
            move = off + np.array([0.0, 0.0, _HOVER])
        elif closing or abs(off[2]) <= _NEAR:
            closing += 1
            if closing > _CLOSING_STEPS:
                move = np.asarray(goal - block, np.float64)
        grip = -1.0 if closing else 1.0
        return np.append(np.clip(_GAIN * move, -1, 1), grip).astype(np.float32)

    return act
