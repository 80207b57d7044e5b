"""Environments that users bring: Dict observations, factories, gymnasium-robotics."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign_robot.choices import Custom, Gymnasium
from diffalign_robot.envs import make
from diffalign_robot.vector import ChunkVectorEnv

GOAL = "toy_env:ToyGoalPoint-v0"


def test_a_dict_observation_is_its_keys_in_order():
    plain, point = make(Gymnasium(id="toy_env:ToyPoint-v0")), make(Gymnasium(id=GOAL))
    assert point.obs_dim == 5
    for episode in (plain, point):
        episode.reset(3)
    for _ in range(2):
        seen = point.observe()
        assert seen.dtype == np.float32
        np.testing.assert_array_equal(seen, [*plain.observe(), 0.5, 0.5, 0.5])
        for episode in (plain, point):
            episode.advance(np.array([0.3, -2.0], np.float32))
    turned = make(Gymnasium(id=GOAL, keys=("desired_goal", "achieved_goal")))
    turned.reset(3)
    plain.reset(3)
    np.testing.assert_allclose(turned.observe(), [0.5, 0.5, 0.5, *(plain.observe() + 1)], rtol=1e-6)


def test_a_factory_runs_in_worker_processes_under_its_horizon():
    spec = Custom(factory="toy_env:make_goal_point", horizon=3)
    results = []
    for workers in (1, 2):
        env = ChunkVectorEnv(spec, 2, workers=workers)
        first, step = env.reset([5, 6]), env.step(np.zeros((2, 4, 2), np.float32))
        assert step.executed.tolist() == [3, 3]
        assert step.truncated.all()
        assert not step.terminated.any()
        results.append(np.concatenate([first, step.obs]))
        env.close()
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(("spec", "message"), [
    (Gymnasium(id=GOAL, keys=("goal",)), r"has no \['goal'\]; set keys to some of \['achieved_goal', 'desired_goal'"),
    (Gymnasium(id=GOAL, keys=("picture",)), "has picture Box.*a flat Box is needed"),
    (Custom(factory="no_such_module_here:make"), "no module named 'no_such_module_here'; put its folder on PYTHONPATH"),
    (Custom(factory="toy_env:nothing"), "toy_env has no function 'nothing'"),
    (Custom(factory="toy_env:POINT"), "toy_env has no function 'POINT'"),
    (Custom(factory="builtins:dict"), "must return a gymnasium.Env, got dict")])
def test_what_cannot_be_made_says_why(spec, message):
    with pytest.raises(ValueError, match=message):
        make(spec)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Custom(factory="toy_env"), "factory must be module:function"),
    (lambda: Custom(factory="toy_env:make()"), "factory must be module:function"),
    (lambda: Custom(factory="toy_env:make", horizon=0), "horizon must be at least 1, got 0"),
    (lambda: Gymnasium(id=GOAL, keys=()), "keys must name at least one entry")])
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("name", "keys", "dims"), [
    ("FetchReach-v4", ("observation", "desired_goal"), (13, 4)),
    ("FetchPush-v4", ("observation", "achieved_goal", "desired_goal"), (31, 4))])
def test_fetch_where_gymnasium_robotics_is_installed(name, keys, dims):
    pytest.importorskip("gymnasium_robotics")
    env = ChunkVectorEnv(Gymnasium(id=f"gymnasium_robotics:{name}", horizon=5, keys=keys), 2)
    assert (env.obs_dim, env.action_dim) == dims
    first = env.reset([1, 2])
    step = env.step(np.ones((2, 8, 4), np.float32))
    assert step.executed.tolist() == [5, 5]
    assert step.truncated.all()
    assert np.abs(step.obs - first).max() > 0.01
    env.close()
