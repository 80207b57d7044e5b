"""Meta-World episodes that simulate every step and do the rest only when somebody looks.

Meta-World's own step spends five times longer on observations, contact lists and shaped rewards than in the simulator,
and its reset runs 100 settling steps that always end in the same state. For the tasks in `SUCCESS_RADIUS` with a
sparse reward none of that is needed inside a chunk: `advance` runs the physics and the success test, `observe` builds
the observation. States, successes and observations are those of Meta-World's own step (tests/test_robot_meta_world.py).
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign_robot.cameras import Picture, shared_camera
from diffalign_robot.choices import MetaWorld
from diffalign_robot.envs import PIXELS, Array, Step, choose_renderer

# Tasks whose success is "the object's body is within this many metres of the target".
SUCCESS_RADIUS = {"pick-place-v3": 0.07, "push-v3": 0.05}
CAMERA = "corner2"  # of videos
_UPSIDE_DOWN = ("corner", "corner2", "corner3")  # as these cameras are mounted
_OBS_DIM, _ACTION_DIM = 39, 4


class MetaWorldEpisode:
    """A Meta-World v3 task with the goal visible and every placement drawn from the episode's seed."""

    def __init__(self, spec: MetaWorld) -> None:
        choose_renderer()
        import mujoco

        self._mujoco: Any = mujoco
        self._spec = spec
        self._env = _build(spec.task)
        self._model, self._data = self._env.model, self._env.data
        self.control_rate_hz = 1 / self._env.dt
        self._before = mujoco.MjData(self._model)  # one control step ago: observations hold two frames
        self._settled: Any = None
        self._radius = SUCCESS_RADIUS.get(spec.task) if spec.reward == "sparse" else None
        self._obs: Array | None = None
        self._steps = 0
        if self._radius is not None:
            self._settle = self._env._reset_hand
            self._env._reset_hand = self._reset_hand
            self._env._get_quat_objects = self._quaternion
        self.obs_dim, self.action_dim = _OBS_DIM, _ACTION_DIM
        self.action_low, self.action_high = -np.ones(_ACTION_DIM, np.float32), np.ones(_ACTION_DIM, np.float32)

    def reset(self, seed: int) -> None:
        """Place object and goal from the seed."""
        from gymnasium.envs.mujoco import MujocoEnv

        self._env.seed(seed)
        self._env.curr_path_length = self._steps = 0
        MujocoEnv.reset(self._env)  # Meta-World's reset does this twice
        self._env._prev_obs = self._env._get_curr_obs_combined_no_goal()
        self._mujoco.mj_copyData(self._before, self._model, self._data)
        self._obs = self._lazy_observation()

    def advance(self, action: Array) -> Step:
        """One control step with the action clipped to [-1, 1]; the time limit is the spec's horizon."""
        clipped = np.clip(action, -1, 1)
        self._steps += 1
        if self._radius is None:
            obs, reward, _, _, info = self._env.step(clipped)
            self._obs, success = obs.astype(np.float32), bool(info["success"])
        else:
            self._obs, success = None, self._simulate(clipped, self._radius)
            reward = 0.0
        ends = success and self._spec.success_ends
        paid = float(success) if self._spec.reward == "sparse" else float(reward)
        return Step(paid, ends, not ends and self._steps >= self._spec.horizon, success)

    def observe(self) -> Array:
        """The state: gripper and objects now and one control step ago, the goal; [39]."""
        if self._obs is None:
            self._obs = self._lazy_observation()
        return self._obs

    def frame(self, camera: str | None = None, size: int = PIXELS) -> Picture:
        """A picture [size, size, 3] from a camera of the model, by default from the corner."""
        camera = camera or CAMERA
        picture = shared_camera(_model, self._spec, size).picture(self._model, self._data, camera)
        return picture[::-1, ::-1].copy() if camera in _UPSIDE_DOWN else picture

    def close(self) -> None:
        """Nothing to free: cameras are shared by the episodes of a process."""

    def _simulate(self, action: Array, radius: float) -> bool:
        env = self._env
        self._mujoco.mj_copyData(self._before, self._model, self._data)
        env.set_xyz_action(action[:3])
        env.do_simulation([action[-1], -action[-1]], env.frame_skip)
        self._mujoco.mj_kinematics(self._model, self._data)
        return bool(np.linalg.norm(env._get_pos_objects() - env._target_pos) <= radius)

    def _lazy_observation(self) -> Array:
        env = self._env
        now = env._get_curr_obs_combined_no_goal()
        env.data = self._before
        before = env._get_curr_obs_combined_no_goal()
        env.data = self._data
        space = env.sawyer_observation_space
        obs: Array = np.clip(np.hstack((now, before, env._get_pos_goal())), space.low, space.high).astype(np.float32)
        return obs

    def _reset_hand(self, steps: int = 50) -> None:
        """The settled hand, simulated once: it starts from the same state at every reset."""
        if self._settled is None:
            self._settle(steps)
            self._settled = self._mujoco.MjData(self._model)
            self._mujoco.mj_copyData(self._settled, self._model, self._data)
        else:
            self._mujoco.mj_copyData(self._data, self._model, self._settled)
        self._env.init_tcp = self._env.tcp_center

    def _quaternion(self) -> NDArray[np.float64]:
        """(x, y, z, w) of the object with its largest component positive, as scipy gives it, a hundred times faster."""
        quaternion = np.empty(4)
        self._mujoco.mju_mat2Quat(quaternion, self._env.data.geom("objGeom").xmat)
        quaternion = quaternion[[1, 2, 3, 0]]
        signed: NDArray[np.float64] = quaternion * np.sign(quaternion[np.abs(quaternion).argmax()])
        return signed


def _model(spec: MetaWorld) -> Any:
    return _build(spec.task).model


def _build(task: str) -> Any:
    """Meta-World's environment, seeded by `seed()` and with the goal in the observation."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    if task not in ALL_V3_ENVIRONMENTS:
        close = difflib.get_close_matches(task, ALL_V3_ENVIRONMENTS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; it must be one of {', '.join(ALL_V3_ENVIRONMENTS)}"
        raise ValueError(f"Meta-World has no task {task!r}{hint}")
    env = ALL_V3_ENVIRONMENTS[task]()
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)  # cached for the hidden goal
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    return env
