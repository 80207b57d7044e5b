"""One optimizer step, the state it changes, pre-training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toys import MLPDenoiser, toy_policy

from diffalign.diffusion import DDPM, FlowSDE, VPPath
from diffalign.train import update
from diffalign.train.state import EMA, TrainState, frozen_copy
from diffalign.train.supervised import Pretraining, denoising_loss, draw_times, fit, learning_rate_factor


class Scalar(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([float(value), -1.0]))


def snapshot(state):
    """Everything that an update may change, copied."""
    live = {f"{role}.{n}": p for role, m in state.modules.items() for n, p in m.state_dict().items()}
    live |= {f"ema.{n}": w for n, w in (state.ema.weights if state.ema else {}).items()}
    for index, entry in state.optimizer.state_dict()["state"].items():
        live |= {f"optimizer.{index}.{n}": v for n, v in entry.items()}
    return {name: tensor.detach().clone() for name, tensor in live.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ema_follows_its_formula():
    """decay_n = min(0.9, (1 + n) / (10 + n)): 0.1, 2/11, ..., and 0.9 from n = 80 on."""
    module = Scalar(0.0)
    ema = EMA(module, 0.9)
    expected = 0.0
    with torch.no_grad():
        for n in range(100):
            module.w.copy_(torch.tensor([math.sin(n), -1.0]))
            ema.update(module)
            decay = min(0.9, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * math.sin(n)
            assert ema.weights["w"].tolist() == pytest.approx([expected, -1.0], abs=1e-5)
    assert ema.updates == 100


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_ema_decay_is_bounded(decay):
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\)"):
        EMA(Scalar(), decay)


def test_ema_weights_are_swapped_in_and_out_again():
    module = Scalar(1.0)
    state = TrainState.create({"policy": module}, {"policy": 1e-3}, ema_decay=0.9, seed=0)
    with torch.no_grad():
        module.w.fill_(5.0)
    def inside():
        with state.ema_modules():
            assert module.w.tolist() == [1.0, -1.0]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert module.w.tolist() == [5.0, 5.0]
    plain = TrainState.create({"policy": module}, {"policy": 1e-3}, seed=0)
    with plain.ema_modules():
        assert module.w.tolist() == [5.0, 5.0]


def test_state_trains_what_it_is_told_to():
    modules = {"policy": Scalar(), "critic": Scalar(), "encoder": Scalar()}
    state = TrainState.create(modules, {"policy": 1e-3, "critic": 1e-2}, weight_decay=0.1, beta2=0.95, seed=3)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in state.optimizer.param_groups] == [
        ("policy", 1e-3, 0.1), ("critic", 1e-2, 0.1)]
    assert {g["betas"] for g in state.optimizer.param_groups} == {(0.9, 0.95)}
    with pytest.raises(ValueError, match=r"learning rates for \['actor'\], but the modules are \['critic', 'encoder'"):
        TrainState.create(modules, {"actor": 1e-3}, seed=0)
    with pytest.raises(ValueError, match=r"modules \['policy'\] have no trainable parameters"):
        TrainState.create({"policy": frozen_copy(Scalar())}, {"policy": 1e-3}, seed=0)


def test_frozen_copy_is_detached():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    copy = frozen_copy(module)
    assert not copy.training
    assert module.training
    assert not any(p.requires_grad for p in copy.parameters())
    with torch.no_grad():
        module[0].weight.add_(1)
    assert not torch.equal(copy[0].weight, module[0].weight)


def test_microbatch_gradients_and_metrics_are_weighted():
    """0.25 * d(w0^2) + 0.75 * d(3 w0) at w0 = 2: 1 + 2.25 = 3.25; losses 4 and 6 average to 5.5."""
    module = Scalar(2.0)
    state = TrainState.create({"policy": module}, {"policy": 1e-3}, seed=0)
    losses = [(0.25, lambda: (module.w[0] ** 2, {"m": 1.0})), (0.75, lambda: (3 * module.w[0], {"m": 5.0}))]
    metrics = update.step(state, losses, max_grad_norm=None)
    assert module.w.grad.tolist() == [3.25, 0.0]
    assert metrics == pytest.approx({"m": 4.0, "loss": 5.5, "grad_norm/policy": 3.25})


def test_groups_are_clipped_by_their_own_norm():
    """Gradients (30, 40) and (0.3, 0.4): the first is scaled to norm 1, the second stays."""
    modules = {"policy": Scalar(), "critic": Scalar()}
    state = TrainState.create(modules, {"policy": 1e-3, "critic": 1e-3}, seed=0)
    slope = torch.tensor([30.0, 40.0])

    def loss():
        return (modules["policy"].w * slope).sum() + (modules["critic"].w * slope / 100).sum(), {}

    metrics = update.step(state, [(1.0, loss)], max_grad_norm=1.0)
    assert modules["policy"].w.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert modules["critic"].w.grad.tolist() == pytest.approx([0.3, 0.4])
    assert metrics["grad_norm/policy"] == pytest.approx(50.0)
    assert metrics["grad_norm/critic"] == pytest.approx(0.5)


@pytest.mark.parametrize(("loss", "message"), [
    (lambda w: (w.sum() * math.nan, {}), "loss is nan at step 7"),
    (lambda w: (w.sum() * math.inf, {}), "loss is -?inf at step 7"),
    (lambda w: (w.sum(), {"kl/old": math.inf}), "kl/old is inf at step 7"),
    (lambda w: ((w[:1] * 0).abs().sqrt().sum(), {}), "gradient of policy.w is not finite at step 7")])
def test_a_non_finite_quantity_is_named_and_nothing_moves(loss, message):
    module = Scalar(3.0)
    state = TrainState.create({"policy": module}, {"policy": 1e-1}, ema_decay=0.5, seed=0)
    update.step(state, [(1.0, lambda: ((module.w**2).sum(), {}))], max_grad_norm=1.0)
    state.step = 7
    before = snapshot(state)
    fine = (0.5, lambda: (module.w.sum(), {}))
    with pytest.raises(update.NonFinite, match=message):
        update.step(state, [fine, (0.5, lambda: loss(module.w))], max_grad_norm=1.0)
    assert same(before, snapshot(state))
    assert state.ema.updates == 1
    update.step(state, [fine], max_grad_norm=1.0)  # the bad gradient does not linger
    assert not same(before, snapshot(state))


def test_learning_rate_factor():
    """Linear warm-up over 4 steps, then a cosine: 1 at its start, 1/2 half-way, 0 at the end."""
    plan = Pretraining(steps=20, warmup_steps=4)
    assert [learning_rate_factor(plan, step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [learning_rate_factor(plan, step) for step in (4, 8, 12, 20)] == pytest.approx(
        [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0], abs=1e-9)
    assert learning_rate_factor(Pretraining(steps=5, warmup_steps=0), 0) == 1.0


@pytest.mark.parametrize("time", ["uniform", "logit_normal", "grid"])
def test_training_times(time, generator):
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=4)
    t = draw_times(Pretraining(steps=1, time=time), policy, 4000, generator)
    assert t.min() > 0
    assert t.max() <= 1
    if time == "grid":
        values, counts = t.unique(return_counts=True)
        assert values.tolist() == [0.25, 0.5, 0.75, 1.0]
        assert counts.min() > 850  # 1000 expected, standard deviation 27
    else:  # the middle half holds 1/2 of a uniform, and P(|z| < ln 3) = 0.728 of a logit-normal
        middle = ((t > 0.25) & (t < 0.75)).float().mean().item()
        assert middle == pytest.approx({"uniform": 0.5, "logit_normal": 0.728}[time], abs=0.03)


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_shifted_times_are_sd3_eq_23_of_the_unshifted_ones(time):
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=4)
    shifted = draw_times(Pretraining(steps=1, time=time, shift=3.0), policy, 100, torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(2)
    plain = 1 - torch.rand(100, generator=draw) if time == "uniform" else torch.randn(100, generator=draw).sigmoid()
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_denoising_loss_is_the_mean_squared_error_to_the_target():
    policy = toy_policy(MLPDenoiser(prediction="v"), DDPM(), path=VPPath(train_steps=10))
    x0, eps, cond = torch.randn(5, 2), torch.randn(5, 2), {"obs": torch.zeros(5, 1)}
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0])
    level = policy.path.level(t, 1)
    output = policy.denoiser(level.alpha * x0 + level.sigma * eps, t, cond)
    expected = ((output - (level.alpha * eps - level.sigma * x0)) ** 2).mean(1)
    torch.testing.assert_close(denoising_loss(policy, x0, cond, t, eps), expected)


LEARNED = [("flow", FlowSDE(noise_level=0.3)), ("eps", DDPM()), ("x0", DDPM())]


@pytest.mark.parametrize(("prediction", "kernel"), LEARNED)
def test_pretraining_learns_a_conditional_distribution(prediction, kernel, generator):
    """Data: x = (c, -c) + 0.1 noise with c = +-1. After 200 steps the samples' means are right to 0.15."""
    path = VPPath(train_steps=20) if prediction != "flow" else None
    policy = toy_policy(MLPDenoiser(prediction=prediction), kernel, steps=20, path=path)
    plan = Pretraining(steps=200, learning_rate=1e-2, warmup_steps=20, time="grid")
    state = TrainState.create({"policy": policy.denoiser}, {"policy": plan.learning_rate}, ema_decay=0.99, seed=0)

    def batch(draw):
        c = 2.0 * torch.randint(2, (128, 1), generator=draw) - 1
        return torch.cat([c, -c], 1) + 0.1 * torch.randn(128, 2, generator=draw), {"obs": c}

    iterations = list(fit(plan, policy, batch, state))
    assert [iteration.step for iteration in iterations] == list(range(1, 201))
    assert state.optimizer.param_groups[0]["lr"] < 1e-5
    with state.ema_modules():
        for c in (-1.0, 1.0):
            samples = policy.act({"obs": torch.full((500, 1), c)}, generator=generator).action
            assert samples.mean(0).tolist() == pytest.approx([c, -c], abs=0.15)
            assert samples.std(0).max() < 0.35
    assert list(fit(plan, policy, batch, state)) == []  # a finished state has nothing left to do


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "batch_size": 0}, {"steps": 5, "learning_rate": 0.0},
                                     {"steps": 5, "beta2": 1.0}, {"steps": 5, "shift": 0.0},
                                     {"steps": 5, "shift": 2.0, "time": "grid"}])
def test_pretraining_refusals(options):
    with pytest.raises(ValueError, match=r"must be at least 1, got 0|must be positive|beta2 must lie"):
        Pretraining(**options)
