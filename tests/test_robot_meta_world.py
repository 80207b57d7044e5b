"""Meta-World episodes: the lazy path against Meta-World's own step, seeds, time limits, success."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from diffalign_robot.choices import MetaWorld
from diffalign_robot.meta_world import SUCCESS_RADIUS, MetaWorldEpisode, _build


def expert_action(policy, obs, rng, noise=0.3):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Constant(s) may be too high": the environment clips
        action = policy.get_action(obs)
    return np.clip(action + noise * rng.normal(size=4), -1, 1).astype(np.float32)


@pytest.mark.parametrize("task", sorted(SUCCESS_RADIUS))
def test_lazy_steps_equal_meta_worlds_own(task):
    from gymnasium.envs.mujoco import MujocoEnv
    from metaworld.policies import ENV_POLICY_MAP

    lazy = MetaWorldEpisode(MetaWorld(task=task, success_ends=False))
    own, successes = _build(task), []
    for seed in range(3):
        rng, policy = np.random.default_rng(seed), ENV_POLICY_MAP[task]()
        lazy.reset(seed)
        own.seed(seed)
        own.curr_path_length = 0
        MujocoEnv.reset(own)
        own._prev_obs = own._get_curr_obs_combined_no_goal()
        obs = np.concatenate([own._prev_obs, own._prev_obs, own._get_pos_goal()])
        np.testing.assert_allclose(lazy.observe(), obs, rtol=0, atol=1e-7)
        for t in range(70):
            action = expert_action(policy, obs, rng)
            obs, _, _, _, info = own.step(action)
            step = lazy.advance(action)
            assert step.success == bool(info["success"]) == (step.reward == 1.0)
            if t % 4 == 3:
                np.testing.assert_allclose(lazy.observe(), obs, rtol=0, atol=1e-6)
                np.testing.assert_array_equal(lazy._data.qpos, own.data.qpos)
        successes.append(bool(info["success"]))
    assert any(successes)


def test_an_episode_repeats_bit_for_bit_from_its_seed_whatever_came_before():
    def play(episode, seed):
        episode.reset(seed)
        seen = [episode.observe()]
        for action in np.random.default_rng(seed).uniform(-1, 1, (12, 4)).astype(np.float32):
            episode.advance(action)
            seen.append(episode.observe())
        return np.stack(seen)

    spec = MetaWorld(task="pick-place-v3")
    used, fresh = MetaWorldEpisode(spec), MetaWorldEpisode(spec)
    first = play(used, 5)
    other = play(used, 6)
    np.testing.assert_array_equal(play(used, 5), first)
    np.testing.assert_array_equal(play(fresh, 5), first)
    assert not np.array_equal(first[0, 4:7], other[0, 4:7])  # the object is placed anew
    assert not np.array_equal(first[0, -3:], other[0, -3:])  # and so is the goal, which is visible


def test_the_horizon_truncates_and_does_not_terminate():
    episode = MetaWorldEpisode(MetaWorld(task="push-v3", horizon=3))
    episode.reset(0)
    steps = [episode.advance(np.zeros(4, np.float32)) for _ in range(3)]
    assert [s.truncated for s in steps] == [False, False, True]
    assert not any(s.terminated or s.success or s.reward for s in steps)


@pytest.mark.parametrize(("ends", "terminated"), [(True, True), (False, False)])
def test_success_ends_the_episode_only_if_asked(ends, terminated):
    from metaworld.policies import ENV_POLICY_MAP

    episode = MetaWorldEpisode(MetaWorld(task="pick-place-v3", success_ends=ends))
    episode.reset(0)
    rng, policy = np.random.default_rng(0), ENV_POLICY_MAP["pick-place-v3"]()
    for _ in range(100):
        step = episode.advance(expert_action(policy, episode.observe(), rng, noise=0.0))
        if step.success:
            break
    assert step.success
    assert step.terminated is terminated
    assert step.reward == 1.0
    assert not step.truncated


def test_actions_beyond_the_limits_act_like_the_limits():
    episode, ends = MetaWorldEpisode(MetaWorld()), []
    for scale in (1.0, 7.0):
        episode.reset(3)
        for _ in range(4):
            episode.advance(np.array([scale, -scale, -scale, scale], np.float32))
        ends.append(episode.observe())
    np.testing.assert_array_equal(ends[0], ends[1])


def test_dense_rewards_and_other_tasks_take_meta_worlds_own_step():
    dense = MetaWorldEpisode(MetaWorld(reward="dense", success_ends=False))
    dense.reset(0)
    own = _build("pick-place-v3")
    from gymnasium.envs.mujoco import MujocoEnv

    own.seed(0)
    MujocoEnv.reset(own)
    own._prev_obs = own._get_curr_obs_combined_no_goal()
    action = np.array([0.3, 0.1, -0.5, 0.2], np.float32)
    obs, reward, *_ = own.step(action)
    assert dense.advance(action).reward == pytest.approx(float(reward), abs=1e-9)
    np.testing.assert_allclose(dense.observe(), obs, rtol=0, atol=1e-6)
    reach = MetaWorldEpisode(MetaWorld(task="reach-v3"))
    reach.reset(1)
    assert reach.advance(action).reward == 0.0


def test_an_unknown_task_is_refused_with_the_closest():
    with pytest.raises(ValueError, match=r"pick-plac-v3.*did you mean pick-place-v3"):
        MetaWorldEpisode(MetaWorld(task="pick-plac-v3"))


def test_choices_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"horizon must lie in 1\.\.500"):
        MetaWorld(horizon=501)
    with pytest.raises(ValueError, match="set success_ends to false"):
        MetaWorld(reward="dense")
