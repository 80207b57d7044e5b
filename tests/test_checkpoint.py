"""Checkpoints: bit-exact resume of every algorithm, atomic replacement, clear refusals, SIGKILL at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_on_policy import demonstrations, parameters, setup
from test_train import same, snapshot
from torch import nn
from toys import MLPDenoiser, PointMass, PromptBandit, toy_policy

from diffalign.algorithms import AWM, DDPO, DPPO, FlowGRPO
from diffalign.diffusion import DDPM, ODE, FlowSDE, TrainedSteps
from diffalign.rl.advantages import PromptRunning
from diffalign.train import checkpoint
from diffalign.train.on_policy import Optimization, optimize
from diffalign.train.state import TrainState, frozen_copy
from diffalign.train.supervised import Pretraining, fit

TESTS = Path(__file__).parent
PLAN = Optimization(epochs=2, minibatches=2, ema_decay=0.9)


def ddpo(seed):
    policy, state = setup(FlowSDE(), seed=seed, ema_decay=0.9)
    advantage = PromptRunning(buffer=24, min_count=12)
    return state, optimize(DDPO(optimization=PLAN, advantage=advantage).compose(), policy, PromptBandit(), state)


def flow_grpo(seed):
    policy, state = setup(FlowSDE(), seed=seed, ema_decay=0.9, trained=TrainedSteps(size=2, ode_elsewhere=True))
    torch.manual_seed(99)  # the reference does not depend on the seed of the state
    reference = frozen_copy(MLPDenoiser())
    return state, optimize(FlowGRPO(optimization=PLAN, reference_kl=0.1).compose(), policy, PromptBandit(), state,
                           reference=reference)


def dppo(seed):
    policy, state = setup(DDPM(min_std=0.1), "eps", seed=seed, critic=True)
    plan = replace(PLAN, ema_decay=None, critic_warmup=1)
    return state, optimize(DPPO(optimization=plan, behavior_cloning=0.1).compose(), policy, PointMass(episodes=8),
                           state, demonstrations=demonstrations)


def awm(seed):
    policy, state = setup(ODE(), seed=seed, ema_decay=0.9)
    return state, optimize(AWM(optimization=PLAN, ema_velocity=0.5).compose(), policy, PromptBandit(), state)


def pretraining(seed):
    policy, state = setup(FlowSDE(), seed=seed, ema_decay=0.9)
    return state, fit(Pretraining(steps=20, warmup_steps=4), policy, demonstrations, state)


@pytest.mark.parametrize("start", [ddpo, flow_grpo, dppo, awm, pretraining])
def test_resume_is_bit_exact(start, tmp_path):
    """Six iterations, against three, a save, everything rebuilt from another seed, a load, and three more."""
    state, loop = start(0)
    uninterrupted = [iteration.metrics for iteration in islice(loop, 6)]
    again, loop = start(0)
    first = [iteration.metrics for iteration in islice(loop, 3)]
    saved = checkpoint.save(tmp_path, again)
    fresh, loop = start(7)
    assert not torch.equal(parameters(fresh), parameters(again))
    checkpoint.load(saved, fresh)
    assert same(snapshot(fresh), snapshot(again))
    second = [iteration.metrics for iteration in islice(loop, 3)]
    assert first + second == uninterrupted
    assert same(snapshot(fresh), snapshot(state))
    assert fresh.step == state.step == 6
    assert torch.equal(fresh.generator.get_state(), state.generator.get_state())
    assert fresh.statistics.keys() == state.statistics.keys()
    for name, tensor in state.statistics.items():
        assert torch.equal(fresh.statistics[name].nan_to_num(-1), tensor.nan_to_num(-1))
    if fresh.ema is not None:
        assert fresh.ema.updates == state.ema.updates > 0


def small(width=4, *, ema_decay=None, roles=("policy", "critic")):
    modules = {role: nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width)) for role in roles}
    return TrainState.create(modules, dict.fromkeys(roles, 1e-3), ema_decay=ema_decay, seed=0)


def test_files_of_a_checkpoint(tmp_path):
    """Tensors in safetensors, numbers in JSON, no pickle; buffers are saved too."""
    state = small(ema_decay=0.9)
    state.step = 12
    path = checkpoint.save(tmp_path / "deep" / "er", state)
    assert path.name == "step_00000012"
    assert sorted(p.name for p in path.iterdir()) == ["modules.safetensors", "state.json", "training.safetensors"]
    assert json.loads((path / "state.json").read_text())["step"] == 12
    assert "policy.1.running_var" in load_file(path / "modules.safetensors")


def test_the_newest_are_kept(tmp_path):
    state = small()
    for state.step in (2, 10, 9, 11):
        checkpoint.save(tmp_path, state, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000009", "step_00000010", "step_00000011"]
    assert checkpoint.latest(tmp_path).name == "step_00000011"
    checkpoint.save(tmp_path, state)  # the same step again; two are kept by default
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000011"]
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("dies_in", ["_write_text", "_pack_optimizer", "os.replace"])
def test_a_save_that_dies_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, dies_in):
    state = small()
    state.step = 1
    checkpoint.save(tmp_path, state)
    good = snapshot(state)
    with torch.no_grad():
        state.modules["policy"][0].weight.add_(1)
    state.step = 2

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if dies_in == "os.replace":
            patched.setattr(os, "replace", die)
        else:
            patched.setattr(checkpoint, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, state)
    newest = checkpoint.latest(tmp_path)
    assert newest.name == "step_00000001"
    fresh = small()
    checkpoint.load(newest, fresh)
    assert same(snapshot(fresh), good)
    checkpoint.save(tmp_path, state)  # the leftovers do not disturb the next one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize(("saved", "wanted", "message"), [
    ({}, {"width": 5}, r"policy.0.weight has shape \(4, 2\) in the checkpoint and \(5, 2\) in the module"),
    ({}, {"roles": ("policy", "actor")}, "actor.0.bias is not in the checkpoint; build the module from"),
    ({"ema_decay": 0.9}, {}, "disagree on whether an EMA is kept; set the same ema_decay"),
    ({}, {"ema_decay": 0.9}, "disagree on whether an EMA is kept"),
    ({}, {"roles": ("policy",)}, r"the optimizer groups are \['policy', 'critic'\] in the .* and \['policy'\]")])
def test_another_structure_is_refused(tmp_path, saved, wanted, message):
    path = checkpoint.save(tmp_path, small(**saved))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path, small(**wanted))


def test_a_missing_layer_is_named(tmp_path):
    path = checkpoint.save(tmp_path, small(roles=("policy",)))
    with pytest.raises(ValueError, match=r"policy.1.bias is not in the module"):
        checkpoint.load_modules(path, {"policy": nn.Sequential(nn.Linear(2, 4))})


def test_load_modules_by_role_and_average(tmp_path):
    state = small(ema_decay=0.9)
    with torch.no_grad():
        state.modules["policy"][0].weight.add_(1.0)
        state.modules["policy"][1].running_mean.add_(3.0)
    path = checkpoint.save(tmp_path, state)
    for prefer, expected in ((False, state.modules["policy"][0].weight), (True, state.ema.weights["0.weight"])):
        module = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        checkpoint.load_modules(path, {"policy": module}, prefer_ema=prefer)
        assert torch.equal(module[0].weight, expected)
        assert (module[1].running_mean == 3).all()
    plain = checkpoint.save(tmp_path / "plain", small())
    module = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    checkpoint.load_modules(plain, {"policy": module}, prefer_ema=True)  # none was kept: the live weights


def test_a_new_learning_rate_does_not_sneak_in(tmp_path):
    """The optimizer resumes with the checkpoint's own numbers."""
    state = small()
    state.optimizer.param_groups[1]["lr"] = 0.125
    path = checkpoint.save(tmp_path, state)
    fresh = small()
    checkpoint.load(path, fresh)
    assert [g["lr"] for g in fresh.optimizer.param_groups] == [1e-3, 0.125]


def test_counters_travel(tmp_path):
    state = small()
    assert state.count("environment_steps", 100.0) == 100
    assert state.count("environment_steps", 28.0) == 128
    fresh = small()
    checkpoint.load(checkpoint.save(tmp_path, state), fresh)
    assert fresh.counters == {"environment_steps": 128}


def test_shapes_are_read_without_loading(tmp_path):
    shapes = checkpoint.shapes(checkpoint.save(tmp_path, small(roles=("policy",))))
    assert shapes["policy.0.weight"] == (4, 2)
    assert shapes["policy.1.running_mean"] == (4,)
    assert all(name.startswith("policy.") for name in shapes)


ITERATIONS = 30


def killable(folder):
    """Train, log and save every iteration until ITERATIONS; goes on by itself."""
    from diffalign.train.run import Run

    torch.manual_seed(0)
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=3)
    state = TrainState.create({"policy": policy.denoiser}, {"policy": 1e-3}, ema_decay=0.9, seed=0)
    run = Run.create(folder, "a: 1\n", resume=True)
    run.restore(state)
    loop = optimize(DDPO(optimization=PLAN).compose(), policy, PromptBandit(images=8), state)
    while state.step < ITERATIONS:
        iteration = next(loop)
        run.log(iteration.step, iteration.metrics)
        run.save(state)


def in_child(folder):
    """The id of a forked process that trains (everything is imported, so that it starts at once)."""
    pid = os.fork()
    if pid == 0:
        killable(folder)
        os._exit(0)
    return pid


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_and_resume(root):
    """Run as a script: root/quiet is never disturbed, root/shot is killed five times; prints the exit signals."""
    TrainState.create({"policy": MLPDenoiser()}, {"policy": 1e-3}, seed=0)  # imports all that an optimizer needs
    quiet, shot, signals = root / "quiet", root / "shot", []
    os.waitpid(in_child(quiet), 0)
    draw = random.Random(4)
    for until in (0, 2, 9, 15, 22):
        pid = in_child(shot)
        while lines(shot) < until:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        signals.append(os.waitpid(pid, 0)[1])
    signals.append(os.waitpid(in_child(shot), 0)[1])
    print(json.dumps(signals))


def test_sigkill_at_any_moment_resumes_to_the_same_numbers(tmp_path):
    """A run that saves every iteration is killed at random moments; its numbers equal those of a quiet run."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    code = (f"import torch, pathlib; torch.set_num_threads(1); import test_checkpoint; "
            f"test_checkpoint.kill_and_resume(pathlib.Path({str(tmp_path)!r}))")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [signal.SIGKILL] * 5 + [0], done.stderr
    quiet, shot = tmp_path / "quiet", tmp_path / "shot"
    assert (shot / "metrics.jsonl").read_text() == (quiet / "metrics.jsonl").read_text()
    for name in ("modules.safetensors", "training.safetensors"):
        one, two = (load_file(checkpoint.latest(folder / "checkpoints") / name) for folder in (quiet, shot))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key].nan_to_num(), two[key].nan_to_num()) for key in one)
    assert lines(shot) == ITERATIONS
