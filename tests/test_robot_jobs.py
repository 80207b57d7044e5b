"""Cloning and alignment from end to end on a toy environment: learning, resuming, refusing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import train_until

from diffalign import config
from diffalign.algorithms import AWM, DPPO, NoisePPO
from diffalign.diffusion import ODE
from diffalign.rl.advantages import GAE
from diffalign.rl.surrogates import PPOClip
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.supervised import Pretraining
from diffalign_robot.alignment import Exploration
from diffalign_robot.choices import ChunkMLP, Gymnasium, MetaWorld
from diffalign_robot.demos import Demonstrations, collect, join
from diffalign_robot.evaluation import Evaluation
from diffalign_robot.jobs import JOBS, RobotAlign, RobotBC, RobotCollect
from diffalign_robot.runs import load_policy
from diffalign_robot.source import chunk_denoiser

TOY = Gymnasium(id="toy_env:ToySlowPoint-v0")
QUICK = Evaluation(episodes=32, every=100, videos=0)


def wandering_expert():
    """Steers past the goal with half of the needed strength: some episodes run out of time."""
    return lambda obs: -0.6 * obs


def open_run(path, job, *, resume=False):
    return Run.create(path, config.dump(job), resume=resume)


def lines(run, phase):
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == phase]


def evaluation(run, name):
    return json.loads((run.path / "evaluations" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A demonstration folder and a cloned policy."""
    root = tmp_path_factory.mktemp("robot")
    episodes = list(collect(TOY, wandering_expert, seeds=list(range(30)), action_noise=0.6, noise_seed=0))
    join(episodes).save(root / "demos", {})
    job = RobotBC(base=str(root / "demos"), environment=TOY, network=ChunkMLP(width=32, blocks=1), chunk=2,
                  denoising_steps=5, num_envs=32, workers=1, evaluation=QUICK,
                  pretraining=Pretraining(steps=300, batch_size=64, learning_rate=3e-3, time="grid", ema_decay=0.95))
    job.train(open_run(root / "bc", job))
    return root


def alignment(runs, **changes):
    plan = Optimization(learning_rate=1e-3, critic_learning_rate=3e-3, epochs=4, minibatches=2)
    algorithm = DPPO(advantage=GAE(gamma=0.95), surrogate=PPOClip(low=0.1, high=0.1, unit="per_dim"), optimization=plan)
    job = RobotAlign(base=str(runs / "bc"), environment=TOY, algorithm=algorithm, iterations=12, num_envs=32, workers=1,
                     critic_hidden=(32,), evaluation=QUICK, save_every=4)
    return replace(job, **changes)


def test_cloning_lowers_the_loss_and_is_evaluated(runs):
    run = Run(runs / "bc")
    losses = [record["loss"] for record in lines(run, "train")]
    assert losses[-1] < 0.8 * losses[0]
    result = evaluation(run, "after")
    assert 0.2 < result["success_rate"] < 0.9  # there is something to gain and something to lose
    assert result["interval"][0] < result["success_rate"] < result["interval"][1]
    assert lines(run, "eval")[-1]["success_rate"] == result["success_rate"]


def test_a_cloned_policy_holds_observations_far_from_its_demonstrations(runs):
    """Beyond 10 standard deviations nothing changes any more, so that one feature cannot blow up predictions."""
    network = chunk_denoiser(load_policy(runs / "bc"))
    scale, shift = network.observation_normalizer.scale, network.observation_normalizer.shift
    near, edge, far = (shift + steps * scale for steps in (9.0, 10.0, 400.0))
    x, t = torch.zeros(1, *load_policy(runs / "bc").event), torch.full((1,), 0.5)
    one, two, three = (network(x, t, {"obs": obs[None]}) for obs in (near, edge, far))
    torch.testing.assert_close(two, three)
    assert not torch.allclose(one, two)


def test_a_loaded_policy_is_the_evaluated_one(runs):
    run = Run(runs / "bc")
    job = config.load(RobotBC, run.path / "config.yaml")
    again = job.evaluate(run, seed=0, episodes=None, sampler=None)
    assert again == {k: v for k, v in evaluation(run, "after").items() if k != "step"}
    ode = job.evaluate(run, seed=0, episodes=8, sampler="zero_noise")
    assert (ode["episodes"], ode["sampler"]) == (8, "ode (5 steps, zero noise)")


def test_dppo_improves_the_cloned_policy(runs, tmp_path):
    job = alignment(runs)
    run = open_run(tmp_path / "align", job)
    job.train(run)
    before, after = evaluation(run, "before"), evaluation(run, "after")
    assert before["success_rate"] == pytest.approx(evaluation(Run(runs / "bc"), "after")["success_rate"], abs=0.01)
    assert after["success_rate"] >= before["success_rate"] + 0.2
    assert after["interval"][0] > before["success_rate"]
    history = lines(run, "train")
    assert [record["step"] for record in history] == list(range(1, 13))
    assert all(record["ratio_drift"] < 1e-3 for record in history)
    assert history[-1]["env_steps_total"] == sum(record["env_steps"] for record in history)
    assert job.evaluate(run, seed=0, episodes=None, sampler=None)["success_rate"] == after["success_rate"]


def test_a_stopped_alignment_resumes_to_the_same_numbers(runs, tmp_path):
    job = alignment(runs, iterations=6, save_every=2, evaluation=replace(QUICK, episodes=4, every=3))
    whole = open_run(tmp_path / "whole", job)
    job.train(whole)

    train_until(tmp_path / "cut", job, 5)  # one iteration after the checkpoint of step 4
    again = open_run(tmp_path / "cut", job, resume=True)
    job.train(again)
    for phase in ("train", "eval"):
        kept = [{k: v for k, v in record.items() if not k.startswith("time/") and k != "env_steps_per_s"}
                for record in lines(whole, phase)]
        resumed = [{k: v for k, v in record.items() if not k.startswith("time/") and k != "env_steps_per_s"}
                   for record in lines(again, phase)]
        assert kept == resumed
    assert evaluation(whole, "after") == evaluation(again, "after")
    for name, tensor in load_policy(whole.path).denoiser.state_dict().items():
        assert torch.equal(tensor, load_policy(again.path).denoiser.state_dict()[name])


def test_steering_a_frozen_policy_improves_it_and_loads_again(runs, tmp_path):
    plan = Optimization(learning_rate=3e-3, critic_learning_rate=3e-3, epochs=4, minibatches=2, ema_decay=0.5)
    ode = replace(QUICK, sampler="ode")
    job = alignment(runs, algorithm=NoisePPO(advantage=GAE(gamma=0.95), optimization=plan, reference_kl=1e-3),
                    exploration=Exploration(kernel=ODE()), steering=(32,), iterations=15, evaluation=ode)
    run = open_run(tmp_path / "steered", job)
    job.train(run)
    assert evaluation(run, "after")["success_rate"] >= evaluation(run, "before")["success_rate"] + 0.1
    assert lines(run, "train")[-1]["kl/reference"] > 0
    loaded, base = load_policy(run.path), load_policy(runs / "bc")
    for name, tensor in base.denoiser.state_dict().items():
        assert torch.equal(tensor, loaded.denoiser.denoiser.state_dict()[name])
    again = job.evaluate(run, seed=0, episodes=None, sampler=None)
    assert again["success_rate"] == evaluation(run, "after")["success_rate"]
    with pytest.raises(ValueError, match="needs a learned initial noise"):
        replace(job, steering=None)


def test_workers_do_not_change_an_alignment(runs, tmp_path):
    results = []
    for workers in (1, 2):
        job = alignment(runs, iterations=1, num_envs=8, workers=workers, evaluation=replace(QUICK, episodes=8))
        run = open_run(tmp_path / str(workers), job)
        job.train(run)
        results.append([lines(run, "train")[0][name] for name in ("loss", "reward/mean", "env_steps")])
    assert results[0] == results[1]


def test_matching_and_behaviour_cloning_terms_run(runs, tmp_path):
    plan = Optimization(learning_rate=1e-4, minibatches=2)
    awm = AWM(advantage=GAE(), optimization=plan)
    cloned = DPPO(behavior_cloning=0.1, reference_kl=0.01, optimization=plan)
    small = replace(QUICK, episodes=4)
    for name, algorithm in (("awm", awm), ("cloned", cloned)):
        # A demonstration folder is found through the base run's own config.
        job = alignment(runs, algorithm=algorithm, iterations=1, num_envs=8, evaluation=small)
        run = open_run(tmp_path / name, job)
        job.train(run)
        assert lines(run, "train")[0]["loss"] == lines(run, "train")[0]["loss"]


def test_missing_runs_name_the_command_that_makes_them(tmp_path):
    bc = RobotBC(base=str(tmp_path / "none"), environment=TOY)
    with pytest.raises(ValueError, match=r"make them with `diffalign train configs/robot/pick_place_collect.yaml"):
        bc.train(open_run(tmp_path / "bc", bc))
    align = RobotAlign(base=str(tmp_path / "none"), environment=TOY, algorithm=DPPO())
    with pytest.raises(ValueError, match=r"make it with `diffalign train configs/robot/pick_place_bc.yaml"):
        align.train(open_run(tmp_path / "align", align))


def test_a_policy_for_another_environment_is_refused(runs, tmp_path):
    job = alignment(runs, environment=Gymnasium(id="Pendulum-v1"))
    with pytest.raises(ValueError, match="trained for 2 observation and 2 action features"):
        job.train(open_run(tmp_path / "other", job))


def test_impossible_settings_are_refused(runs):
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        alignment(runs, iterations=0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        RobotBC(base="x", environment=TOY, chunk=0)
    with pytest.raises(ValueError, match="action_noise must be at least 0, got -1"):
        RobotCollect(environment=MetaWorld(), action_noise=-1)
    with pytest.raises(ValueError, match="need episodes >= 2"):
        Evaluation(episodes=1)
    with pytest.raises(ValueError, match="time_features must be even"):
        ChunkMLP(time_features=5)


def test_collecting_writes_demonstrations_once(tmp_path):
    job = RobotCollect(environment=MetaWorld(task="push-v3", horizon=12), episodes=2, action_noise=0.1, seed=1)
    run = open_run(tmp_path / "collect", job)
    job.train(run)
    data, stamp = Demonstrations.load(run.path), (run.path / "demonstrations.safetensors").stat().st_mtime_ns
    assert data.lengths.tolist() == [12, 12]
    record = json.loads((run.path / "demonstrations.json").read_text())
    assert record["environment"]["task"] == "push-v3"
    assert record["packages"]["mujoco"]
    job.train(open_run(run.path, job, resume=True))
    assert (run.path / "demonstrations.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[1].glob("configs/robot/*.yaml")), ids=lambda f: f.stem)
def test_configs_load_and_say_how_to_run_them(file):
    kind = {cls.type: cls for cls in JOBS}[config.read(file)["type"]]
    job = config.load(kind, file)
    assert config.build(kind, config.read(file), "again") == job
    text = file.read_text()
    assert f"diffalign train configs/robot/{file.name}" in text.split("type:")[0]


def test_a_video_shows_the_start_and_every_second_step(tmp_path):
    import imageio_ffmpeg

    from diffalign_robot.evaluate import record
    from diffalign_robot.runs import build_policy

    policy = build_policy(ChunkMLP(width=8, blocks=1), 4, 39, 4, 2)
    out = record(policy, MetaWorld(horizon=4), tmp_path / "film.mp4", seed=0, count=1, sampler="ode")
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(out))
    assert frames == 3
    assert seconds == pytest.approx(3 / 40, abs=0.02)


def test_a_frame_shows_the_scene_move():
    from diffalign_robot.envs import make

    env = make(MetaWorld())
    env.reset(0)
    start = env.frame()
    for _ in range(20):
        env.advance(np.array([1, 1, -1, 1], np.float32))
    later = env.frame()
    env.close()
    assert start.shape == later.shape == (240, 240, 3)
    assert start.std() > 10  # not a blank picture
    assert (start != later).any(-1).mean() > 0.01
