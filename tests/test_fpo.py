"""FPO and FPO++: the ratios by hand, the asymmetric trust region, gradients at the start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_objectives import ADVANTAGE, COND, D, gradient_of
from toys import MLPDenoiser, toy_policy

from diffalign.algorithms import FPO
from diffalign.diffusion import ODE
from diffalign.rl.asymmetric import AsymmetricPO
from diffalign.rl.likelihoods import Matching, Scored
from diffalign.rl.pooled import PooledMatching
from diffalign.rl.surrogates import GuardClip, PPOClip, SimplePO

DRAWS = 6


def pooled(decisions=None):
    """(policy, examples of five decisions)."""
    torch.manual_seed(0)
    policy = toy_policy(MLPDenoiser(event=D), ODE(), event=(D,), steps=4)
    draw = torch.Generator().manual_seed(0)
    trajectory = policy.act(COND, generator=draw).trajectory
    decisions = torch.arange(5) if decisions is None else decisions
    return policy, LIKELIHOOD.examples(policy, trajectory, ADVANTAGE, decisions=decisions, generator=draw)


LIKELIHOOD = PooledMatching(matching=Matching(draws=DRAWS, time="uniform"))


def nudge(policy):
    with torch.no_grad():
        for p in policy.denoiser.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))


def test_fpo_is_the_exponential_of_the_mean_loss_difference_of_a_decision():
    """r_n = exp(mean_j [l_old - l_new]) with every decision's own draws, in any order of a minibatch."""
    policy, examples = pooled()
    drawn = examples.drawn
    nudge(policy)
    index = torch.tensor([3, 0, 4])
    rows = examples.rows(index)
    new = LIKELIHOOD.score(policy, rows)
    for place, n in enumerate(index.tolist()):
        mine = drawn.decision == n
        assert int(mine.sum()) == DRAWS
        x0, t, eps = drawn.trajectory.sample[n], drawn.t[mine][:, None], drawn.eps[mine]
        cond = {"obs": COND["obs"][n].expand(DRAWS, 1)}
        loss = ((policy.denoiser((1 - t) * x0 + t * eps, t[:, 0], cond) - (eps - x0)) ** 2).sum(1)
        expected = (-drawn.old_log_prob[mine] - loss).mean()
        torch.testing.assert_close(new.log_prob[place] - rows.old_log_prob[place], expected, rtol=1e-4, atol=1e-5)
        assert rows.advantage[place] == ADVANTAGE[n]


def test_pooled_rows_are_decisions_and_start_at_ratio_one():
    policy, examples = pooled(torch.tensor([1, 4]))
    assert len(examples) == 2
    rows = examples.rows(torch.arange(2))
    assert rows.advantage.tolist() == ADVANTAGE[[1, 4]].tolist()
    new = LIKELIHOOD.score(policy, rows)
    torch.testing.assert_close(new.log_prob, rows.old_log_prob)
    expected = gradient_of((-rows.advantage * new.log_prob).sum(), policy)
    assert expected.norm() > 0.1
    surrogate = FPO().surrogate
    assert (gradient_of(surrogate(new, rows).loss.sum(), policy) - expected).norm() < 1e-3 * expected.norm()


def test_the_mean_ratio_is_the_geometric_mean_of_the_ratios_of_the_draws():
    policy, examples = pooled()
    nudge(policy)
    single = examples.drawn.rows(torch.arange(len(examples.drawn)))
    each = (Matching().score(policy, single).log_prob - single.old_log_prob).reshape(DRAWS, 5).mean(0)
    rows = examples.rows(torch.arange(5))
    torch.testing.assert_close(LIKELIHOOD.score(policy, rows).log_prob - rows.old_log_prob, each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", ["nats", "per_dim"])
def test_aspo_is_the_clip_for_good_and_the_pull_for_bad_samples(unit):
    _, examples = pooled()
    scale = 1 if unit == "nats" else D
    moved = scale * torch.tensor([0.3, 0.3, -0.3, -0.3, 0.0])
    advantage = torch.tensor([1.0, -2.0, 1.0, -2.0, -1.0])
    rows = replace(examples.rows(torch.arange(5)), advantage=advantage)
    log_prob = (rows.old_log_prob + moved).requires_grad_()
    new = Scored(log_prob, None, None, D)
    result = AsymmetricPO(limit=0.1, unit=unit)(new, rows)
    good, bad = advantage >= 0, advantage < 0
    clip = PPOClip(low=0.1, high=0.1, unit=unit)(new, rows)
    pull = SimplePO(limit=0.1, unit=unit)(new, rows)
    assert torch.equal(result.loss[good], clip.loss[good])
    assert torch.equal(result.loss[bad], pull.loss[bad])
    slope = torch.autograd.grad(result.loss.sum(), log_prob)[0]
    assert slope[0] == 0  # good and already much likelier: clipped
    assert slope[3] < 0  # bad and already much less likely: pulled back, where the clip would let it go
    assert torch.autograd.grad(clip.loss.sum(), log_prob)[0][3] == 0
    assert slope[4] == pytest.approx(1.0, abs=1e-5)  # at ratio 1: -A
    assert result.held_high.tolist() == [True, False, False, False, False]
    assert result.held_low.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("unit", ["nats", "per_dim"])
def test_aspo_stays_finite_for_absurd_ratios(unit):
    _, examples = pooled()
    rows = examples.rows(torch.arange(5))
    log_prob = (rows.old_log_prob + 1e4).requires_grad_()
    loss = AsymmetricPO(unit=unit, span=2.0)(Scored(log_prob, None, None, D), rows).loss
    assert loss.isfinite().all()
    same = AsymmetricPO(unit=unit, span=2.0)(Scored(log_prob + 5, None, None, D), rows).loss
    torch.testing.assert_close(loss, same)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: AsymmetricPO(limit=0.0), "limit must be positive, got 0.0"),
    (lambda: AsymmetricPO(span=0.0), "span must be positive, got 0.0"),
    (lambda: replace(FPO(), surrogate=GuardClip()).compose(),
     "GuardClip needs the gaussian step")])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
