"""Advantage estimators against brute force and published code."""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.rl.advantages import (
    GAE,
    BestOfGroup,
    GroupNormalized,
    LeaveOneOut,
    Outcome,
    PromptRunning,
    best_of_group,
    extremes,
    gae,
    group_normalized,
    leave_one_out,
    prompt_running,
    tied_fraction,
    whiten,
)


def brute_force(reward, value, next_value, terminated, truncated, gamma, lam):
    """sum_j (gamma lam)^j delta_{h+j} up to and with the step that ends the episode, in plain loops."""
    horizon, batch = reward.shape
    result = torch.zeros_like(reward)
    for b in range(batch):
        for h in range(horizon):
            for j in range(h, horizon):
                bootstrap = 0.0 if terminated[j, b] else gamma * next_value[j, b]
                result[h, b] += (gamma * lam) ** (j - h) * (reward[j, b] + bootstrap - value[j, b])
                if terminated[j, b] or truncated[j, b]:
                    break
    return result


@given(seed=st.integers(0, 10_000), horizon=st.integers(1, 7), gamma=st.floats(0, 1), lam=st.floats(0, 1),
       ends=st.floats(0, 0.9))
def test_gae_equals_brute_force(seed, horizon, gamma, lam, ends):
    draw = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, horizon, 4, generator=draw, dtype=torch.float64)
    terminated = torch.rand(horizon, 4, generator=draw) < ends / 2
    truncated = (torch.rand(horizon, 4, generator=draw) < ends / 2) & ~terminated
    got = gae(reward, value, next_value, terminated, truncated, gamma=gamma, lam=lam)
    expected = brute_force(reward, value, next_value, terminated, truncated, gamma, lam)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_nothing_flows_over_a_time_out():
    """robot_peers D2: DPPO's GAE gives a zero-reward episode the advantage of the one after its time-out."""
    reward = torch.tensor([[0.0], [0.0], [10.0], [10.0]])
    value = next_value = torch.zeros(4, 1)
    ended = torch.tensor([[False], [True], [False], [False]])
    never = torch.zeros_like(ended)
    for terminated, truncated in ((never, ended), (ended, never)):
        advantage = gae(reward, value, next_value, terminated, truncated, gamma=0.9, lam=0.5)
        assert advantage[:, 0].tolist() == pytest.approx([0.0, 0.0, 10 + 0.45 * 10, 10.0])


def test_a_time_out_bootstraps_and_a_termination_does_not():
    """delta = 1 + 0.9 * 5 - 2 = 3.5 or 1 - 2 = -1."""
    reward, value, after = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([[5.0, 5.0]])
    terminated, truncated = torch.tensor([[False, True]]), torch.tensor([[True, False]])
    advantage = gae(reward, value, after, terminated, truncated, gamma=0.9, lam=0.95)
    assert advantage[0].tolist() == pytest.approx([3.5, -1.0])


def outcome(reward, group=None, **options):
    batch = reward.shape[1]
    ended = torch.zeros_like(reward, dtype=torch.bool)
    ended[-1] = True
    fields = {"terminated": ended, "truncated": torch.zeros_like(ended), "valid": torch.ones_like(ended),
              "group": torch.zeros(batch, dtype=torch.long) if group is None else group,
              "prompt": torch.zeros(batch, dtype=torch.long)}
    return Outcome(reward, **(fields | options))


def test_gae_of_one_decision_is_reward_minus_value():
    reward, value = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.3, 0.4, -1.0]])
    estimate = GAE(whiten=False)(outcome(reward, value=value, next_value=torch.full((1, 3), 9.0)), {})
    torch.testing.assert_close(estimate.advantage, reward - value)
    torch.testing.assert_close(estimate.target, reward)


def test_gae_spec_whitens_over_valid_entries_only():
    """Garbage in decisions that were never executed changes nothing, and their advantage is 0."""
    draw = torch.Generator().manual_seed(0)
    reward, value, after = torch.randn(3, 4, 5, generator=draw)
    terminated = torch.zeros(4, 5, dtype=torch.bool)
    terminated[1, :2] = True
    valid = torch.ones(4, 5, dtype=torch.bool)
    valid[2:, :2] = False
    results = []
    for garbage in (0.0, 1e3):
        spoiled = outcome(torch.where(valid, reward, torch.tensor(garbage)), value=value, next_value=after,
                          terminated=terminated, valid=valid)
        results.append(GAE()(spoiled, {}))
    assert torch.equal(results[0].advantage, results[1].advantage)
    chosen = results[0].advantage[valid]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-6)
    assert chosen.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (results[0].advantage[~valid] == 0).all()
    raw = gae(reward, value, after, terminated, torch.zeros_like(valid), gamma=0.99, lam=0.95)
    torch.testing.assert_close(results[0].target[valid], (raw + value)[valid])


def test_whiten():
    valid = torch.tensor([[True, True, False], [True, False, True]])
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, -99.0, 7.0]])  # valid mean 4, population std sqrt(5)
    expected = (x - 4) / 5**0.5
    torch.testing.assert_close(whiten(x, valid)[valid], expected[valid])


GROUPS = torch.tensor([7, 3, 7, 3, 7, 5, 5])
REWARDS = torch.tensor([1.0, 10.0, 2.0, 14.0, 6.0, -1.0, -1.0], dtype=torch.float64)


def test_group_normalized_by_hand():
    """Group 7: (1, 2, 6), mean 3, population var (4 + 1 + 9) / 3; group 3: (10, 14), std 2; group 5: equal rewards."""
    got = group_normalized(REWARDS, GROUPS, eps=0.0 + 1e-12)
    std = (14 / 3) ** 0.5
    assert got.tolist() == pytest.approx([-2 / std, -1, -1 / std, 1, 3 / std, 0, 0], abs=1e-9)
    plain = group_normalized(REWARDS, GROUPS, scale="none")
    assert plain.tolist() == pytest.approx([-2, -2, -1, 2, 3, 0, 0])  # Dr.GRPO
    batch = group_normalized(REWARDS, GROUPS, scale="batch", eps=1e-4)
    assert torch.allclose(batch, plain / (np.std(REWARDS.numpy()) + 1e-4))


def test_group_eps_is_added_to_the_std():
    """flow_grpo adds 1e-4: rewards 0 and 2e-4 have std 1e-4, so the advantage is +-1/2."""
    got = group_normalized(torch.tensor([0.0, 2e-4], dtype=torch.float64), torch.tensor([0, 0]))
    assert got.tolist() == pytest.approx([-0.5, 0.5])


@given(seed=st.integers(0, 10_000), scale=st.sampled_from(["group", "batch", "none"]), shift=st.floats(-50, 50))
def test_group_properties(seed, scale, shift):
    draw = torch.Generator().manual_seed(seed)
    group = torch.arange(3).repeat(4)[torch.randperm(12, generator=draw)]
    reward = torch.randn(12, generator=draw, dtype=torch.float64)
    advantage = group_normalized(reward, group, scale=scale)
    for g in range(3):
        assert advantage[group == g].mean().item() == pytest.approx(0, abs=1e-9)
    order = torch.randperm(12, generator=draw)
    torch.testing.assert_close(group_normalized(reward[order], group[order], scale=scale), advantage[order])
    per_group = shift * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[group]
    shifted = group_normalized(reward + (shift if scale == "batch" else per_group), group, scale=scale)
    torch.testing.assert_close(shifted, advantage, rtol=1e-6, atol=1e-6)


def test_leave_one_out_is_the_scaled_difference_to_the_mean():
    """r_i - mean of the others = n/(n-1) (r_i - mean)."""
    got = leave_one_out(REWARDS, GROUPS)
    assert got[0].item() == pytest.approx(1 - (2 + 6) / 2)
    assert got[3].item() == pytest.approx(14 - 10)
    for g in (3, 5, 7):
        r = REWARDS[g == GROUPS]
        torch.testing.assert_close(got[g == GROUPS], len(r) / (len(r) - 1) * (r - r.mean()))


@pytest.mark.parametrize("estimate", [group_normalized, leave_one_out])
def test_a_group_of_one_is_refused(estimate):
    with pytest.raises(ValueError, match=r"a group of one row has no baseline \(1 of 2 groups\)"):
        estimate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


def test_prompt_running_is_the_tracker_of_ddpo():
    """Against ddpo-pytorch's PerPromptStatTracker written with deques, over calls that overflow the buffer."""
    buffer, min_count, eps = 6, 4, 1e-6
    history: dict[int, deque] = defaultdict(lambda: deque(maxlen=buffer))
    statistics: dict[str, torch.Tensor] = {}
    draw = torch.Generator().manual_seed(0)
    for call in range(6):
        prompt = torch.randint(5 if call > 2 else 3, (9,), generator=draw)
        reward = torch.randn(9, generator=draw, dtype=torch.float64) + prompt
        expected = np.empty(9)
        for p in np.unique(prompt.numpy()):
            rewards = reward.numpy()[prompt.numpy() == p]
            history[p].extend(rewards)
            enough = len(history[p]) >= min_count
            mean, std = (np.mean(history[p]), np.std(history[p])) if enough else (np.mean(reward.numpy()),
                                                                                  np.std(reward.numpy()))
            expected[prompt.numpy() == p] = (rewards - mean) / (std + eps)
        got, statistics = prompt_running(reward, prompt, statistics, buffer=buffer, min_count=min_count)
        assert np.allclose(got.numpy(), expected, rtol=1e-9, atol=1e-9), call
    assert min(len(history[p]) for p in (0, 1, 2)) == buffer  # the buffers did overflow


def test_prompt_running_does_not_change_the_statistics_it_was_given():
    reward, prompt = torch.tensor([1.0, 2.0]), torch.tensor([0, 0])
    _, first = prompt_running(reward, prompt, {}, buffer=4, min_count=2)
    before = first["rewards"].clone()
    prompt_running(reward + 5, prompt, first, buffer=4, min_count=2)
    assert torch.equal(first["rewards"].nan_to_num(-1), before.nan_to_num(-1))


def test_specs_spread_the_episode_advantage_over_its_decisions():
    """The return sums the valid rewards; every executed decision gets it, the others get 0."""
    reward = torch.tensor([[1.0, 0.0], [2.0, 0.0], [50.0, 1.0]])
    valid = torch.tensor([[True, True], [True, True], [False, True]])
    data = outcome(reward, valid=valid)
    assert data.episode_return.tolist() == [3.0, 1.0]
    estimate = LeaveOneOut()(data, {"kept": torch.ones(1)})
    assert estimate.advantage.tolist() == [[2.0, -2.0], [2.0, -2.0], [0.0, -2.0]]
    assert estimate.target is None
    assert set(estimate.statistics) == {"kept"}


def test_specs_use_their_options():
    """One outlier among 40: its group advantage is sqrt(39) = 6.24, clipped to 5 by default."""
    reward = torch.zeros(1, 40)
    reward[0, 0] = 1.0
    data = outcome(reward)
    assert GroupNormalized()(data, {}).advantage[0, 0].item() == 5.0
    assert GroupNormalized(clip=None)(data, {}).advantage[0, 0].item() == pytest.approx(39**0.5, rel=1e-3)
    assert GroupNormalized(scale="none")(data, {}).advantage[0, 0].item() == pytest.approx(0.975)
    white = GroupNormalized(scale="none", whiten=True, clip=None)(data, {}).advantage
    assert white.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert LeaveOneOut(clip=0.5)(data, {}).advantage[0, 0].item() == 0.5
    assert PromptRunning()(data, {}).advantage[0, 0].item() == 5.0
    assert PromptRunning()(data, {}).statistics["rewards"].shape == (1, 32)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: GAE(gamma=1.1), r"gamma must lie in \[0, 1\], got 1.1"), (lambda: GAE(lam=-0.1), r"lam must lie in"),
    (lambda: PromptRunning(buffer=4, min_count=5), "need 2 <= min_count <= buffer, got 5 and 4"),
    (lambda: PromptRunning(min_count=1), "need 2 <= min_count"),
    (lambda: GAE()(outcome(torch.zeros(1, 2)), {}), "needs a value critic")])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(rewards=st.lists(st.integers(-3, 3), min_size=12, max_size=12), keep=st.integers(1, 4))
def test_the_best_of_each_group_have_all_the_weight(rewards, keep):
    reward, group = torch.tensor(rewards, dtype=torch.float32), torch.tensor([0, 1, 2] * 4)
    weight = best_of_group(reward, group, keep)
    for number in range(3):
        mine, kept = reward[group == number], weight[group == number] > 0
        assert int(kept.sum()) == keep
        assert mine[kept].min() >= mine[~kept].max() if keep < 4 else True
    torch.testing.assert_close(weight[weight > 0], torch.full((3 * keep,), 4 / keep))
    assert float(weight.mean()) == pytest.approx(1)


def test_a_group_must_have_something_to_reject():
    with pytest.raises(ValueError, match="a group of 2 rows cannot keep its best 3"):
        best_of_group(torch.zeros(4), torch.tensor([0, 0, 1, 1]), 3)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        BestOfGroup(keep=0)


def test_extremes_are_the_best_and_the_worst_of_each_group():
    reward = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    group = torch.tensor([0, 0, 0, 0, 0, 7, 7, 7, 7])
    assert extremes(reward, group, 1).tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 1]
    assert extremes(reward, group, 2).tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="a group of 5 rows has no best 3 and worst 3"):
        extremes(reward, group, 3)
    one = torch.ones(1, 9, dtype=torch.bool)
    outcome = Outcome(reward[None], one, ~one, one, group, group)
    whole, some = (GroupNormalized(scale="none", extremes=keep)(outcome, {}).advantage[0] for keep in (None, 1))
    assert some.tolist() == pytest.approx([2, -2, 0, 0, 0, 0, 0, 0, 0])
    assert whole.tolist() == pytest.approx([2, -2, 1, -1, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="extremes must be at least 1 or null, got 0"):
        GroupNormalized(extremes=0)


def test_tied_groups():
    group = torch.tensor([3, 3, 5, 5, 9, 9])
    assert tied_fraction(torch.tensor([1.0, 1.0, 0.0, 2.0, 4.0, 4.0]), group) == pytest.approx(2 / 3)
    assert tied_fraction(torch.arange(6.0), group) == 0
