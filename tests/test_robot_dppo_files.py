"""DPPO checkpoints: built here key by key, sampled by its published arithmetic, read, trained and written back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from diffalign import config
from diffalign.algorithms import DPPO, ResidualRL
from diffalign.cli.main import main
from diffalign.diffusion import DDIM, ODE, Schedule
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign_robot.choices import Gymnasium
from diffalign_robot.evaluation import Evaluation
from diffalign_robot.importing import RobotImport
from diffalign_robot.jobs import RobotAlign, RobotOffPolicy
from diffalign_robot.native import dppo
from diffalign_robot.runs import load_policy

OBS, ACT, TIME, WIDTH = 2, 2, 16, 24
LOW, HIGH = np.array([-2.0, -1.0]), np.array([3.0, 1.5])
NEAR, FAR = np.array([-0.5, -1.0]), np.array([0.5, 2.0])


def weights(prefix, *, horizon, history, residual, norm, encoder, seed):
    """A DiffusionMLP's state dict by DPPO's names, 3 hidden layers."""
    draw = torch.Generator().manual_seed(seed)
    found = {}

    def linear(name, before, after):
        found[f"{prefix}.{name}.weight"] = torch.randn(after, before, generator=draw) / before**0.5
        found[f"{prefix}.{name}.bias"] = 0.1 * torch.randn(after, generator=draw)

    def layer_norm(name):
        found[f"{prefix}.{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=draw)
        found[f"{prefix}.{name}.bias"] = 0.1 * torch.randn(WIDTH, generator=draw)

    linear("time_embedding.1", TIME, 2 * TIME)
    linear("time_embedding.3", 2 * TIME, TIME)
    seen = history * OBS
    if encoder:
        linear("cond_mlp.moduleList.0.linear_1", seen, 12)
        linear("cond_mlp.moduleList.1.linear_1", 12, 6)
        seen = 6
    first, last = TIME + horizon * ACT + seen, horizon * ACT
    if residual:
        linear("mlp_mean.layers.0", first, WIDTH)
        linear("mlp_mean.layers.1.l1", WIDTH, WIDTH)
        linear("mlp_mean.layers.1.l2", WIDTH, WIDTH)
        linear("mlp_mean.layers.2", WIDTH, last)
        if norm:
            layer_norm("mlp_mean.layers.1.norm1")
            layer_norm("mlp_mean.layers.1.norm2")
    else:
        for i, (before, after) in enumerate([(first, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, last)]):
            linear(f"mlp_mean.moduleList.{i}.linear_1", before, after)
            if norm and i < 3:
                layer_norm(f"mlp_mean.moduleList.{i}.norm_1")
    return found


def predict(state, prefix, x, t, obs):
    """DiffusionMLP by hand from its state dict: ReLU networks."""
    def linear(name, value):
        return F.linear(value, state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"])

    def normed(name, value, eps):
        if f"{prefix}.{name}.weight" not in state:
            return value
        return F.layer_norm(value, (WIDTH,), state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"], eps)

    angles = t * torch.exp(-torch.arange(TIME // 2) * np.log(10000) / (TIME // 2 - 1)).float()
    time = torch.cat([angles.sin(), angles.cos()])
    time = linear("time_embedding.3", F.mish(linear("time_embedding.1", time))).expand(len(x), -1)
    if f"{prefix}.cond_mlp.moduleList.0.linear_1.weight" in state:
        obs = linear("cond_mlp.moduleList.1.linear_1", F.relu(linear("cond_mlp.moduleList.0.linear_1", obs)))
    hidden = torch.cat([x.flatten(1), time, obs], 1)
    if f"{prefix}.mlp_mean.layers.0.weight" in state:
        hidden = linear("mlp_mean.layers.0", hidden)
        inner = linear("mlp_mean.layers.1.l1", F.relu(normed("mlp_mean.layers.1.norm1", hidden, 1e-6)))
        inner = linear("mlp_mean.layers.1.l2", F.relu(normed("mlp_mean.layers.1.norm2", inner, 1e-6)))
        return linear("mlp_mean.layers.2", hidden + inner).reshape(x.shape)
    for i in range(3):
        hidden = linear(f"mlp_mean.moduleList.{i}.linear_1", hidden)
        hidden = F.relu(normed(f"mlp_mean.moduleList.{i}.norm_1", hidden, 1e-5))
    return linear("mlp_mean.moduleList.3.linear_1", hidden).reshape(x.shape)


def folder(path, *, tuned=None, steps=20, ddim=None, horizon=4, act_steps=4, history=1, residual=True, norm=False,
           encoder=False):
    """A run folder of DPPO: state_N.pt, config.yaml, normalization.npz. tuned: ft_denoising_steps."""
    path.mkdir()
    shape = {"horizon": horizon, "history": history, "residual": residual, "norm": norm, "encoder": encoder}
    if tuned is None:
        state = weights("network", seed=0, **shape)
        stored = {"epoch": 5, "model": weights("network", seed=3, **shape), "ema": state}
    else:
        state = {key: value for prefix, seed in (("network", 0), ("actor", 0), ("actor_ft", 1))
                 for key, value in weights(prefix, seed=seed, **shape).items()}
        state["critic.Q1.weight"] = torch.ones(3)
        stored = {"itr": 5, "model": state}
    torch.save({"epoch": 0, "ema": {}}, path / "state_5.pt")  # an older one, by number and not by name
    torch.save(stored, path / "state_100.pt")
    np.savez(path / "normalization.npz", obs_min=LOW, obs_max=HIGH, action_min=NEAR, action_max=FAR)
    net = {"_target_": "model.diffusion.mlp_diffusion.DiffusionMLP", "time_dim": TIME, "mlp_dims": [WIDTH] * 3,
           "activation_type": "ReLU", "residual_style": residual, "use_layernorm": norm,
           "horizon_steps": "${horizon_steps}", "cond_dim": "${eval:'${obs_dim} * ${cond_steps}'}"}
    if encoder:
        net["cond_mlp_dims"] = [12, 6]
    model = {"network" if tuned is None else "actor": net, "denoised_clip_value": 1.0, "randn_clip_value": 3}
    if ddim:
        model |= {"use_ddim": True, "ddim_steps": ddim}
    said = {"obs_dim": OBS, "action_dim": ACT, "denoising_steps": steps, "cond_steps": history, "model": model,
            "horizon_steps": horizon, "act_steps": act_steps, "ft_denoising_steps": tuned}
    (path / "config.yaml").write_text(yaml.safe_dump(said))
    return state


def theirs(state, obs, noise, draws, *, tuned=None, steps=20, ddim=None, act_steps=4):
    """DPPO's forward on raw observations, from its tables: numbers of steps and networks as its two samplers count."""
    bar = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = np.cumprod(1 - np.clip(1 - bar[1:] / bar[:-1], 0, 0.999))
    low, high = torch.from_numpy(LOW).float(), torch.from_numpy(HIGH).float()
    seen = 2 * ((obs.unflatten(1, (-1, OBS)) - low) / (high - low + 1e-6) - 0.5)
    table = list(range(steps)) if ddim is None else list(range(0, ddim * (steps // ddim), steps // ddim))
    x = noise
    for k, t in enumerate(reversed(table)):
        late = tuned is not None and len(table) - k <= tuned
        prefix = "network" if tuned is None else "actor_ft" if late else "actor"
        eps = predict(state, prefix, x, torch.tensor(float(t)), seen.flatten(1))
        now, index = abar[t], table.index(t)
        nxt = abar[table[index - 1]] if index else 1.0
        x0 = ((x - (1 - now) ** 0.5 * eps) / now**0.5).clamp(-1, 1)
        if ddim is None:
            beta = 1 - now / nxt
            mean = beta * nxt**0.5 / (1 - now) * x0 + (1 - nxt) * (1 - beta) ** 0.5 / (1 - now) * x
            std = max(1e-3, (beta * (1 - nxt) / (1 - now)) ** 0.5) if t else 0.0
            x = mean + std * draws[:, k]
        else:
            x = nxt**0.5 * x0 + (1 - nxt) ** 0.5 * (x - now**0.5 * x0) / (1 - now) ** 0.5
    near, far = torch.from_numpy(NEAR).float(), torch.from_numpy(FAR).float()
    return (x[:, :act_steps] + 1) / 2 * (far - near) + near


@pytest.mark.parametrize("shape", [
    {}, {"residual": False, "norm": True}, {"norm": True, "encoder": True, "history": 2}, {"tuned": 10},
    {"tuned": 20, "act_steps": 2}, {"ddim": 5, "steps": 100}, {"ddim": 5, "steps": 100, "tuned": 3}],
    ids=["residual", "plain", "encoder", "tuned", "all_tuned", "ddim", "ddim_tuned"])
def test_actions_equal_dppos(tmp_path, shape):
    state = folder(tmp_path / "run", **shape)
    policy = dppo.read(tmp_path / "run")
    assert policy.denoiser.history == shape.get("history", 1)
    obs, noise = torch.randn(64, OBS * shape.get("history", 1)), torch.randn(64, *policy.event)
    draws = torch.randn(64, policy.schedule.steps, *policy.event)
    decision = policy.act({"obs": obs}, generator=torch.Generator(), noise=noise, step_noise=draws)
    ours = policy.denoiser.action_normalizer.unnormalize(decision.action)
    options = {key: value for key, value in shape.items() if key in ("tuned", "steps", "ddim", "act_steps")}
    torch.testing.assert_close(ours, theirs(state, obs, noise, draws, **options), rtol=0, atol=2e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize("tuned", [None, 10])
def test_weights_return_to_their_names(tmp_path, tuned):
    before = folder(tmp_path / "run", tuned=tuned)
    policy = dppo.read(tmp_path / "run")
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            parameter += 0.1
    dppo.write(policy, tmp_path / "run", tmp_path / "out")
    stored = torch.load(tmp_path / "out" / "state_100.pt", weights_only=True)
    for state in (stored["model"], stored["ema"]) if tuned is None else (stored["model"],):
        assert state.keys() == before.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, before[name] + (0.0 if "critic" in name else 0.1))
    assert dppo.difference(policy, tmp_path / "out", torch.randn(20, OBS)) == 0
    assert dppo.difference(policy, tmp_path / "run", torch.randn(20, OBS)) > 1e-2


def test_only_its_own_sampler_is_written(tmp_path):
    folder(tmp_path / "run")
    policy = dppo.read(tmp_path / "run")
    for wrong in (policy.with_sampler(ODE()), policy.with_sampler(DDIM()), replace(policy, zero_noise=True),
                  policy.with_sampler(policy.kernel, Schedule(steps=5, leading=20))):
        with pytest.raises(ValueError, match="export with --sampler stochastic"):
            dppo.write(wrong, tmp_path / "run", tmp_path / "out")
    assert dppo.read(tmp_path / "run", 5).schedule.steps == 5


@pytest.mark.parametrize("name", ["state_N.pt", "config.yaml", "normalization.npz"])
def test_a_folder_needs_all_three_files(tmp_path, name):
    folder(tmp_path / "run")
    for file in (tmp_path / "run").glob("state_*" if name.startswith("state") else name):
        file.unlink()
    with pytest.raises(ValueError, match=f"has no {name}; a DPPO checkpoint is needed with"):
        dppo.read(tmp_path / "run")


@pytest.mark.parametrize(("changed", "said"), [
    ({"_target_": "model.diffusion.unet.Unet1D"}, "the network Unet1D; only DiffusionMLP"),
    ({"activation_type": "Sine"}, "unknown activation 'Sine'"), ({"out_activation_type": "Tanh"}, "one at the outlet"),
    ({"mlp_dims": [WIDTH, WIDTH]}, "does not fit its config"), ({"use_layernorm": True}, "does not fit its config")])
def test_other_networks_are_refused(tmp_path, changed, said):
    folder(tmp_path / "run", residual=False)
    file = tmp_path / "run" / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["model"]["network"] |= changed
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=said):
        dppo.read(tmp_path / "run")


def test_a_checkpoint_is_imported_improved_and_exported(tmp_path, capsys):
    state = folder(tmp_path / "theirs", tuned=10)
    slow = Gymnasium(id="toy_env:ToySlowPoint-v0")
    evaluation = Evaluation(episodes=8, videos=0, every=5)
    imported = RobotImport(source=f"dppo:{tmp_path / 'theirs'}", environment=slow, evaluation=evaluation, num_envs=4,
                           workers=1)
    base = Run.create(tmp_path / "base", config.dump(imported), resume=False)
    imported.train(base)
    shutil.rmtree(tmp_path / "theirs")
    job = RobotAlign(base=str(base.path), environment=slow, iterations=1, num_envs=16, workers=1, evaluation=evaluation,
                     algorithm=DPPO(optimization=Optimization(epochs=1, minibatches=2, learning_rate=1e-3)))
    run = Run.create(tmp_path / "run", config.dump(job), resume=False)
    job.train(run)
    out = tmp_path / "written"
    assert main(["export", str(run.path), "--to", f"dppo:{out}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_difference"] == 0
    after = torch.load(out / "state_100.pt", weights_only=True)["model"]
    assert (after["actor_ft.mlp_mean.layers.0.weight"] - state["actor_ft.mlp_mean.layers.0.weight"]).abs().max() > 1e-4
    assert torch.equal(after["critic.Q1.weight"], state["critic.Q1.weight"])
    policy, obs = load_policy(run.path), torch.randn(9, OBS)
    noise, draws = torch.randn(9, 4, ACT), torch.randn(9, 20, 4, ACT)
    decision = policy.act({"obs": obs}, generator=torch.Generator(), noise=noise, step_noise=draws)
    wanted = theirs(after, obs, noise, draws, tuned=10)
    ours = policy.with_sampler(dppo.read(out).kernel).denoiser.action_normalizer.unnormalize(decision.action)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)
    assert main(["export", str(run.path), "--to", f"lerobot:{out}"]) == 2
    assert "was imported from dppo, it can be written back as dppo:PATH only" in capsys.readouterr().err


def test_what_an_imported_policy_cannot_do_is_refused(tmp_path):
    folder(tmp_path / "theirs", act_steps=2)
    slow = Gymnasium(id="toy_env:ToySlowPoint-v0")
    job = RobotImport(source=f"dppo:{tmp_path / 'theirs'}", environment=slow, num_envs=2, workers=1,
                      evaluation=Evaluation(episodes=2, videos=0))
    run = Run.create(tmp_path / "base", config.dump(job), resume=False)
    job.train(run)
    clones = RobotAlign(base=str(run.path), environment=slow, num_envs=2, workers=1,
                        algorithm=DPPO(behavior_cloning=0.1))
    with pytest.raises(ValueError, match=r"needs demonstrations, and .* names none"):
        clones.train(Run.create(tmp_path / "clones", config.dump(clones), resume=False))
    queued = RobotOffPolicy(base=str(run.path), environment=slow, algorithm=ResidualRL())
    with pytest.raises(ValueError, match="executes a part of them"):
        queued.train(Run.create(tmp_path / "queued", config.dump(queued), resume=False))
