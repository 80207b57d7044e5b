"""A scripted controller for robosuite Lift: reach above the cube, go down, close, lift."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffalign_robot.envs import Array

_GAIN, _HOVER, _NEAR = 10.0, 0.06, 0.02  # action per metre; metres
_CLOSING_STEPS = 6


def lift() -> Callable[[Array], Array]:
    """A controller for one episode: observation [19] of robomimic's low-dimensional keys -> action [7] of OSC_POSE."""
    closing = 0

    def act(obs: Array) -> Array:
        nonlocal closing
        hand, cube = obs[0:3], obs[9:12]
        off = np.asarray(cube - hand, np.float64)
        above = np.linalg.norm(off[:2]) < _NEAR
        move: NDArray[np.float64] = off
        if closing == 0 and not above:
            move = off + np.array([0.0, 0.0, _HOVER])
        elif closing or abs(off[2]) <= _NEAR / 2:
            closing += 1
            if closing > _CLOSING_STEPS:
                move = np.array([0.0, 0.0, 0.1])
        grip = 1.0 if closing else -1.0
        return np.concatenate([np.clip(_GAIN * move, -1, 1), np.zeros(3), [grip]]).astype(np.float32)

    return act
