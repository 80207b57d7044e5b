"""Demonstrations, chunk networks, the environment as a rollout source, and evaluation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_env import POINT

from diffalign.diffusion import DDPM, ODE, TrainedSteps
from diffalign.policy.normalize import Normalizer
from diffalign_robot.choices import ChunkMLP, Gymnasium, MetaWorld
from diffalign_robot.demos import Demonstrations, collect, join, scripted_expert
from diffalign_robot.evaluate import evaluate, evaluation_policy, seeds_for
from diffalign_robot.networks import ChunkDenoiser, build_network
from diffalign_robot.runs import build_policy
from diffalign_robot.source import EnvSource, episode_seeds
from diffalign_robot.vector import ChunkVectorEnv

SLOW = "toy_env:ToySlowPoint-v0"


def toy_expert():
    return lambda obs: np.clip(-4 * obs, -1, 1)


def toy_demonstrations(episodes=12, noise=0.5):
    spec = Gymnasium(id=SLOW)
    return join(list(collect(spec, toy_expert, seeds=list(range(episodes)), action_noise=noise, noise_seed=0)))


def small_policy(normalizers=None):
    torch.manual_seed(0)
    return build_policy(ChunkMLP(width=16, blocks=1), 2, 2, 2, 4, normalizers=normalizers)


def test_collected_actions_reproduce_the_observations():
    data = toy_demonstrations(3)
    assert int(data.lengths.sum()) == len(data.obs) == len(data.action)
    first = int(data.lengths[0])
    moved = data.obs[: first - 1] + 0.25 * data.action[: first - 1]  # actions are recorded as executed
    torch.testing.assert_close(moved, data.obs[1:first])
    assert data.action.abs().max() <= 1
    assert data.success.all()


def test_a_bias_is_added_to_every_action_and_recorded():
    spec = Gymnasium(id=SLOW)
    plain, biased = (next(iter(collect(spec, lambda: lambda obs: 0 * obs, seeds=[3], action_noise=0.0, noise_seed=0,
                                       action_bias=bias))) for bias in ((), (0.25, -0.5)))
    assert np.array_equal(plain[1], np.zeros_like(plain[1]))
    assert np.array_equal(biased[1], np.broadcast_to(np.array([0.25, -0.5], np.float32), biased[1].shape))
    np.testing.assert_allclose(biased[0][1] - biased[0][0], [0.0625, -0.125], atol=1e-6)
    with pytest.raises(ValueError, match=r"action_bias needs 2 numbers, one per action feature, or none, got \[0.1\]"):
        next(iter(collect(spec, toy_expert, seeds=[0], action_noise=0.0, noise_seed=0, action_bias=(0.1,))))


def test_windows_never_cross_an_episode_and_none_is_padded():
    lengths = torch.tensor([5, 2, 4])
    obs = torch.arange(11.0)[:, None]
    data = Demonstrations(obs, torch.stack([obs[:, 0], -obs[:, 0]], 1), lengths, torch.ones(3, dtype=torch.long))
    starts, chunks = data.windows(3)
    assert starts[:, 0].tolist() == [0, 1, 2, 7, 8]  # episode 2 is shorter than a chunk
    torch.testing.assert_close(chunks[..., 0], starts + torch.arange(3.0))
    torch.testing.assert_close(chunks[..., 1], -chunks[..., 0])
    with pytest.raises(ValueError, match=r"as long as a chunk of 6 \(longest: 5\)"):
        data.windows(6)


def test_demonstrations_survive_a_file_and_a_missing_one_names_the_command(tmp_path):
    data = toy_demonstrations(2)
    data.save(tmp_path, {"success_rate": 1.0})
    again = Demonstrations.load(tmp_path)
    for name in ("obs", "action", "lengths", "success"):
        torch.testing.assert_close(getattr(again, name), getattr(data, name), rtol=0, atol=0)
    assert json.loads((tmp_path / "demonstrations.json").read_text())["success_rate"] == 1.0
    with pytest.raises(ValueError, match=r"diffalign train configs/robot/pick_place_collect\.yaml"):
        Demonstrations.load(tmp_path / "nowhere")


def test_scripted_experts_solve_their_task_and_are_refused_elsewhere():
    spec = MetaWorld(task="pick-place-v3")
    clean = list(collect(spec, scripted_expert(spec), seeds=[0, 1], action_noise=0.0, noise_seed=0))
    assert all(success for _, _, success in clean)
    assert all(len(obs) == len(action) < 100 for obs, action, _ in clean)  # success ends the episode
    noisy = next(iter(collect(spec, scripted_expert(spec), seeds=[0], action_noise=0.5, noise_seed=0)))
    assert not np.array_equal(noisy[1][:5], clean[0][1][:5])
    with pytest.raises(ValueError, match="environment type 'gymnasium' has no scripted expert of its own; set expert"):
        scripted_expert(Gymnasium(id=POINT))


def test_normalizers_are_in_the_checkpoint_and_invert(tmp_path):
    data = toy_demonstrations()
    normalizers = Normalizer.fit(data.obs), Normalizer.fit(data.action, "limits")
    denoiser = small_policy(normalizers).denoiser
    actions = denoiser.action_normalizer.normalize(data.action)
    assert float(actions.min()) == pytest.approx(-1, abs=1e-5)
    assert float(actions.max()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(denoiser.action_normalizer.unnormalize(actions), data.action)
    blank = small_policy().denoiser
    blank.load_state_dict(denoiser.state_dict())
    torch.testing.assert_close(blank.observation_normalizer.scale, normalizers[0].scale)
    torch.testing.assert_close(blank.action_normalizer.shift, normalizers[1].shift)


def test_the_denoiser_reads_chunk_time_and_normalized_observation():
    observations = Normalizer(2)
    observations.shift.copy_(torch.tensor([3.0, -1.0]))
    observations.scale.copy_(torch.tensor([2.0, 0.5]))
    torch.manual_seed(0)
    net = ChunkDenoiser(build_network(ChunkMLP(width=16, blocks=2), (3, 4), 2), 3, observations, Normalizer(4))
    x, t, obs = torch.randn(5, 3, 4), torch.rand(5), torch.randn(5, 2)
    out = net(x, t, {"obs": obs})
    assert out.shape == (5, 3, 4)
    assert not torch.allclose(out, net(x, t / 2, {"obs": obs}))
    assert not torch.allclose(out, net(x, t, {"obs": obs + 1}))
    plain = ChunkDenoiser(build_network(ChunkMLP(width=16, blocks=2), (3, 4), 2), 3, Normalizer(2), Normalizer(4))
    plain.net.load_state_dict(net.net.state_dict())
    torch.testing.assert_close(plain(x, t, {"obs": (obs - observations.shift) / observations.scale}), out)


def test_a_rollout_is_time_major_and_marks_what_was_executed(generator):
    env = ChunkVectorEnv(Gymnasium(id=SLOW), 6)
    policy = replace(small_policy(), kernel=DDPM(min_std=0.3))
    rollout = EnvSource(env).collect(policy, generator=generator)
    h, b = rollout.reward.shape
    assert (h, b) == (8, 6)  # 16 steps in chunks of 2, unless all six succeed earlier
    obs = rollout.trajectory.cond["obs"].reshape(h, b, 2)
    after = rollout.next_cond["obs"].reshape(h, b, 2)
    torch.testing.assert_close(after[:-1], obs[1:])
    ended = (rollout.terminated | rollout.truncated).int()
    assert ended.sum(0).tolist() == [1] * b
    assert torch.equal(rollout.valid, ended.cumsum(0) - ended == 0)  # valid up to and including the end
    assert torch.equal(rollout.truncated.any(0), ~rollout.terminated.any(0))
    assert float(rollout.reward[~rollout.valid].abs().sum()) == 0
    action = rollout.trajectory.sample.reshape(h, b, 2, 2).clamp(-1, 1)
    moved = (obs + 0.25 * action[:, :, 0] + 0.25 * action[:, :, 1])[rollout.valid & ~rollout.terminated]
    torch.testing.assert_close(after[rollout.valid & ~rollout.terminated], moved, rtol=0, atol=1e-5)
    assert rollout.stats["env_steps"] <= 16 * b
    assert rollout.stats["success_rate"] == float(rollout.terminated.any(0).float().mean())
    env.close()


def test_actions_reach_the_environment_in_its_own_units(generator):
    halves = Normalizer(2)
    halves.scale.fill_(0.5)
    env = ChunkVectorEnv(Gymnasium(id=SLOW), 2)
    rollout = EnvSource(env).collect(small_policy((Normalizer(2), halves)), generator=generator)
    obs, after = (c["obs"].reshape(-1, 2, 2)[0] for c in (rollout.trajectory.cond, rollout.next_cond))
    action = 0.5 * rollout.trajectory.sample.reshape(-1, 2, 2, 2)[0]
    torch.testing.assert_close(after, obs + 0.25 * action.clamp(-1, 1).sum(1), rtol=0, atol=1e-5)
    env.close()


def test_a_collect_depends_on_the_generator_alone():
    env, policy = ChunkVectorEnv(Gymnasium(id=SLOW), 3), small_policy()
    source = EnvSource(env)

    def play(seed):
        return source.collect(policy, generator=torch.Generator().manual_seed(seed))

    first, other, again = play(1), play(2), play(1)
    torch.testing.assert_close(first.trajectory.x, again.trajectory.x, rtol=0, atol=0)
    torch.testing.assert_close(first.reward, again.reward, rtol=0, atol=0)
    assert not torch.equal(first.trajectory.cond["obs"][:3], other.trajectory.cond["obs"][:3])
    env.close()


def test_all_decisions_share_the_trained_window():
    env = ChunkVectorEnv(Gymnasium(id=SLOW), 2)
    policy = replace(small_policy(), kernel=DDPM(min_std=0.1), trained=TrainedSteps(size=2))
    windows = set()
    for seed in range(6):
        rollout = EnvSource(env).collect(policy, generator=torch.Generator().manual_seed(seed))
        scored = (rollout.trajectory.std > 0).float().flatten(1)
        assert torch.equal(scored, rollout.trajectory.trained.float().expand_as(scored))
        windows.add(tuple(rollout.trajectory.trained.tolist()))
    assert len(windows) > 1
    assert all(sum(window) == 2 for window in windows)
    env.close()


def test_reward_scale_scales_rewards_and_not_the_reported_return(generator):
    env, policy = ChunkVectorEnv(Gymnasium(id=SLOW), 8), small_policy()
    plain = EnvSource(env).collect(policy, generator=torch.Generator().manual_seed(3))
    scaled = EnvSource(env, 5.0).collect(policy, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(scaled.reward, 5 * plain.reward)
    assert scaled.stats["return"] == plain.stats["return"]
    env.close()


class Perfect(torch.nn.Module):
    """A denoiser whose x0 is the expert's chunk: the evaluation must report 100 %."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.sign = -1.0 if right else 1.0

    def __call__(self, x, t, cond):
        return self.sign * cond["obs"][:, None].expand_as(x)


def perfect_policy(right):
    policy = small_policy()
    denoiser = policy.denoiser
    oracle = Perfect(right)
    denoiser.forward = oracle.__call__
    denoiser.prediction = "x0"
    return policy


def test_evaluation_counts_successes_with_a_wilson_interval():
    env = ChunkVectorEnv(Gymnasium(id=SLOW), 4)
    best = evaluate(perfect_policy(True), env, seed=0, episodes=10, sampler="ode")
    assert best["success_rate"] == 1.0
    assert best["interval"] == pytest.approx([0.7225, 1.0], abs=1e-3)  # 10 of 10
    assert best["return_mean"] == 1.0
    assert best["episodes"] == 10
    assert best["env_steps"] <= 160
    worst = evaluate(perfect_policy(False), env, seed=0, episodes=10, sampler="ode")
    assert worst["success_rate"] == 0.0
    assert worst["env_steps"] == 160  # two of the last four environments only fill the wave
    with pytest.raises(ValueError, match="at least two episodes, got 1"):
        evaluate(small_policy(), env, seed=0, episodes=1, sampler="ode")
    env.close()


def test_evaluation_states_its_sampler_and_repeats():
    env, policy = ChunkVectorEnv(Gymnasium(id=SLOW), 4), replace(small_policy(), kernel=DDPM(min_std=0.4))
    first, again = (evaluate(policy, env, seed=3, episodes=6, sampler="stochastic") for _ in range(2))
    assert first == again
    assert first["sampler"] == "ddpm (4 steps, stochastic)"
    assert evaluation_policy(policy, "stochastic").kernel == DDPM()  # the exploration floor is for training
    assert evaluation_policy(policy, "ode").kernel == ODE()
    assert not evaluation_policy(policy, "ode").zero_noise
    assert evaluation_policy(policy, "zero_noise").zero_noise
    env.close()


def test_evaluation_seeds_are_never_training_seeds(generator):
    training = episode_seeds(2000, generator)
    assert max(training) < 2**31 <= min(seeds_for(0, 5))
    assert not set(seeds_for(0, 1000)) & set(seeds_for(1, 1000))
