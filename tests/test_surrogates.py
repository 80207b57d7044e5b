"""Surrogates: values and gradients just inside and just outside their trust regions, in both units."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.diffusion import Gaussian
from diffalign.rl.likelihoods import Rows, Scored
from diffalign.rl.surrogates import (
    ContrastiveMatching,
    DivergenceGate,
    GuardClip,
    PPOClip,
    SimplePO,
    WeightedRegression,
    step_factor,
)

D = 4
NUDGE = 1e-3


def evaluate(surrogate, log_ratio, advantage, *, dims=D, position=1.0, gaussians=(None, None)):
    """(loss, d loss / d log p, held_low, held_high) per row, in float64."""
    log_ratio = torch.as_tensor(log_ratio, dtype=torch.float64).reshape(-1).clone().requires_grad_()
    advantage = torch.as_tensor(advantage, dtype=torch.float64).reshape(-1).expand_as(log_ratio)
    rows = Rows({}, {}, advantage, torch.full_like(log_ratio, 0.3).detach(), gaussians[0],
                torch.full_like(log_ratio, position).detach())
    empty = torch.zeros(len(log_ratio), dims)
    new = Scored(log_ratio + 0.3, gaussians[1], (empty, empty), dims)
    result = surrogate(new, rows)
    (gradient,) = torch.autograd.grad(result.loss.sum(), log_ratio)
    return result.loss.detach(), gradient, result.held_low, result.held_high


@pytest.mark.parametrize("unit", ["nats", "per_dim"])
def test_clip_sides(unit):
    """low 0.1, high 0.3. Held: A > 0 above the upper limit, A < 0 below the lower one, and nothing else."""
    surrogate = PPOClip(low=0.1, high=0.3, unit=unit)
    low, high = (-0.1, 0.3) if unit == "nats" else (D * math.log(0.9), D * math.log(1.3))
    at = [low - NUDGE, low + NUDGE, high - NUDGE, high + NUDGE]
    for advantage, held in ((2.0, [0, 0, 0, 1]), (-1.5, [1, 0, 0, 0])):
        loss, gradient, held_low, held_high = evaluate(surrogate, at, advantage)
        ratio = torch.tensor(at, dtype=torch.float64) / (1 if unit == "nats" else D)
        free = -advantage * ratio.exp()
        torch.testing.assert_close(gradient, free * (1 - torch.tensor(held, dtype=torch.float64)))
        assert (held_high if advantage > 0 else held_low).int().tolist() == held
        assert not (held_low if advantage > 0 else held_high).any()
        scale = 1 if unit == "nats" else D
        limits = (math.exp(-0.1), math.exp(0.3)) if unit == "nats" else (0.9, 1.3)
        expected = torch.maximum(free, -advantage * ratio.exp().clamp(*limits)) * scale
        torch.testing.assert_close(loss, expected)


def test_per_dim_is_the_published_loss_times_d():
    """DDPO, Flow-GRPO, DPPO: r = exp(mean_D(logp - logp_old)), L = max(-A r, -A clip(r, 1 - e, 1 + e))."""
    e, per_element = 0.05, torch.randn(50, D, dtype=torch.float64) * 0.08
    advantage = torch.randn(50, dtype=torch.float64)
    ratio = per_element.mean(1).exp()
    published = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - e, 1 + e))
    assert ((ratio > 1 + e) | (ratio < 1 - e)).sum() > 5  # the clip does bind
    loss, *_ = evaluate(PPOClip(low=e, high=e, unit="per_dim"), per_element.sum(1), advantage)
    torch.testing.assert_close(loss, D * published)


def test_the_published_clip_in_nats():
    """1e-4 per dimension at D = 16384 (SD1.5) is 1.64 joint nats: same rows held, same small steps."""
    dims, e = 16384, 1e-4
    published, nats = PPOClip(low=e, high=e, unit="per_dim"), PPOClip(low=e * dims, high=e * dims)
    at = [-1.66, -1.62, -0.5, 0.0, 0.5, 1.62, 1.66]
    for advantage in (1.0, -1.0):
        held = [[flag.tolist() for flag in evaluate(s, at, advantage, dims=dims)[2:]] for s in (published, nats)]
        assert held[0] == held[1]
        assert sum(held[0][0] + held[0][1]) == 1
    small = [-1e-3, 0.0, 2e-3]
    gradients = [evaluate(s, small, 0.7, dims=dims)[1] for s in (published, nats)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=3e-3, atol=0)


def test_dual_clip():
    """A = -2, dual 3: the loss stops at 6, where the ratio is 3; positive advantages do not notice."""
    surrogate = PPOClip(low=0.2, high=0.2, dual=3.0)
    at = [math.log(3) - NUDGE, math.log(3) + NUDGE, 3.0]
    loss, gradient, *_ = evaluate(surrogate, at, -2.0)
    assert loss.tolist() == pytest.approx([2 * 3 * math.exp(-NUDGE), 6.0, 6.0])
    assert gradient.tolist() == pytest.approx([2 * 3 * math.exp(-NUDGE), 0.0, 0.0])
    without = evaluate(PPOClip(low=0.2, high=0.2), at, 2.0)
    for got, expected in zip(evaluate(surrogate, at, 2.0), without):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("unit", ["nats", "per_dim"])
def test_simple_po_pulls_to_one_plus_minus_e(unit):
    """Minimum at r = 1 + e for A > 0 and r = 1 - e for A < 0; the gradient changes sign there."""
    limit = 0.2
    e = math.expm1(limit) if unit == "nats" else limit
    scale = 1 if unit == "nats" else D
    for advantage, optimum in ((1.7, 1 + e), (-0.6, 1 - e)):
        at = [scale * math.log(optimum * f) for f in (1 - NUDGE, 1.0, 1 + NUDGE)]
        _, gradient, held_low, held_high = evaluate(SimplePO(limit=limit, unit=unit), at, advantage)
        assert gradient[0] < 0 < gradient[2]
        assert gradient[1].item() == pytest.approx(0, abs=1e-12)
        assert (held_low[0] or held_high[2]).item()
        assert not (held_low[2] or held_high[0]).item()


def test_simple_po_value_by_hand():
    """per_dim, D = 4, e = 0.2, r = 1.1, A = 2: -4 [2.2 - 2 * 0.01 / 0.4] = -8.6."""
    loss, *_ = evaluate(SimplePO(limit=0.2, unit="per_dim"), [D * math.log(1.1)], 2.0)
    assert loss.item() == pytest.approx(-8.6)


@pytest.mark.parametrize("unit", ["nats", "per_dim"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [0.05, -0.05])
@pytest.mark.parametrize("outside", [True, False])
def test_divergence_gate(unit, advantage, log_ratio, outside):
    """Off only where KL(old || new) >= limit and the update moves further away; KL = D s^2 / 2 for a shift s."""
    limit = 0.05
    kl = limit * (1 if unit == "nats" else D) * (1.01 if outside else 0.99)
    shift = math.sqrt(2 * kl / D)
    ones = torch.ones(1, 1, dtype=torch.float64)
    old = Gaussian(torch.zeros(1, D, dtype=torch.float64), ones)
    new = Gaussian(torch.full((1, D), shift, dtype=torch.float64), ones)
    loss, gradient, held_low, held_high = evaluate(DivergenceGate(limit=limit, unit=unit), [log_ratio], advantage,
                                                   gaussians=(old, new))
    away = advantage * log_ratio > 0
    ratio, scale = (math.exp(log_ratio), 1) if unit == "nats" else (math.exp(log_ratio / D), D)
    assert loss.item() == pytest.approx(-advantage * ratio * scale)
    assert gradient.item() == pytest.approx(0.0 if outside and away else -advantage * ratio)
    assert held_high.item() == (outside and away and advantage > 0)
    assert held_low.item() == (outside and away and advantage < 0)


def test_the_gate_measures_kl_old_new():
    """With std 1 -> 2 (D = 1): KL(old || new) = ln 2 + 1/8 - 1/2 = 0.318, the other direction 0.807."""
    old, new = (Gaussian(torch.zeros(1, 1), torch.full((1, 1), s)) for s in (1.0, 2.0))
    for limit, held in ((0.31, True), (0.33, False)):
        *_, held_high = evaluate(DivergenceGate(limit=limit), [0.1], 1.0, dims=1, gaussians=(old, new))
        assert held_high.item() == held


@pytest.mark.parametrize("surrogate", [PPOClip(), PPOClip(unit="per_dim", dual=2.0), SimplePO(), DivergenceGate()],
                         ids=repr)
def test_a_row_does_not_depend_on_the_others(surrogate):
    """GRPO-Guard's code reduces its correction over the batch as well (image_peers 2.6); here every row is alone."""
    draw = torch.Generator().manual_seed(0)
    log_ratio, advantage = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    mean = torch.randn(6, D, generator=draw, dtype=torch.float64)

    def of(rows):
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        pair = Gaussian(torch.zeros_like(mean[rows]), ones), Gaussian(0.2 * mean[rows], ones)
        return evaluate(surrogate, log_ratio[rows], advantage[rows], gaussians=pair)

    together = of(list(range(6)))
    for row in range(6):
        for one, every in zip(of([row]), together):
            torch.testing.assert_close(one[0], every[row])


def test_step_factor_is_dppo_schedule():
    """start + (1 - start) (e^(rate p) - 1) / (e^rate - 1): 0.1 at the noisiest step, 1 at the last."""
    p = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    middle = 0.1 + 0.9 * (math.exp(1.5) - 1) / (math.exp(3) - 1)
    assert step_factor(p, 0.1, 3.0).tolist() == pytest.approx([0.1, middle, 1.0])
    assert step_factor(p, 1.0, 3.0).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_the_step_schedule_tightens_noisy_steps():
    surrogate = PPOClip(low=0.2, high=0.4, step_start=0.25)
    for position, limit in ((0.0, 0.1), (1.0, 0.4)):
        *_, held_high = evaluate(surrogate, [limit - NUDGE, limit + NUDGE], 1.0, position=position)
        assert held_high.tolist() == [False, True]
    for position, limit in ((0.0, 0.05), (1.0, 0.2)):
        *_, held_low, _ = evaluate(surrogate, [-limit + NUDGE, -limit - NUDGE], -1.0, position=position)
        assert held_low.tolist() == [False, True]


@pytest.mark.parametrize("surrogate", [PPOClip(low=0.3, high=0.5), PPOClip(unit="per_dim", dual=2.0),
                                       SimplePO(limit=0.3), SimplePO(unit="per_dim")], ids=repr)
def test_gradcheck(surrogate):
    """Numerical derivatives at ratios away from the kinks."""
    old, advantage = torch.randn(2, 8, dtype=torch.float64)
    rows = Rows({}, {}, advantage, old, None, torch.ones(8, dtype=torch.float64))
    log_prob = (old + torch.linspace(-0.25, 0.25, 8, dtype=torch.float64)).requires_grad_()
    zero = torch.zeros(8, D)
    torch.autograd.gradcheck(lambda lp: surrogate(Scored(lp, None, (zero, zero), D), rows).loss, (log_prob,))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: PPOClip(low=0.0), "low must be positive, got 0.0"), (lambda: PPOClip(high=-1.0), "high must be positive"),
    (lambda: PPOClip(step_rate=0.0), "step_rate must be positive"),
    (lambda: PPOClip(step_start=0.0), "step_start must"),
    (lambda: PPOClip(low=1.0, unit="per_dim"), "leaves no lower limit"),
    (lambda: PPOClip(dual=1.0), "dual must exceed 1"),
    (lambda: SimplePO(limit=0.0), "limit must be positive"),
    (lambda: DivergenceGate(limit=-1.0), "limit must be positive"),
    (lambda: GuardClip(low=0.0), "low must be positive"), (lambda: GuardClip(dual=0.5), "dual must exceed 1, got 0.5"),
    (lambda: ContrastiveMatching(beta=0.0), "beta must be positive"),
    (lambda: evaluate(ContrastiveMatching(), [0.0], 1.0), "needs the old policy's error"),
    (lambda: evaluate(GuardClip(), [0.0], 1.0), "needs the stored Gaussian steps"),
    (lambda: evaluate(DivergenceGate(), [0.0], 1.0), "needs the exact KL of Gaussian steps")])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weighted_regression_by_hand():
    """-min(exp(A / 0.5), 5) log p: exp(1 / 0.5) is 7.4 and cut, exp(-2 / 0.5) is 0.018; log p = log ratio + 0.3."""
    loss, gradient, low, high = evaluate(WeightedRegression(temperature=0.5, limit=5.0), [0.1, -0.4], [1.0, -2.0])
    weight = torch.tensor([5.0, math.exp(-4)], dtype=torch.float64)
    torch.testing.assert_close(gradient, -weight)
    torch.testing.assert_close(loss, -weight * torch.tensor([0.4, -0.1], dtype=torch.float64))
    assert not bool((low | high).any())
    _, gradient, _, _ = evaluate(WeightedRegression(), [0.1, 3.0], [2.0, 0.0])
    assert gradient.tolist() == [-2.0, 0.0]


def test_weighted_regression_refuses_what_is_no_weight():
    with pytest.raises(ValueError, match="is no weight; set a temperature"):
        evaluate(WeightedRegression(), [0.0, 0.0], [1.0, -1.0])
    for options in ({"temperature": 0.0}, {"limit": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            WeightedRegression(**options)
    assert WeightedRegression().selective
    assert not WeightedRegression(temperature=1.0).selective
