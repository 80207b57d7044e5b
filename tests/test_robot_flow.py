"""Flow policies, learned noise and groups through the jobs: cloning, fine-tuning, loading, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from killing import train_until
from test_robot_jobs import QUICK, TOY, evaluation, lines, open_run, wandering_expert
from test_robot_networks import NETWORKS

from diffalign import config
from diffalign.algorithms import DPPO, FPO, FPOPlus, NoisePPO, ReinFlow
from diffalign.diffusion import CPS, ODE, FlowPath, FlowSDE, NoisyODE
from diffalign.rl.advantages import GAE, GroupNormalized
from diffalign.rl.surrogates import PPOClip
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.supervised import Pretraining, fit, fresh_state
from diffalign_robot.alignment import Exploration
from diffalign_robot.choices import ChunkMLP
from diffalign_robot.cloning import demonstration_batches
from diffalign_robot.demos import collect, join
from diffalign_robot.evaluate import evaluation_policy
from diffalign_robot.jobs import RobotAlign, RobotBC
from diffalign_robot.runs import build_policy, load_policy
from diffalign_robot.source import EnvSource
from diffalign_robot.vector import ChunkVectorEnv

LEARN = Optimization(learning_rate=1e-3, critic_learning_rate=3e-3, epochs=4, minibatches=2)
CLIP = PPOClip(low=0.1, high=0.1, unit="per_dim")
NOISY = Exploration(kernel=NoisyODE(min_std=0.1, max_std=0.3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Demonstrations and a cloned flow policy."""
    root = tmp_path_factory.mktemp("flow")
    join(list(collect(TOY, wandering_expert, seeds=list(range(30)), action_noise=0.6, noise_seed=0))
         ).save(root / "demos", {})
    cloning(root).train(open_run(root / "bc", cloning(root)))
    return root


def cloning(root, **changes):
    plan = Pretraining(steps=200, batch_size=64, learning_rate=3e-3, ema_decay=0.95)
    job = RobotBC(base=str(root / "demos"), environment=TOY, network=ChunkMLP(width=32, blocks=1), prediction="flow",
                  chunk=2, denoising_steps=4, num_envs=32, workers=1, evaluation=QUICK, pretraining=plan)
    return replace(job, **changes)


def alignment(root, algorithm, **changes):
    plain = {"iterations": 10, "num_envs": 32, "workers": 1, "save_every": 5, "critic_hidden": (32,),
             "evaluation": replace(QUICK, sampler="ode")}
    return RobotAlign(base=str(root / "bc"), environment=TOY, algorithm=algorithm, **{**plain, **changes})


def test_a_cloned_flow_samples_the_distribution_of_the_data():
    """Chunks are +-0.6 with a biased coin's toss for their sign: two modes of the right weights, no mean between."""
    draw = torch.Generator().manual_seed(0)
    obs = torch.rand(2000, 1, generator=draw)
    sign = 2 * (torch.rand(2000, generator=draw) < 0.25 + 0.5 * (obs[:, 0] > 0.5)).float() - 1
    chunks = (0.6 * sign[:, None, None] + 0.05 * torch.randn(2000, 2, 1, generator=draw)).clamp(-1, 1)
    torch.manual_seed(0)
    policy = build_policy(ChunkMLP(width=128), 2, 1, 1, 10, prediction="flow")
    plan = Pretraining(steps=500, batch_size=256, learning_rate=3e-3, ema_decay=0.99)
    state = fresh_state(plan, policy.denoiser, seed=0)
    for _ in fit(plan, policy, demonstration_batches(obs, chunks, 256), state):
        pass
    with state.ema_modules():
        for value, share in ((0.2, 0.25), (0.8, 0.75)):
            sample = policy.act({"obs": torch.full((1000, 1), value)}, generator=draw).action[..., 0]
            assert (sample[:, 0] > 0).float().mean().item() == pytest.approx(share, abs=0.07)
            assert ((sample.abs() - 0.6).abs() < 0.25).float().mean() > 0.9
            assert (sample[:, 0] * sample[:, 1] > 0).float().mean() > 0.95  # the actions of a chunk belong together


def test_a_flow_policy_loads_as_what_it_is(runs):
    policy = load_policy(runs / "bc")
    assert (policy.path, policy.kernel, policy.denoiser.prediction) == (FlowPath(), ODE(), "flow")
    job = config.load(RobotBC, runs / "bc" / "config.yaml")
    again = job.evaluate(Run(runs / "bc"), seed=0)
    assert again["success_rate"] == evaluation(Run(runs / "bc"), "after")["success_rate"]
    assert again["sampler"] == "ode (4 steps, stochastic)"


def test_evaluation_takes_the_exploration_off(runs):
    policy = load_policy(runs / "bc")
    for kernel, left in ((FlowSDE(min_std=0.2), FlowSDE()), (CPS(noise_level=0.5, min_std=0.2), CPS(noise_level=0.5)),
                         (NoisyODE(), ODE()), (ODE(), ODE())):
        assert evaluation_policy(replace(policy, kernel=kernel), "stochastic").kernel == left
        assert evaluation_policy(replace(policy, kernel=kernel), "ode").kernel == ODE()


TUNED = {
    "flow_sde": (DPPO(advantage=GAE(gamma=0.95), surrogate=CLIP, optimization=LEARN),
                 {"exploration": Exploration(kernel=FlowSDE(noise_level=0.5, min_std=0.1))}),
    "reinflow": (ReinFlow(advantage=GAE(gamma=0.95), surrogate=CLIP, optimization=LEARN, entropy=0.01),
                 {"exploration": NOISY, "noise": (16,)}),
    "fpo_plus": (FPOPlus(advantage=GAE(gamma=0.95), surrogate=CLIP, optimization=LEARN),
                 {"exploration": Exploration(kernel=ODE())}),
    "fpo": (FPO(advantage=GAE(gamma=0.95), surrogate=CLIP, optimization=LEARN),
            {"exploration": Exploration(kernel=ODE())}),
    "group": (DPPO(advantage=GroupNormalized(), surrogate=CLIP, optimization=LEARN),
              {"exploration": Exploration(kernel=CPS(noise_level=0.5, min_std=0.1)), "group": 8}),
}


@pytest.mark.parametrize(("algorithm", "changes"), TUNED.values(), ids=TUNED)
def test_fine_tuning_improves_a_cloned_flow(runs, tmp_path, algorithm, changes):
    job = alignment(runs, algorithm, **changes)
    run = open_run(tmp_path / "run", job)
    job.train(run)
    before, after = evaluation(run, "before")["success_rate"], evaluation(run, "after")["success_rate"]
    assert after >= min(before + 0.1, 0.97)
    assert all(record["ratio_drift"] < 1e-3 for record in lines(run, "train"))
    assert job.evaluate(run, seed=0)["success_rate"] == after
    assert type(load_policy(run.path).denoiser).__name__ == "ChunkDenoiser"  # the noise net stays behind


def test_steering_works_on_a_flow(runs, tmp_path):
    job = alignment(runs, NoisePPO(advantage=GAE(), optimization=LEARN), exploration=Exploration(kernel=ODE()),
                    steering=(16,), iterations=1, num_envs=8, evaluation=replace(QUICK, episodes=8))
    run = open_run(tmp_path / "steered", job)
    job.train(run)
    assert lines(run, "train")[0]["ratio_drift"] < 1e-3


def test_a_stopped_reinflow_resumes_to_the_same_weights(runs, tmp_path):
    algorithm, changes = TUNED["reinflow"]
    job = alignment(runs, algorithm, **changes, iterations=4, num_envs=8, save_every=2,
                    evaluation=replace(QUICK, episodes=4))
    whole = open_run(tmp_path / "whole", job)
    job.train(whole)

    train_until(tmp_path / "cut", job, 3)
    again = open_run(tmp_path / "cut", job, resume=True)
    job.train(again)
    for name, tensor in load_policy(whole.path).denoiser.state_dict().items():
        assert torch.equal(tensor, load_policy(again.path).denoiser.state_dict()[name])


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_checkpoints_of_every_network_load_back(runs, tmp_path, network):
    quick = Pretraining(steps=2, batch_size=8, ema_decay=0.5)
    job = cloning(runs, network=network, pretraining=quick, num_envs=4, evaluation=replace(QUICK, episodes=4))
    run = open_run(tmp_path / "bc", job)
    job.train(run)
    loaded = load_policy(run.path)
    assert loaded.denoiser.net.__class__.__name__ in ("MLPNet", "UNet", "Transformer")
    assert job.evaluate(run, seed=0)["return_mean"] == evaluation(run, "after")["return_mean"]


def test_a_one_step_x0_policy_is_a_gaussian_policy(runs, tmp_path, generator):
    """K = 1 and x0: from zero noise the action is the network's output, and a floor makes it N(output, floor^2)."""
    job = cloning(runs, prediction="x0", denoising_steps=1, pretraining=Pretraining(steps=2, time="grid"), num_envs=4,
                  evaluation=replace(QUICK, episodes=4))
    run = open_run(tmp_path / "gaussian", job)
    job.train(run)
    policy = load_policy(run.path)
    obs = {"obs": torch.randn(6, 2)}
    exact = policy.denoiser(torch.zeros(6, 2, 2), torch.ones(6), obs).clamp(-1, 1)
    zero = evaluation_policy(policy, "zero_noise").act(obs, generator=generator).action
    torch.testing.assert_close(zero, exact, rtol=1e-4, atol=1e-5)
    floored = replace(policy, kernel=replace(policy.kernel, min_std=0.3), zero_noise=True)
    trajectory = floored.act(obs, generator=generator).trajectory
    by_hand = torch.distributions.Normal(exact, 0.3).log_prob(trajectory.sample).flatten(1).sum(1)
    torch.testing.assert_close(trajectory.log_prob[:, 0], by_hand, rtol=1e-4, atol=1e-4)


def test_a_group_starts_from_the_same_seed_and_groups_differ(runs, generator):
    env = ChunkVectorEnv(TOY, 6)
    rollout = EnvSource(env, group=3).collect(load_policy(runs / "bc"), generator=generator)
    start = rollout.trajectory.cond["obs"][:6]
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(start[:3], start[:1].expand(3, -1))
    assert torch.equal(start[3:], start[3:4].expand(3, -1))
    assert not torch.equal(start[0], start[3])
    chunks = rollout.trajectory.sample[:6]
    assert not torch.equal(chunks[0], chunks[1])  # equal starts, own noise
    with pytest.raises(ValueError, match="6 environments do not make up groups of 4"):
        EnvSource(env, group=4)
    env.close()


def test_settings_that_do_not_fit_are_refused(runs):
    algorithm, changes = TUNED["reinflow"]
    with pytest.raises(ValueError, match="needs the noisy_ode kernel and no steering"):
        alignment(runs, algorithm, **{**changes, "exploration": Exploration(kernel=ODE())})
    with pytest.raises(ValueError, match="reinflow learns the noise of its steps: set noise"):
        alignment(runs, algorithm, **{**changes, "noise": None})
    with pytest.raises(ValueError, match="group must divide num_envs=32, got 5"):
        alignment(runs, algorithm, **changes, group=5)
