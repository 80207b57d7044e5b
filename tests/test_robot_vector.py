"""The chunk-stepping vector of simulators, on a toy Gymnasium environment and on Meta-World."""

from __future__ import annotations

import numpy as np
import pytest
from toy_env import POINT, PointRobot

from diffalign_robot.choices import Custom, Gymnasium, MetaWorld
from diffalign_robot.envs import make
from diffalign_robot.vector import ChunkVectorEnv


def chunks(rng, envs, length=4, scale=1.0):
    return (scale * rng.uniform(-1, 1, (envs, length, 2))).astype(np.float32)


@pytest.fixture
def vector():
    env = ChunkVectorEnv(Gymnasium(id=POINT), 3)
    yield env
    env.close()


def test_chunks_equal_hand_stepped_environments(vector):
    rng, seeds = np.random.default_rng(0), [4, 5, 6]
    obs = vector.reset(seeds)
    singles = [PointRobot() for _ in seeds]
    np.testing.assert_array_equal(obs, [env.reset(seed=s)[0] for env, s in zip(singles, seeds)])
    for _ in range(2):
        actions = chunks(rng, 3)
        step = vector.step(actions)
        for i, env in enumerate(singles):
            reward = 0.0
            for action in actions[i]:
                seen, r, terminated, truncated, _ = env.step(action)
                reward += r
                assert not terminated
                assert not truncated
            np.testing.assert_array_equal(step.obs[i], seen)
            assert step.reward[i] == pytest.approx(reward, rel=1e-6)
        assert step.executed.tolist() == [4, 4, 4]


def test_rewards_after_the_end_inside_a_chunk_do_not_count(vector):
    # PointRobot pays 1 per step at the goal and would go on paying; the episode ends at the first.
    vector.reset([0, 1, 2])
    to_goal = np.zeros((3, 4, 2), np.float32)
    start = vector.reset([0, 1, 2])
    to_goal[0] = -start[0]  # environment 0 is carried to the origin by the first action
    step = vector.step(np.clip(to_goal, -1, 1))
    assert step.terminated.tolist() == [True, False, False]
    assert step.truncated.tolist() == [False, False, False]
    assert step.success.tolist() == [True, False, False]
    assert step.executed[0] == 1
    assert step.reward[0] == 1.0


def test_the_final_observation_is_that_of_the_last_executed_step(vector):
    start = vector.reset([0, 1, 2])
    actions = np.zeros((3, 4, 2), np.float32)
    actions[0, 0] = -start[0]
    actions[0, 1:] = 1.0  # never executed
    step = vector.step(actions)
    np.testing.assert_allclose(step.obs[0], 0.0, atol=1e-6)
    np.testing.assert_array_equal(step.obs[1], start[1])


def test_an_ended_environment_idles_until_the_next_reset(vector):
    start = vector.reset([0, 1, 2])
    actions = np.zeros((3, 4, 2), np.float32)
    actions[0, 0] = -start[0]
    ended = vector.step(actions)
    later = vector.step(np.ones((3, 4, 2), np.float32))
    assert later.executed.tolist() == [0, 4, 4]
    assert later.reward[0] == 0.0
    assert not later.terminated[0]
    assert not later.truncated[0]
    assert not later.success[0]
    np.testing.assert_array_equal(later.obs[0], ended.obs[0])
    vector.reset([0, 1, 2])
    assert vector.step(np.zeros((3, 4, 2), np.float32)).executed.tolist() == [4, 4, 4]


def test_the_time_limit_truncates_and_does_not_terminate():
    env = ChunkVectorEnv(Gymnasium(id=POINT, horizon=6), 2)
    env.reset([1, 2])
    first, second = (env.step(np.zeros((2, 4, 2), np.float32)) for _ in range(2))
    assert not first.truncated.any()
    assert second.truncated.all()
    assert not second.terminated.any()
    assert second.executed.tolist() == [2, 2]
    env.close()


def test_actions_are_clipped_to_the_limits_by_the_simulator(vector):
    limits, beyond = np.ones((3, 1, 2), np.float32), 9 * np.ones((3, 1, 2), np.float32)
    vector.reset([1, 2, 3])
    at_limit = vector.step(limits).obs
    vector.reset([1, 2, 3])
    np.testing.assert_array_equal(vector.step(beyond).obs, at_limit)


@pytest.mark.parametrize("workers", [2, 3])
def test_results_do_not_depend_on_the_number_of_workers(workers):
    spec = Gymnasium(id=POINT, horizon=9)
    one, many = ChunkVectorEnv(spec, 5), ChunkVectorEnv(spec, 5, workers=workers)
    seeds = [11, 12, 13, 14, 15]
    for _ in range(2):
        np.testing.assert_array_equal(one.reset(seeds), many.reset(seeds))
        rng = np.random.default_rng(0)
        for _ in range(3):
            actions = chunks(rng, 5, scale=2.0)
            for a, b in zip(one.step(actions), many.step(actions)):
                np.testing.assert_array_equal(a, b)
    one.close()
    many.close()


def test_workers_repeat_meta_world_bit_for_bit():
    spec = MetaWorld(task="push-v3", horizon=8)
    one, two = ChunkVectorEnv(spec, 2), ChunkVectorEnv(spec, 2, workers=2)
    np.testing.assert_array_equal(one.reset([3, 9]), two.reset([3, 9]))
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 8, 4)).astype(np.float32)
    for a, b in zip(one.step(actions), two.step(actions)):
        np.testing.assert_array_equal(a, b)
    assert one.step(actions).executed.tolist() == [0, 0]
    one.close()
    two.close()


def test_lazy_observation_does_not_change_what_a_chunk_sees():
    env = make(MetaWorld(task="push-v3"))
    actions = np.random.default_rng(1).uniform(-1, 1, (8, 4)).astype(np.float32)
    seen = []
    for look_every in (1, 4):
        env.reset(2)
        for i, action in enumerate(actions):
            env.advance(action)
            if (i + 1) % look_every == 0:
                env.observe()
        seen.append(env.observe())
    np.testing.assert_array_equal(seen[0], seen[1])
    env.close()


def test_refusals(vector):
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        ChunkVectorEnv(Gymnasium(id=POINT), 0)
    with pytest.raises(ValueError, match="3 environments need 3 seeds, got 2"):
        vector.reset([1, 2])
    vector.reset([1, 2, 3])
    with pytest.raises(ValueError, match=r"chunks must be \[3, Ta, 2\]"):
        vector.step(np.zeros((3, 4, 5), np.float32))
    bad = np.zeros((3, 4, 2), np.float32)
    bad[1, 2, 0] = np.nan
    with pytest.raises(FloatingPointError, match="environment 1 is not finite; nothing was executed"):
        vector.step(bad)
    assert vector.step(np.zeros((3, 1, 2), np.float32)).executed.tolist() == [1, 1, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_simulation_that_diverges_is_named(workers):
    """Held within a limit an infinite observation would look like any far one to a policy."""
    env = ChunkVectorEnv(Custom(factory="toy_env:make_diverging_point", horizon=9), 2, workers=workers)
    env.reset([1, 2])
    still, right = np.zeros((2, 1, 2), np.float32), np.zeros((2, 3, 2), np.float32)
    right[1, :, 0] = 1
    env.step(still)
    with pytest.raises(FloatingPointError, match="observation of environment 1 is not finite after a chunk"):
        env.step(right)
    env.close()


def test_gymnasium_refusals():
    with pytest.raises(ValueError, match="Gymnasium cannot make 'NoSuch-v0'"):
        make(Gymnasium(id="NoSuch-v0"))
    with pytest.raises(ValueError, match="action_space Discrete"):
        make(Gymnasium(id="CartPole-v1"))
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        Gymnasium(id=POINT, horizon=0)


def test_a_killed_worker_is_reported():
    env = ChunkVectorEnv(Gymnasium(id=POINT), 2, workers=2)
    env.reset([1, 2])
    env._workers[0]._process.kill()
    env._workers[0]._process.join()
    with pytest.raises(RuntimeError, match="simulator process died"):
        env.step(np.zeros((2, 1, 2), np.float32))
    env._workers[1].close()
