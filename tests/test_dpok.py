"""DPOK: the clamped ratio by hand, its dead zones, and a KL that is one of policies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_on_policy import setup
from test_surrogates import NUDGE, evaluate
from toys import PromptBandit

from diffalign.algorithms import DPOK
from diffalign.config import ConfigError, build
from diffalign.diffusion import DDPM
from diffalign.rl.advantages import GAE
from diffalign.rl.clamped import ClampedRatio
from diffalign.rl.surrogates import PPOClip
from diffalign.train.on_policy import Optimization, optimize
from diffalign.train.state import frozen_copy

D = 4


@pytest.mark.parametrize("unit", ["nats", "per_dim"])
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_the_gradient_is_a_r_inside_and_0_outside_for_both_signs(unit, advantage):
    """loss = -A clamp(r, limits), times D per_dim; gradient -A r 1[inside]."""
    low, high = (-0.2, 0.2) if unit == "nats" else (D * math.log(0.8), D * math.log(1.2))
    at = torch.tensor([low - NUDGE, low + NUDGE, 0.0, high - NUDGE, high + NUDGE], dtype=torch.float64)
    loss, gradient, held_low, held_high = evaluate(ClampedRatio(limit=0.2, unit=unit), at, advantage)
    scale = 1 if unit == "nats" else D
    ratio, limits = (at / scale).exp(), (math.exp(low / scale), math.exp(high / scale))
    torch.testing.assert_close(loss, -scale * advantage * ratio.clamp(*limits))
    torch.testing.assert_close(gradient, -advantage * ratio * torch.tensor([0, 1, 1, 1, 0], dtype=torch.float64))
    assert held_low.int().tolist() == [1, 0, 0, 0, 0]
    assert held_high.int().tolist() == [0, 0, 0, 0, 1]


def test_what_moved_the_wrong_way_stays_there_unlike_with_ppo():
    """A good sample that became less likely (A > 0, r < low): PPO pulls it back, the clamp has no gradient."""
    at = [-0.5]
    *_, held_low, _ = clamped = evaluate(ClampedRatio(limit=0.2), at, 1.0)
    assert clamped[1].item() == 0.0
    assert bool(held_low)
    assert evaluate(PPOClip(low=0.2, high=0.2), at, 1.0)[1].item() == pytest.approx(-math.exp(-0.5))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ClampedRatio(limit=0.0), "limit must be positive, got 0.0"),
    (lambda: ClampedRatio(limit=1.0, unit="per_dim"), "leaves no lower limit"),
    (lambda: DPOK(reference_kl=-1.0).compose(), "reference_kl must be at least 0, got -1.0")])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_ema_penalty_is_no_setting_of_dpok():
    with pytest.raises(ConfigError, match="reference_velocity: unknown setting"):
        build(DPOK, {"reference_velocity": 1.0}, "test")


def first_updates(weight, count=2, images=16):
    """Metrics of the first updates of DPOK with this KL weight."""
    algorithm = DPOK(surrogate=ClampedRatio(limit=0.3), reference_kl=weight, optimization=Optimization(minibatches=2))
    policy, state = setup(DDPM(), "eps", rates=1e-2, seed=0)
    loop = optimize(algorithm.compose(), policy, PromptBandit(images=images), state,
                    reference=frozen_copy(policy.denoiser))
    return [next(loop).metrics for _ in range(count)]


def test_the_kl_is_that_of_the_two_policies():
    """0 before the first step, positive after (the public code's soft_reward option has 0 throughout), and a large
    weight holds the policy: the port in D3PO penalizes a distribution over the batch, which does not."""
    free, held = first_updates(1e-6, count=6), first_updates(10.0, count=6)
    assert free[0]["kl/reference"] < free[1]["kl/reference"] < free[5]["kl/reference"]
    assert 0 < held[5]["kl/reference"] < 0.2 * free[5]["kl/reference"]


def test_the_value_baseline_is_trained_with_the_policy():
    algorithm = DPOK(surrogate=ClampedRatio(limit=0.3), advantage=GAE(whiten=False))
    policy, state = setup(DDPM(), "eps", critic=True, rates=1e-2, seed=0)
    before = frozen_copy(state.modules["critic"]).state_dict()
    loop = optimize(algorithm.compose(), policy, PromptBandit(), state, reference=frozen_copy(policy.denoiser))
    assert "value/loss" in next(loop).metrics
    assert any(not torch.equal(before[name], value) for name, value in state.modules["critic"].state_dict().items())
    assert replace(algorithm, value_loss=0.0).compose().value_loss == 0
