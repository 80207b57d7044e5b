"""Observation history: stacking against brute force, in demonstrations, environments, acting and training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_controller import List, SteppedClock
from toy_env import PointRobot

from diffalign import config
from diffalign.algorithms import DPPO
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.supervised import Pretraining
from diffalign_controller.chunks import RecedingHorizon
from diffalign_controller.deploy import main as deploy
from diffalign_controller.history import History
from diffalign_controller.inference import InLine
from diffalign_controller.limits import package_limits
from diffalign_controller.log import read
from diffalign_controller.loop import Controller, Exit, Settings
from diffalign_controller.policy import Policy
from diffalign_controller.rehearsal import rehearse as rehearse_loop
from diffalign_controller.robot import Observation
from diffalign_controller.safety import SafetyFilter
from diffalign_robot.choices import ChunkMLP, Gymnasium
from diffalign_robot.demos import Demonstrations, collect, join
from diffalign_robot.envs import make
from diffalign_robot.evaluate import policy_actor
from diffalign_robot.evaluation import Evaluation, open_env
from diffalign_robot.export import Packing, export_run
from diffalign_robot.history import HistoryEpisode, stacked
from diffalign_robot.jobs import RobotAlign, RobotBC, RobotCompose
from diffalign_robot.parity import real_observations
from diffalign_robot.rehearsal import rehearse
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
    obs = Demonstrations.load(cloned / "demos").obs
    torch.testing.assert_close(network.observation_normalizer.shift, obs.mean(0).repeat(3))
    torch.testing.assert_close(network.observation_normalizer.scale, obs.std(0, correction=0).repeat(3))
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


# --- on a robot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_robot_that_observes_once_a_period_remembers_what_an_episode_shows(count):
    episode = list(np.random.default_rng(0).normal(size=(9, 2)))
    history = History(count)
    for wave in range(2):
        history.clear()
        for step, obs in enumerate(episode):
            history.add(7.3 * wave + step, obs)
            np.testing.assert_array_equal(history.stacked(), np.float32(expected(episode, step, count)))
    with pytest.raises(ValueError, match="a history must hold at least 1 observation, got 0"):
        History(0)
    history.clear()
    with pytest.raises(ValueError, match="nothing was observed yet"):
        history.stacked()


def test_observations_at_other_times_are_taken_by_the_nearest():
    fast = History(3)
    for number in range(14):  # four a period: 13, 9 and 5 are one period apart
        fast.add(number / 4, np.array([number]))
    assert fast.stacked().tolist() == [5, 9, 13]
    shaken = History(3)
    for time, value in ((0.0, 0), (1.2, 1), (1.9, 2), (4.1, 4), (4.1, 4.5)):  # 3 was lost, 4 was sent again
        shaken.add(time, np.array([value]))
    assert shaken.stacked().tolist() == [2, 4.5, 4.5]  # at 2.1, 3.1 and 4.1


@pytest.fixture(scope="module")
def exported(cloned):
    """A package without noise, and its report."""
    job = config.load(RobotBC, cloned / "bc" / "config.yaml")
    return cloned / "package", export_run(Run(cloned / "bc"), job, cloned / "package", Packing(samples=100, calls=5),
                                          sampler="zero_noise")


def test_a_policy_with_history_is_exported_with_all_that_it_sees(cloned, exported):
    folder, report = exported
    assert report["parity"]["recorded"]["max_abs_difference"] <= 1e-4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["history"], manifest["inputs"][0]["shape"]) == (3, [1, 6])
    policy = Policy(folder)
    assert (policy.history, policy.obs_dim) == (3, 6)
    job = config.load(RobotBC, cloned / "bc" / "config.yaml")
    played = rehearse(Run(cloned / "bc"), job, folder, seed=0, episodes=8, sampler="zero_noise")
    assert played["same_outcome"] == 8
    assert played["max_abs_difference"] <= 1e-4
    assert rehearse_loop(folder, rate_hz=50, seconds=0.2, in_line=True)["decisions"] > 2


def test_parity_is_measured_on_recorded_observations_with_those_before_them(cloned):
    data = Demonstrations.load(cloned / "demos")
    found = real_observations(cloned / "demos", 1000, 3, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == sorted(data.with_history(3).obs.tolist())


class EpisodeRobot:
    """An environment whose episode is one period after every command; the connection is lost at some of them."""

    def __init__(self, clock, lost=()):
        self.clock, self.lost, self.times, self.seen = clock, lost, 0, []
        self.episode = make(TOY)
        self.episode.reset(5)

    def observe(self):
        self.times += 1
        if self.times in self.lost:
            self.episode.advance(np.full(2, 0.5, np.float32))  # somebody moves it
            raise ConnectionError("cable")
        self.seen.append(self.episode.observe())
        return Observation(self.seen[-1], self.clock.now_s(), np.zeros(2))

    def command(self, action):
        self.episode.advance(action.astype(np.float32))

    def emergency_stop_pressed(self):
        return False


def on_robot(policy, decide, *, lost=()):
    clock = SteppedClock()
    robot = EpisodeRobot(clock, lost)
    safety = SafetyFilter(package_limits(policy.low, policy.high), 1 / 50)
    plan = Settings(rate_hz=50, history=policy.history, ramp_s=0, rest="zero")
    loop = Controller(robot, InLine(decide), RecedingHorizon(policy.chunk), safety, List(), clock, plan)
    assert loop.run(0.2) == Exit.DONE
    return robot


def test_the_loop_plays_the_episode_that_the_evaluation_plays(exported):
    policy = Policy(exported[0])
    robot = on_robot(policy, policy.decide)
    env, shown = HistoryEpisode(make(TOY), 3), []
    env.reset(5)
    while len(shown) < 10:
        for action in policy.decide(env.observe()):
            shown.append(env.observe()[-2:])
            env.advance(action)
    np.testing.assert_allclose(robot.seen[1:11], shown, atol=1e-5)  # the loop looks once before it starts
    assert np.ptp(shown, axis=0).max() > 0.1  # it does move


def test_what_was_seen_before_a_lost_connection_is_forgotten(exported):
    policy, asked = Policy(exported[0]), []

    def decide(obs):
        asked.append(obs.reshape(3, 2))
        return policy.decide(obs)

    on_robot(policy, decide, lost=(6,))
    assert not np.array_equal(asked[1][0], asked[1][2])
    after = [seen for seen in asked if np.array_equal(seen[0], seen[2])]
    assert len(after) == 2  # at the start, and when it is back


def test_deploy_gives_the_twin_s_policy_its_history(exported, tmp_path, capsys):
    words = [str(exported[0]), "--robot", "twin", "--rate", "50", "--log", str(tmp_path / "log"), "--max-age", "2"]
    assert deploy([*words, "--seconds", "0.5", "--max-inference", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["meaning"] == "done"
    log = list(read(tmp_path / "log"))
    assert log[0]["settings"]["history"] == 3
    assert {len(record["obs"]) for record in log if "tick" in record} == {2}  # one observation, as it was seen
    assert any(record.get("state") == "running" or record.get("state") == "ramp-in" for record in log)
    damaged = tmp_path / "damaged"
    shutil.copytree(exported[0], damaged)
    manifest = (damaged / "manifest.json").read_text()
    (damaged / "manifest.json").write_text(manifest.replace('"history": 3', '"history": 4'))
    assert deploy([str(damaged), *words[1:]]) == 2
    assert "says that 6 features are 4 observations" in capsys.readouterr().err
    (damaged / "manifest.json").write_text(manifest.replace('"history": 3', '"history": 2'))
    assert deploy([str(damaged), *words[1:]]) == 2
    assert "reads observations of shape (3,) and commands (2,), the robot has (2,)" in capsys.readouterr().err
