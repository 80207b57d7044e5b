"""The controller that does nothing; with action_noise it is a random policy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffalign_robot.envs import Array


def rest() -> Callable[[Array], Array]:
    """A controller for one episode of any environment: every action feature is 0."""
    return lambda obs: np.zeros((), np.float32)
