"""The planar arm of models/planar_arm.xml as a world for the twin: `python -m diffalign_controller.arm`.

It observes [10]: the angles and angular velocities of shoulder, elbow and wrist, the tool's x and y, the goal's x and
y. A command [3] is the angles wanted. Success is the tool within 0.02 m of the goal, which the seed places.
"""

from __future__ import annotations

import argparse
from importlib import resources
from typing import Any

import numpy as np

from diffalign_controller.twin_server import Array, Sensed, parser, serve

_TOLERANCE_M = 0.02


class PlanarArm:
    """Three joints under position servos; starts at rest with the given angles."""

    names = ("shoulder", "elbow", "wrist")

    def __init__(self, *, seed: int = 0, rate_hz: float = 100.0, start: tuple[float, ...] = (0.0, 0.5, 0.5)) -> None:
        """Raises: ValueError for a rate that is not a whole number of milliseconds a period."""
        import mujoco

        self._mujoco: Any = mujoco
        model = resources.files("diffalign_controller") / "models" / "planar_arm.xml"
        self._model: Any = mujoco.MjModel.from_xml_string(model.read_text())
        self._data: Any = mujoco.MjData(self._model)
        self._substeps = round(1 / (rate_hz * self._model.opt.timestep))
        if self._substeps < 1 or abs(self._substeps * rate_hz * self._model.opt.timestep - 1) > 1e-6:
            raise ValueError(f"the arm simulates steps of 1 ms: rate_hz must divide 1000, got {rate_hz}")
        self.rate_hz = rate_hz
        self.rest: Array = np.array(start)
        self._goal = self._tool_at(np.random.default_rng(seed).uniform([-1.0, 0.2, 0.2], [1.0, 1.2, 1.2]))
        self._tool_at(self.rest)

    def step(self, command: Array) -> None:
        """One control period towards the angles [3]."""
        self._data.ctrl[:] = command
        self._mujoco.mj_step(self._model, self._data, nstep=self._substeps)

    def sense(self) -> Sensed:
        """See the head of this file."""
        self._mujoco.mj_kinematics(self._model, self._data)
        tool = self._data.site("tool").xpos.copy()
        values = np.concatenate([self._data.qpos, self._data.qvel, tool[:2], self._goal[:2]])
        near = float(np.linalg.norm(tool - self._goal)) < _TOLERANCE_M
        return Sensed(values, self._data.qpos.copy(), tool, near)

    def human(self) -> Array:
        """A person brings the arm back to where it started."""
        return self.rest

    def _tool_at(self, angles: Array) -> Array:
        self._data.qpos[:], self._data.qvel[:] = angles, 0.0
        self._data.ctrl[:] = angles
        self._mujoco.mj_forward(self._model, self._data)
        tool: Array = self._data.site("tool").xpos.copy()
        return tool


def main() -> None:
    """Serve the arm."""
    found = parser("A planar arm that is simulated in real time.")
    found.add_argument("--rate", type=float, default=100.0, help="control rate in Hz (default: %(default)s)")
    args: argparse.Namespace = found.parse_args()
    serve(PlanarArm(seed=args.seed, rate_hz=args.rate), args)


if __name__ == "__main__":
    main()
