"""The environment that a policy was trained in, in real time behind a socket: `python -m diffalign_robot.twin`.

The server and its protocol are the controller's (diffalign_controller.twin_server). An episode does not end here: the
simulation goes on after its horizon and after a success, as a robot would.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from diffalign.config import build
from diffalign_controller.twin_server import Array, Sensed, parser, serve
from diffalign_robot.choices import Environment
from diffalign_robot.envs import make


class EpisodeWorld:
    """An episode of an environment; its actions are velocities or changes, so that a position is not known: zeros."""

    names = None

    def __init__(self, spec: Environment, *, seed: int, rate_hz: float) -> None:
        self._spec, self._episode = spec, make(spec)
        self._episode.reset(seed)
        self._success = False
        self._expert: Callable[[Array], Array] | None = None
        self.rate_hz = rate_hz
        self.rest: Array = np.zeros(self._episode.action_dim)

    def step(self, command: Array) -> None:
        """One control step."""
        self._success = self._episode.advance(np.asarray(command, np.float32)).success

    def sense(self) -> Sensed:
        """The observation, and whether the last step was a success."""
        return Sensed(self._episode.observe(), self.rest, None, self._success)

    def human(self) -> Array:
        """What the scripted expert does. Raises: ValueError where no expert is known."""
        from diffalign_robot.demos import scripted_expert

        self._expert = self._expert or scripted_expert(self._spec)()
        low, high = self._episode.action_low, self._episode.action_high
        return np.clip(self._expert(self._episode.observe()), low, high)


def main() -> None:
    """Serve an environment."""
    found = parser("An environment that is simulated in real time.")
    found.add_argument("--environment", required=True, help="its spec as JSON, as in a package's manifest")
    found.add_argument("--rate", type=float, required=True, help="control rate in Hz")
    args = found.parse_args()
    spec = build(Environment, json.loads(args.environment), "--environment")
    serve(EpisodeWorld(spec, seed=args.seed, rate_hz=args.rate), args)


if __name__ == "__main__":
    main()
