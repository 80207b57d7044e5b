"""Off-policy improvement, preference learning and composition as jobs, from end to end on a toy environment."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_robot_jobs import QUICK, TOY, evaluation, lines, open_run, wandering_expert

from diffalign.algorithms import DPO, DSRL, EXPO, Rerank, ResidualRL, SePPO
from diffalign.train.off_policy_pieces import Learning
from diffalign.train.run import Run
from diffalign.train.search import successive_halving
from diffalign.train.supervised import Pretraining
from diffalign_robot.choices import ChunkMLP
from diffalign_robot.demos import Demonstrations, collect, join
from diffalign_robot.jobs import RobotBC, RobotCollect, RobotCompose, RobotOffPolicy, RobotPreference
from diffalign_robot.replay import demonstration_rows
from diffalign_robot.runs import load_policy

FAST = Learning(batch_size=64, warmup_decisions=100, critic_only_updates=100, critic_learning_rate=3e-3, discount=0.9,
                actor_learning_rate=3e-3, critic_hidden=(32, 32), actor_hidden=(32,), heads=2, target_rate=0.02,
                temperature=0.02, offline_updates=150, value_range=(0.0, 1.0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Demonstrations, two cloned policies of them, and episodes of the first policy."""
    root = tmp_path_factory.mktemp("families")
    episodes = list(collect(TOY, wandering_expert, seeds=list(range(30)), action_noise=0.6, noise_seed=0))
    join(episodes).save(root / "demos", {})
    for seed in (0, 1):
        job = RobotBC(base=str(root / "demos"), environment=TOY, network=ChunkMLP(width=32, blocks=1), chunk=2,
                      denoising_steps=5, num_envs=32, workers=1, evaluation=QUICK, seed=seed,
                      pretraining=Pretraining(steps=300, batch_size=64, learning_rate=3e-3, time="grid",
                                              ema_decay=0.95))
        job.train(open_run(root / f"bc{seed}", job))
    job = RobotCollect(environment=TOY, policy=str(root / "bc0"), episodes=60, action_noise=0.0)
    job.train(open_run(root / "rollouts", job))
    return root


def off_policy(runs, algorithm, **changes):
    job = RobotOffPolicy(base=str(runs / "bc0"), environment=TOY, algorithm=algorithm, iterations=10, num_envs=16,
                         evaluation=QUICK, save_every=4)
    return replace(job, **changes)


def test_a_policys_episodes_are_recorded_with_its_failures(runs):
    data = Demonstrations.load(runs / "rollouts")
    rate = float(data.success.float().mean())
    assert abs(rate - evaluation(Run(runs / "bc0"), "after")["success_rate"]) < 0.3
    assert 0 < rate < 1
    assert data.successful().lengths.tolist() == data.lengths[data.success.bool()].tolist()
    assert int(data.successful().lengths.sum()) == len(data.successful().obs)
    with pytest.raises(ValueError, match="none of the 2 recorded episodes"):
        Demonstrations(data.obs[:2], data.action[:2], torch.tensor([1, 1]), torch.tensor([0, 0])).successful()


def test_demonstration_rows_end_where_episodes_end(runs):
    data = Demonstrations.load(runs / "demos")
    policy = off_policy(runs, ResidualRL(learning=FAST))._build()[1]
    rows = demonstration_rows(data, policy, discount=0.9, reward_scale=2.0, generator=torch.Generator())
    chunk = 2
    lengths, success = data.lengths.tolist(), data.success.tolist()
    assert len(rows.reward) == sum(length - chunk + 1 - (not won) for length, won in zip(lengths, success, strict=True))
    assert int((rows.reward > 0).sum()) == sum(success)
    assert set(rows.reward.tolist()) == {0.0, 2.0}
    assert torch.equal(rows.discount == 0, rows.reward > 0)
    inside = rows.discount > 0
    following = torch.nonzero(inside[:-1] & inside[1:]).flatten()
    same = (rows.next_cond["obs"][following] - rows.cond["obs"][following]).norm(dim=1)
    assert float(same.max()) < 2.0  # never from one episode's end to the next one's start
    assert rows.signals["base"].shape[1:] == (1, 2, 2)


def test_a_residual_improves_and_resumes_exactly(runs, tmp_path):
    job = off_policy(runs, ResidualRL(scale=0.5, learning=replace(FAST, actor_std=0.3)), iterations=12,
                     demonstrations=(str(runs / "demos"),))
    run = open_run(tmp_path / "whole", job)
    job.train(run)
    before, after = evaluation(run, "before"), evaluation(run, "after")
    assert after["success_rate"] > before["success_rate"] + 0.1
    assert "improved on actions" in after["sampler"]
    base = load_policy(runs / "bc0").denoiser.state_dict()
    trained = job.trained_policy(run).base.denoiser.state_dict()
    assert all(torch.equal(base[name], trained[name]) for name in base)

    with pytest.raises(ValueError, match="take the base run"):
        load_policy(run.path)

    part = open_run(tmp_path / "part", job)
    limited = replace(job, iterations=8)
    limited.train(part)
    job.train(part)
    numbers = [[{k: v for k, v in line.items() if not k.startswith(("time/", "env_steps_per_s"))}
                for line in lines(r, "train")] for r in (run, part)]
    assert numbers[0] == numbers[1]


def test_offline_reranking_takes_no_simulator_step(runs, tmp_path):
    job = off_policy(runs, Rerank(samples=6, learning=replace(FAST, backup="expectile")), online=False, iterations=4,
                     demonstrations=(str(runs / "rollouts"), str(runs / "demos")))
    run = open_run(tmp_path / "rerank", job)
    job.train(run)
    assert all(line["env_steps_total"] == 0 for line in lines(run, "train"))
    assert evaluation(run, "after")["success_rate"] > evaluation(run, "before")["success_rate"] + 0.1


@pytest.mark.parametrize("algorithm", [DSRL(learning=FAST), DSRL(variant="na", learning=FAST),
                                       EXPO(samples=2, learning=FAST)], ids=["dsrl-sac", "dsrl-na", "expo"])
def test_every_operator_runs_as_a_job(runs, tmp_path, algorithm):
    job = off_policy(runs, algorithm, iterations=3)
    run = open_run(tmp_path / "run", job)
    job.train(run)
    result = job.evaluate(run, seed=5, episodes=32)
    assert 0 <= result["success_rate"] <= 1
    assert lines(run, "train")[-1]["replay/size"] > 100


def test_impossible_jobs_are_refused(runs):
    with pytest.raises(ValueError, match="use variant: na"):
        off_policy(runs, DSRL(), demonstrations=("x",))
    with pytest.raises(ValueError, match="there are none"):
        off_policy(runs, Rerank(), online=False)
    with pytest.raises(ValueError, match="needs losers"):
        preference(runs, algorithm=DPO())
    with pytest.raises(ValueError, match="at least two parents"):
        RobotCompose(parents=("a",), data="b", environment=TOY)
    unfinished = open_run(runs / "unfinished", off_policy(runs, ResidualRL(learning=FAST)))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_policy(unfinished.path)


def preference(runs, **changes):
    fitting = Pretraining(steps=150, batch_size=64, learning_rate=1e-3, warmup_steps=1, ema_decay=0.95, time="grid")
    job = RobotPreference(base=str(runs / "bc0"), demonstrations=(str(runs / "demos"),), environment=TOY,
                          algorithm=SePPO(beta=5.0, snapshot_every=50, fitting=fitting), num_envs=32,
                          evaluation=replace(QUICK, every=1000))
    return replace(job, **changes)


def test_seppo_learns_from_successful_chunks(runs, tmp_path):
    job = preference(runs)
    run = open_run(tmp_path / "seppo", job)
    job.train(run)
    before, after = evaluation(run, "before"), evaluation(run, "after")
    assert after["success_rate"] >= before["success_rate"] - 0.1
    trained, base = load_policy(run.path).denoiser, load_policy(runs / "bc0").denoiser
    assert any(not torch.equal(p, q) for p, q in zip(trained.parameters(), base.parameters(), strict=True))


def test_a_composition_is_searched_and_evaluated_beside_its_parents(runs, tmp_path):
    job = RobotCompose(parents=(str(runs / "bc0"), str(runs / "bc1")), data=str(runs / "demos"), environment=TOY,
                       grid=2, episodes=16, evaluation=QUICK, num_envs=32)
    run = open_run(tmp_path / "compose", job)
    job.train(run)
    found = json.loads((run.path / "composition.json").read_text())
    assert sum(found["weights"]) == pytest.approx(1)
    assert [row["episodes"] for row in found["search"]] == [16, 16, 16, 16, 32, 32]
    assert found["disagreement"] > 0
    for name in ("parent_0", "parent_1", "after"):
        assert 0 <= evaluation(run, name)["success_rate"] <= 1
    assert evaluation(run, "parent_0")["success_rate"] == pytest.approx(
        evaluation(Run(runs / "bc0"), "after")["success_rate"], abs=0.25)


def test_policies_of_other_data_compose_with_shared_normalizers(runs, tmp_path):
    episodes = list(collect(TOY, wandering_expert, seeds=list(range(100, 112)), action_noise=0.3, noise_seed=1))
    join([(obs, 0.5 * action, success) for obs, action, success in episodes]).save(tmp_path / "demos", {})
    job = RobotBC(base=str(tmp_path / "demos"), environment=TOY, network=ChunkMLP(width=16, blocks=1), chunk=2,
                  denoising_steps=5, num_envs=32, workers=1, evaluation=QUICK,
                  pretraining=Pretraining(steps=5, batch_size=16, time="grid"))
    job.train(open_run(tmp_path / "own", job))
    shared = replace(job, normalizers_of=str(runs / "bc0"))
    shared.train(open_run(tmp_path / "shared", shared))

    def composition(other):
        return RobotCompose(parents=(str(runs / "bc0"), str(other)), data=str(runs / "demos"), environment=TOY)

    with pytest.raises(ValueError, match="clone the second with normalizers_of"):
        composition(tmp_path / "own")._parents()
    assert len(composition(tmp_path / "shared")._parents()) == 2


def test_the_better_half_plays_on_twice_as_long():
    played = []

    def play(candidate, episodes):
        played.append((candidate, episodes))
        return candidate

    assert successive_halving([3, 1, 4, 2, 0], play, episodes=10)[0] == 4
    assert played == [(3, 10), (1, 10), (4, 10), (2, 10), (0, 10), (4, 20), (3, 20), (2, 20), (4, 40), (3, 40)]
    with pytest.raises(ValueError, match="at least one candidate"):
        successive_halving([], play, episodes=1)
