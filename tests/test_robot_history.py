"""Observation history: stacking against brute force, in demonstrations, environments, acting and training."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_env import PointRobot

from diffalign import config
from diffalign.algorithms import DPPO
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.supervised import Pretraining
from diffalign_robot.choices import ChunkMLP, Gymnasium
from diffalign_robot.demos import Demonstrations, collect, join
from diffalign_robot.envs import make
from diffalign_robot.evaluate import policy_actor
from diffalign_robot.evaluation import Evaluation, open_env
from diffalign_robot.history import HistoryEpisode, stacked
from diffalign_robot.jobs import RobotAlign, RobotBC, RobotCompose
from diffalign_robot.runs import build_policy, load_policy
from diffalign_robot.source import chunk_denoiser
from diffalign_robot.vector import ChunkVectorEnv

TOY = Gymnasium(id="toy_env:ToySlowPoint-v0")


def expected(episode, step, count):
    """The history at a step of an episode given as a list, by the definition."""
    return np.concatenate([episode[max(step - age, 0)] for age in reversed(range(count))])


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_demonstrations_are_stacked_within_their_episode(count):
    rng, lengths = np.random.default_rng(0), (4, 1, 5)
    episodes = [rng.normal(size=(length, 2)).astype(np.float32) for length in lengths]
    data = join([(obs, np.zeros((len(obs), 1), np.float32), True) for obs in episodes])
    found = data.with_history(count)
    brute = [expected(obs, step, count) for obs in episodes for step in range(len(obs))]
    np.testing.assert_array_equal(found.obs, brute)
    assert torch.equal(found.action, data.action)
    if count == 3:  # a window starts from the stacked observation of its first step
        obs, _ = found.windows(4)
        np.testing.assert_array_equal(obs, [brute[0], brute[5], brute[6]])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_vector_environment_shows_every_control_step_and_forgets_at_a_reset(workers):
    rng, seeds = np.random.default_rng(1), [3, 4]
    env = ChunkVectorEnv(TOY, 2, workers=workers, history=3)
    assert env.obs_dim == 6
    for wave in (seeds, [8, 9]):  # nothing of the first wave is left in the second
        seen = env.reset(wave)
        singles = [PointRobot(gain=0.25) for _ in wave]
        logs = [[single.reset(seed=seed)[0]] for single, seed in zip(singles, wave)]
        np.testing.assert_array_equal(seen, [expected(log, 0, 3) for log in logs])
        for length in (1, 4, 2):
            chunk = rng.uniform(-0.1, 0.1, (2, length, 2)).astype(np.float32)
            step = env.step(chunk)
            for i, single in enumerate(singles):
                logs[i] += [single.step(action)[0] for action in chunk[i]]
            np.testing.assert_array_equal(step.obs, [expected(log, len(log) - 1, 3) for log in logs])
    env.close()


def test_an_ended_episode_keeps_its_last_history():
    env = ChunkVectorEnv(replace(TOY, horizon=2), 1, history=2)
    env.reset([0])
    last = env.step(np.full((1, 4, 2), 0.1, np.float32))
    assert last.executed.tolist() == [2]
    later = env.step(np.ones((1, 4, 2), np.float32))
    np.testing.assert_array_equal(later.obs, last.obs)
    assert not np.array_equal(last.obs[0, :2], last.obs[0, 2:])
    env.close()


def test_no_history_is_refused():
    with pytest.raises(ValueError, match="history must be at least 1, got 0"):
        HistoryEpisode(make(TOY), 0)
    with pytest.raises(ValueError, match="history must be at least 1, got 0"):
        RobotBC(base="x", environment=TOY, history=0)


def test_a_policy_acts_on_what_its_environment_would_show(monkeypatch):
    policy, seen, rng = build_policy(ChunkMLP(width=8, blocks=1), 2, 6, 2, 2, history=3), [], np.random.default_rng(0)
    act = type(policy).act

    def spy(self, cond, **others):
        seen.append(cond["obs"][0].numpy())
        return act(self, cond, **others)

    monkeypatch.setattr(type(policy), "act", spy)
    build = policy_actor(policy, seed=0)
    episodes = [[rng.normal(size=2).astype(np.float32) for _ in range(5)] for _ in range(2)]
    for episode in episodes:
        controller = build()
        for obs in episode:
            controller(obs)
    np.testing.assert_array_equal(seen, [expected(episode, step, 3) for episode in episodes for step in (0, 2, 4)])
    assert len(stacked(episodes[0][:1], 4)) == 8


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    root = tmp_path_factory.mktemp("history")
    episodes = list(collect(TOY, lambda: lambda obs: -0.6 * obs, seeds=list(range(12)), action_noise=0.3, noise_seed=0))
    join(episodes).save(root / "demos", {})
    job = RobotBC(base=str(root / "demos"), environment=TOY, network=ChunkMLP(width=16, blocks=1), chunk=2, history=3,
                  denoising_steps=3, num_envs=8, workers=1, evaluation=Evaluation(episodes=8, every=100, videos=0),
                  pretraining=Pretraining(steps=60, batch_size=32, learning_rate=3e-3, time="grid"))
    job.train(Run.create(root / "bc", config.dump(job), resume=False))
    return root


def test_the_checkpoint_knows_its_history(cloned):
    policy = load_policy(cloned / "bc")
    network = chunk_denoiser(policy)
    assert (network.history, len(network.observation_normalizer.shift)) == (3, 6)
    mean = Demonstrations.load(cloned / "demos").obs.mean(0)
    torch.testing.assert_close(network.observation_normalizer.shift, mean.repeat(3))
    env = open_env(TOY, policy, 2, 1)
    assert env.obs_dim == 6
    env.close()
    job = config.load(RobotBC, cloned / "bc" / "config.yaml")
    again = job.evaluate(Run(cloned / "bc"), seed=0)
    assert again["success_rate"] == json.loads((cloned / "bc/evaluations/after.json").read_text())["success_rate"]


def test_a_policy_with_history_is_fine_tuned_beside_its_demonstrations(cloned, tmp_path):
    algorithm = DPPO(behavior_cloning=0.1, optimization=Optimization(learning_rate=1e-3, minibatches=2))
    job = RobotAlign(base=str(cloned / "bc"), environment=TOY, algorithm=algorithm, iterations=2, num_envs=8, workers=1,
                     critic_hidden=(16,), evaluation=Evaluation(episodes=4, every=100, videos=0))
    run = Run.create(tmp_path / "align", config.dump(job), resume=False)
    job.train(run)
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["ratio_drift"] < 1e-3 for record in records if record["phase"] == "train")
    assert chunk_denoiser(load_policy(run.path)).history == 3


def test_policies_that_see_different_histories_are_not_mixed(cloned, tmp_path):
    job = replace(config.load(RobotBC, cloned / "bc" / "config.yaml"), history=1, normalizers_of=str(cloned / "bc"))
    with pytest.raises(ValueError, match="has a history of 3 observations, this policy one of 1; set history to 3"):
        job.train(Run.create(tmp_path / "mixed", config.dump(job), resume=False))
    plain = replace(job, normalizers_of=None)
    plain.train(Run.create(tmp_path / "plain", config.dump(plain), resume=False))
    mixed = RobotCompose(parents=(str(cloned / "bc"), str(tmp_path / "plain")), data=str(cloned / "demos"),
                         environment=TOY)
    with pytest.raises(ValueError, match=r"plain has a history of 1 observations and .*bc one of 3"):
        mixed.train(Run.create(tmp_path / "compose", config.dump(mixed), resume=False))
