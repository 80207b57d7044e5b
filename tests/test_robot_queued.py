"""Decisions once a control step beside a queued chunk: the environment, its bookkeeping in the replay, the job."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_robot_families import FAST, off_policy, runs  # noqa: F401 - a fixture
from test_robot_jobs import TOY, evaluation, lines, open_run
from test_robot_policy import small_policy, toy_demonstrations

from diffalign.algorithms import DSRL, EXPO, ResidualRL
from diffalign.policy.operators import OnActions
from diffalign.rl.replay import transitions
from diffalign_robot.evaluate import evaluate, evaluation_policy
from diffalign_robot.queued import QueuedBase, QueuedEnv, queued_demonstrations
from diffalign_robot.replay import demonstration_rows
from diffalign_robot.source import EnvSource
from diffalign_robot.vector import ChunkVectorEnv

TA, DA, DO = 2, 2, 2


def chunk_policy():
    policy = evaluation_policy(small_policy(), "stochastic")
    assert policy.event == (TA, DA)
    return policy


def test_the_queue_is_the_policys_chunk_one_action_a_step():
    """Phases count through the chunk, the due action is that of the chunk asked at phase 0, and seeds repeat it."""
    policy, env = chunk_policy(), QueuedEnv(ChunkVectorEnv(TOY, 3), chunk_policy())
    seen = [env.reset([4, 5, 6])]
    for _ in range(5):
        seen.append(env.step(np.full((3, 1, DA), 0.1, np.float32)).obs)
    asked = torch.Generator().manual_seed(4)
    for h, obs in enumerate(seen):
        assert obs.shape == (3, env.obs_dim) == (3, DO + TA + DA)
        np.testing.assert_array_equal(obs[:, DO : DO + TA], np.eye(TA, dtype=np.float32)[[h % TA] * 3])
        if h % TA == 0:
            chunk = policy.act({"obs": torch.from_numpy(obs[:, :DO])}, generator=asked).action
        np.testing.assert_array_equal(obs[:, -DA:], chunk[:, h % TA].numpy())
    np.testing.assert_array_equal(env.reset([4, 5, 6]), seen[0])
    with pytest.raises(ValueError, match=r"takes one action at a time, \[B, 1, Da\], got \(3, 2, 2\)"):
        env.step(np.zeros((3, TA, DA), np.float32))


def test_playing_the_queue_is_playing_the_chunks():
    """The queued base reaches the same states as the same chunks executed in open loop, from the same seeds."""
    policy, seeds = chunk_policy(), [1, 2, 3, 4]
    env, inner = QueuedEnv(ChunkVectorEnv(TOY, 4), policy), ChunkVectorEnv(TOY, 4)
    unnormalize = policy.denoiser.action_normalizer.unnormalize
    obs, plain, asked = env.reset(seeds), inner.reset(seeds), torch.Generator().manual_seed(1)
    for _ in range(3):
        chunk = policy.act({"obs": torch.from_numpy(plain)}, generator=asked).action
        plain = inner.step(unnormalize(chunk).numpy()).obs
        for _ in range(TA):
            action = QueuedBase(policy).act({"obs": torch.from_numpy(obs)}, generator=torch.Generator()).action
            obs = env.step(unnormalize(action).numpy()).obs
        np.testing.assert_array_equal(obs[:, :DO], plain)


def test_the_replay_holds_the_queued_action_and_what_was_done_to_it(runs):  # noqa: F811
    """Executed = clip(queued + correction); a row's next base action is the one that the next row corrects."""
    job = off_policy(runs, ResidualRL(scale=0.5, learning=replace(FAST, actor_std=0.3)), per_step=True)
    policy = job._build()[1]
    with torch.no_grad():
        policy.actor.net[-1].bias.fill_(0.4)
    env = QueuedEnv(ChunkVectorEnv(TOY, 4), policy.base.chunks)
    rollout = EnvSource(env).collect(policy.with_mode("explore"), generator=torch.Generator().manual_seed(0))
    rows = transitions(rollout, lambda cond: OnActions().ask(policy.base, cond, generator=torch.Generator()),
                       gamma=0.9, steps=1)
    base = rows.cond["obs"][:, -DA:]
    torch.testing.assert_close(rows.signals["base"].reshape(-1, DA), base)
    correction = rows.chosen.reshape(-1, DA) - base
    assert float(correction.abs().max()) <= 0.5 + 1e-6
    assert float(correction.abs().mean()) > 0.05
    torch.testing.assert_close(rows.next_signals["base"].reshape(-1, DA), rows.next_cond["obs"][:, -DA:])
    torch.testing.assert_close(rows.next_cond["obs"][:-4][rows.discount[:-4] > 0][:4], rows.cond["obs"][4:8])


def test_demonstrations_are_queued_as_the_environment_would():
    data, policy = toy_demonstrations(4), chunk_policy()
    queued = queued_demonstrations(data, policy, torch.Generator().manual_seed(0))
    assert queued.obs.shape[1] == DO + TA + DA
    torch.testing.assert_close(queued.obs[:, :DO], data.obs)
    starts = torch.cat([data.lengths.new_zeros(1), data.lengths.cumsum(0)[:-1]])
    phase = queued.obs[:, DO : DO + TA].argmax(1)
    assert (phase[starts] == 0).all()
    first = torch.cat([torch.arange(n) % TA for n in data.lengths.tolist()])
    assert torch.equal(phase, first)
    zeroth = queued.obs[phase == 0]
    asked = policy.act({"obs": zeroth[:, :DO]}, generator=torch.Generator().manual_seed(0)).action
    torch.testing.assert_close(zeroth[:, -DA:], asked[:, 0])
    second = (phase == 1).nonzero().flatten()
    number = (phase == 0).cumsum(0)[second] - 1
    torch.testing.assert_close(queued.obs[second, -DA:], asked[number, 1])


def test_a_step_time_residual_improves_and_resumes_exactly(runs, tmp_path):  # noqa: F811
    plan = replace(FAST, actor_std=0.3, discount=0.95)
    job = off_policy(runs, ResidualRL(scale=0.5, learning=plan), per_step=True, iterations=8,
                     demonstrations=(str(runs / "demos"),))
    run = open_run(tmp_path / "whole", job)
    job.train(run)
    before, after = evaluation(run, "before"), evaluation(run, "after")
    assert after["success_rate"] > before["success_rate"] + 0.1
    assert after["sampler"] == "ddpm (5 steps, stochastic), queued, improved on actions"
    assert job.evaluate(run, seed=0)["success_rate"] == after["success_rate"]
    part = open_run(tmp_path / "part", job)
    replace(job, iterations=4).train(part)
    job.train(part)
    numbers = [[{k: v for k, v in line.items() if not k.startswith(("time/", "env_steps_per_s"))}
                for line in lines(r, "train")] for r in (run, part)]
    assert numbers[0] == numbers[1]
    rows = demonstration_rows(queued_demonstrations(toy_demonstrations(2), job._build()[1].base.chunks,
                                                    torch.Generator()), job._build()[1], discount=0.9,
                              reward_scale=1.0, generator=torch.Generator())
    assert rows.chosen.shape[1:] == (1, DA)


def test_an_untrained_residual_is_the_base_bitwise(runs):  # noqa: F811
    job = off_policy(runs, ResidualRL(learning=FAST), per_step=True)
    policy = job._build()[1]
    results = [evaluate(p, QueuedEnv(ChunkVectorEnv(TOY, 8), policy.base.chunks), seed=3, episodes=16,
                        sampler="stochastic") for p in (policy, policy.base)]
    assert results[0]["return_mean"] == results[1]["return_mean"]
    assert results[0]["env_steps"] == results[1]["env_steps"]


@pytest.mark.parametrize(("algorithm", "changes", "message"), [
    (DSRL(learning=FAST), {}, "which dsrl does not; use residual"),
    (EXPO(samples=2, learning=FAST), {}, "which expo does not; use residual"),
    (ResidualRL(learning=FAST), {"sampler": "ode"}, "set evaluation.sampler to ode, got stochastic")])
def test_refusals(runs, algorithm, changes, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        off_policy(runs, algorithm, per_step=True, **changes)
