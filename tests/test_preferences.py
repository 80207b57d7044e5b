"""Preference learning: the loss, the history, and learning without rewards."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toys import MLPDenoiser, toy_policy

from diffalign.algorithms import DPO, SePPO
from diffalign.diffusion import ODE
from diffalign.rl.preferences import preference_loss
from diffalign.train import checkpoint
from diffalign.train.preferences import History, Pairs, Preference, prefer
from diffalign.train.state import TrainState
from diffalign.train.supervised import Pretraining

FITTING = Pretraining(steps=300, batch_size=64, learning_rate=3e-3, warmup_steps=1, ema_decay=None)
TARGET = torch.tensor([0.8, -0.4])


def errors(new, held):
    return torch.tensor(new), torch.tensor(held)


def test_the_loss_is_log_two_at_the_reference():
    same = errors([0.3, 2.0], [0.3, 2.0])
    for anchor in ("off", "per_sample"):
        loss = preference_loss(same, errors([1.0, 0.2], [1.0, 0.2]), beta=7.0, anchor=anchor)
        torch.testing.assert_close(loss, torch.full((2,), math.log(2)))


def test_the_loss_by_hand():
    """d_w = 1 - 1.5 = -0.5, d_l = 2 - 1.8 = 0.2; -beta / 2 (d_w - d_l) = 2 * 0.7 = 1.4."""
    winner, other = errors([1.0], [1.5]), errors([2.0], [1.8])
    expected = math.log(1 + math.exp(-1.4))
    for anchor in ("off", "per_sample"):  # the policy is better on the winner: g = 1
        assert float(preference_loss(winner, other, beta=4.0, anchor=anchor)) == pytest.approx(expected, abs=1e-6)


def test_the_flip_makes_the_other_sample_a_second_winner():
    """d_w = 0.5 > 0: g = -1, and -beta / 2 (d_w + d_l) = -2 * (0.5 + 0.2) = -1.4."""
    winner, other = errors([1.5], [1.0]), errors([2.0], [1.8])
    flipped = float(preference_loss(winner, other, beta=4.0, anchor="per_sample"))
    assert flipped == pytest.approx(math.log(1 + math.exp(1.4)), abs=1e-6)
    assert float(preference_loss(winner, other, beta=4.0)) == pytest.approx(math.log(1 + math.exp(0.6)), abs=1e-6)


def test_no_gradient_flows_through_the_flip():
    """With the flip the gradient in d_other has the winner's sign, and |gradients| are equal."""
    new_winner, new_other = torch.tensor([1.5], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    loss = preference_loss((new_winner, torch.tensor([1.0])), (new_other, torch.tensor([1.8])), beta=4.0,
                           anchor="per_sample")
    loss.sum().backward()
    assert float(new_winner.grad) > 0
    torch.testing.assert_close(new_winner.grad, new_other.grad)


def make(seed=0):
    torch.manual_seed(seed)
    policy = toy_policy(MLPDenoiser(), ODE(), steps=4)
    return policy, TrainState.create({"policy": policy.denoiser}, {"policy": 3e-3}, seed=seed)


def winners(generator):
    x = TARGET + 0.1 * torch.randn(64, 2, generator=generator)
    return Pairs(x, None, {"obs": torch.zeros(64, 1)})


def pairs(generator):
    good = winners(generator)
    return replace(good, loser=good.winner - 1.0)


def distance(policy):
    sample = policy.act({"obs": torch.zeros(400, 1)}, generator=torch.Generator().manual_seed(9)).action
    return float((sample.mean(0) - TARGET).norm())


def learned(algorithm, data):
    """The policy before and after."""
    (policy, state), (before, _) = make(), make()
    for _ in prefer(algorithm.compose(), policy, data, state):
        pass
    return before, policy


@pytest.mark.parametrize("algorithm", [SePPO(beta=5.0, snapshot_every=50, fitting=FITTING),
                                       SePPO(beta=5.0, reference="initial", anchor="off", fitting=FITTING)], ids=repr)
def test_samples_move_to_the_winners(algorithm):
    before, after = learned(algorithm, winners)
    assert distance(before) > 0.7
    assert distance(after) < distance(before) - 0.4


def test_a_large_beta_holds_the_policy_at_its_reference():
    """The optimum is the reference tilted by log(winners / reference) * 1 / beta."""
    _, free = learned(SePPO(beta=5.0, reference="initial", anchor="off", fitting=FITTING), winners)
    _, held = learned(SePPO(beta=100.0, reference="initial", anchor="off", fitting=FITTING), winners)
    assert distance(held) > distance(free) + 0.3


def test_given_losers_push_the_samples_away():
    """Losers lie at winners - (1, 1): samples move along (1, 1), which winners alone would not ask for."""
    before, after = learned(DPO(beta=5.0, fitting=FITTING), pairs)
    cond, generator = {"obs": torch.zeros(400, 1)}, torch.Generator
    moved = [p.act(cond, generator=generator().manual_seed(3)).action.mean(0).sum() for p in (before, after)]
    assert float(moved[1] - moved[0]) > 0.3


def test_the_history_keeps_the_first_and_the_newest():
    policy, state = make()
    pieces = Preference(fitting=replace(FITTING, steps=60), beta=5.0, opponent="sampled", reference="random",
                        snapshot_every=10, history=3)
    first = {name: p.detach().clone() for name, p in policy.denoiser.named_parameters()}
    for _ in prefer(pieces, policy, winners, state):
        pass
    history = History(state, 3)
    assert history.steps() == [0, 50, 60]
    generator = torch.Generator().manual_seed(0)
    assert history.pick("initial", generator) == 0
    assert history.pick("latest", generator) == 60
    assert {history.pick("random", generator) for _ in range(50)} == {0, 50, 60}
    copy, _ = make(seed=3)
    history.load(0, copy.denoiser)
    for name, p in copy.denoiser.named_parameters():
        assert torch.equal(p, first[name])


def test_resume_is_bit_exact_with_its_history(tmp_path):
    algorithm = SePPO(beta=20.0, snapshot_every=5, history=3, fitting=replace(FITTING, steps=40)).compose()
    policy, state = make()
    loop = prefer(algorithm, policy, winners, state)
    for _ in range(22):
        next(loop)
    saved = checkpoint.save(tmp_path, state)
    expected = [next(loop).metrics for _ in range(5)]
    policy, fresh = make(seed=4)
    checkpoint.load(saved, fresh)
    resumed = prefer(algorithm, policy, winners, fresh)
    assert [next(resumed).metrics for _ in range(5)] == expected


def test_given_losers_must_be_given():
    policy, state = make()
    with pytest.raises(ValueError, match="this data has none"):
        next(prefer(DPO(fitting=FITTING).compose(), policy, winners, state))
    with pytest.raises(ValueError, match="beta must be positive"):
        DPO(beta=0.0).compose()
    with pytest.raises(ValueError, match="history >= 2"):
        SePPO(history=1).compose()


def test_a_step_says_how_the_policy_stands_against_its_reference():
    """At the start policy and reference are one; later the policy gains on the winners more than on its own samples."""
    policy, state = make()
    pieces = SePPO(beta=5.0, reference="initial", fitting=replace(FITTING, steps=80)).compose()
    metrics = [iteration.metrics for iteration in prefer(pieces, policy, winners, state)]
    assert metrics[0]["gain/winner"] == metrics[0]["gain/other"] == metrics[0]["behind"] == 0
    late = {name: sum(m[name] for m in metrics[-20:]) / 20 for name in ("gain/winner", "gain/other", "behind")}
    assert late["gain/winner"] > max(0.1, late["gain/other"])
    assert late["behind"] < 0.3
