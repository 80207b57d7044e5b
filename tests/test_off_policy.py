"""Off-policy learning: replay, critics, operators, the loop."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import MLPDenoiser, PointMass, toy_policy

from diffalign.algorithms import DSRL, EXPO, Rerank, ResidualRL
from diffalign.diffusion import ODE, FlowSDE, Schedule
from diffalign.diffusion.trajectories import settled
from diffalign.policy.actors import BoundedActor
from diffalign.policy.improved import ImprovedPolicy
from diffalign.policy.normalize import Normalizer
from diffalign.policy.operators import OnActions, OnNoise
from diffalign.rl.ensembles import QEnsemble, expectile_loss, follow, pessimistic
from diffalign.rl.replay import Replay, Transitions, mixed, transitions
from diffalign.rl.rollouts import Rollout
from diffalign.train import checkpoint, off_policy
from diffalign.train.off_policy_pieces import Learning, OffPolicy

FAST = Learning(batch_size=64, warmup_decisions=150, critic_only_updates=100, critic_learning_rate=3e-3, discount=0.9,
                actor_learning_rate=3e-3, critic_hidden=(32, 32), actor_hidden=(32,), heads=3, target_rate=0.02,
                temperature=0.02, updates_per_decision=0.5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def toy_base(seed=0, kernel=None):
    torch.manual_seed(seed)
    return toy_policy(MLPDenoiser(), kernel or FlowSDE(), steps=4)


def setup(algorithm, seed=0, base=None):
    base, pieces = base or toy_base(seed), algorithm.compose()
    modules = off_policy.build_modules(pieces, base, Normalizer(1), seed=seed)
    state = off_policy.build_state(pieces, {**modules, "policy": base.denoiser}, seed=seed)
    return pieces, off_policy.improved_policy(pieces, base, modules), state


# --- replay ---------------------------------------------------------------------------------------------------------


def random_rollout(seed, horizon=5, episodes=3):
    """A rollout whose base signal at (h, b) is 100 h + b and whose next observation is that of the next decision."""
    g = generator(seed)
    valid = torch.ones(horizon, episodes, dtype=torch.bool)
    terminated, truncated = torch.zeros_like(valid), torch.zeros_like(valid)
    for b in range(episodes):
        end = int(torch.randint(horizon, (1,), generator=g))
        (terminated if torch.rand(1, generator=g) < 0.5 else truncated)[end, b] = True
        valid[end + 1 :, b] = False
    grid = 100.0 * torch.arange(horizon)[:, None] + torch.arange(episodes)
    cond, after = {"obs": grid.reshape(-1, 1)}, {"obs": (grid + 100).reshape(-1, 1)}
    signals = {"base": grid.reshape(-1, 1), "chosen": grid.reshape(-1, 1) + 0.5}
    reward = torch.randn(horizon, episodes, generator=g) * valid
    number = torch.arange(episodes)
    return Rollout(settled(grid.reshape(-1, 1), cond), reward, terminated, truncated, valid, after, number, number, {},
                   signals)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6))
def test_n_step_returns_equal_a_walk_along_each_episode(seed, steps):
    rollout, gamma = random_rollout(seed), 0.9
    rows = transitions(rollout, lambda cond: {"base": -cond["obs"]}, gamma=gamma, steps=steps)
    horizon, episodes = rollout.reward.shape
    found = 0
    for h in range(horizon):
        for b in range(episodes):
            if not rollout.valid[h, b]:
                continue
            total, discount, at = 0.0, 1.0, h
            while True:
                total += discount * float(rollout.reward[at, b])
                discount *= gamma
                ended = bool(rollout.terminated[at, b] | rollout.truncated[at, b])
                if ended or at - h + 1 == steps:
                    break
                at += 1
            assert float(rows.reward[found]) == pytest.approx(total, abs=1e-5)
            expected = 0.0 if bool(rollout.terminated[at, b]) else discount
            assert float(rows.discount[found]) == pytest.approx(expected, abs=1e-6)
            assert float(rows.next_cond["obs"][found, 0]) == 100 * (at + 1) + b
            following = -(100 * (at + 1) + b) if ended else 100 * (at + 1) + b
            assert float(rows.next_signals["base"][found, 0]) == following
            assert float(rows.signals["base"][found, 0]) == 100 * h + b
            found += 1
    assert found == len(rows.reward)


def some_rows(count, value=0.0, source=0.0):
    full = torch.full((count,), value)
    return Transitions({"obs": full[:, None]}, full[:, None], full, full, {"obs": full[:, None]}, {}, {},
                       torch.full((count,), source))


def test_the_ring_keeps_the_newest_rows():
    replay = Replay({}, "replay", capacity=5)
    for value in range(4):
        replay.add(some_rows(2, float(value)))
    assert len(replay) == 5
    held = sorted(replay.store["replay/rows/reward"].tolist())
    assert held == [1.0, 2.0, 2.0, 3.0, 3.0]
    with pytest.raises(ValueError, match="6 decisions do not fit a replay of 5"):
        replay.add(some_rows(6))


def test_storage_grows_with_what_is_stored():
    replay = Replay({}, "replay", capacity=1000)
    for value in range(6):
        replay.add(some_rows(10, float(value)))
        assert len(replay.store["replay/rows/reward"]) <= 2 * len(replay)
    assert replay.store["replay/rows/reward"][:60].tolist() == [float(i // 10) for i in range(60)]


def test_only_stored_rows_are_sampled():
    replay = Replay({}, "replay", capacity=100)
    with pytest.raises(ValueError, match="empty"):
        replay.sample(1, generator())
    replay.add(some_rows(3, 7.0))
    assert set(replay.sample(200, generator())["reward"].tolist()) == {7.0}


@pytest.mark.parametrize(("online", "demos", "expected"), [(1000, 3, 16), (3, 1000, 16), (0, 5, 32), (5, 0, 0)])
def test_mixing_is_exact_at_any_sizes(online, demos, expected):
    store = {}
    first, second = Replay(store, "replay", 2000), Replay(store, "demonstrations", 2000)
    if online:
        first.add(some_rows(online, source=0.0))
    if demos:
        second.add(some_rows(demos, source=1.0))
    assert int(mixed(first, second, 32, 0.5, generator()).source.sum()) == expected


def test_a_replay_refuses_other_columns():
    replay = Replay({}, "replay", 10)
    replay.add(some_rows(2))
    with pytest.raises(ValueError, match="operator changed"):
        replay.add(replace(some_rows(2), signals={"base": torch.zeros(2, 1)}))


# --- critics --------------------------------------------------------------------------------------------------------


def test_each_head_is_an_mlp_of_its_own():
    torch.manual_seed(0)
    critic = QEnsemble(3, (2,), 2, (5, 4), normalizer=Normalizer(2))
    obs, action = torch.randn(6, 2), torch.randn(6, 2)
    found = critic({"obs": obs}, action)
    x = torch.cat([obs, action], 1)
    for k in range(3):
        hidden = x
        for layer in range(2):
            linear, norm = critic.net[3 * layer], critic.net[3 * layer + 1]
            hidden = hidden @ linear.weight[k] + linear.bias[k]
            hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            hidden = (hidden * norm.scale[k] + norm.shift[k]).relu()
        expected = (hidden @ critic.net[6].weight[k] + critic.net[6].bias[k])[:, 0]
        torch.testing.assert_close(found[k], expected, rtol=1e-5, atol=1e-6)
    candidates = torch.randn(6, 4, 2)
    scored = critic.score({"obs": obs}, candidates)
    for m in range(4):
        torch.testing.assert_close(scored[:, :, m], critic({"obs": obs}, candidates[:, m]), rtol=1e-5, atol=1e-6)


def test_pessimism_is_the_minimum_over_random_pairs():
    values = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 3.0]])
    g = generator()
    drawn = {tuple(pessimistic(values, 2, g).tolist()) for _ in range(100)}
    assert drawn == {(1.0, 4.0), (1.0, 3.0), (2.0, 3.0)}
    assert pessimistic(values, 3, g).tolist() == [1.0, 3.0]
    assert pessimistic(values[:1], 2, g).tolist() == [1.0, 5.0]


def test_the_expectile_of_two_points():
    """argmin of tau (b - v)^2 + (1 - tau) (v - a)^2 for a < v < b is (1 - tau) a + tau b."""
    value = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.SGD([value], 0.1)
    for _ in range(120):
        optimizer.zero_grad()
        expectile_loss(torch.tensor([1.0, 3.0]) - value, 0.8).mean().backward()
        optimizer.step()
    assert float(value.detach()) == pytest.approx(0.2 * 1 + 0.8 * 3, abs=1e-4)


def test_polyak_moves_by_the_rate():
    slow, fast = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    expected = 0.9 * slow.weight.detach() + 0.1 * fast.weight.detach()
    follow(slow, fast, 0.1)
    torch.testing.assert_close(slow.weight.detach(), expected)


# --- actor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [None, 0.4])
def test_the_actors_density_is_that_of_a_squashed_gaussian(std):
    torch.manual_seed(1)
    actor = BoundedActor((2,), 1, (8,), takes_action=False, std=std)
    for parameter in actor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    cond = {"obs": torch.randn(50, 1)}
    u, log_prob = actor(cond, None, generator=generator())
    output = actor.net(actor.normalizer.normalize(cond["obs"]))
    mean, log_std = actor._moments(output)
    base = torch.distributions.Normal(mean, log_std.exp())
    expected = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform()).log_prob(u)
    torch.testing.assert_close(log_prob, expected.sum(1), rtol=1e-3, atol=1e-3)
    assert bool((u.abs() < 1).all())


def test_a_fresh_actor_outputs_zero_and_needs_its_inputs():
    actor = BoundedActor((2,), 1, takes_action=True, std=0.3)
    u, _ = actor({"obs": torch.randn(4, 1)}, torch.randn(4, 2), generator=None)
    assert u.abs().max() == 0
    with pytest.raises(ValueError, match="got none"):
        actor({"obs": torch.zeros(1, 1)}, None, generator=None)
    with pytest.raises(ValueError, match="std must be positive"):
        BoundedActor((2,), 1, takes_action=False, std=0.0)


# --- operators ------------------------------------------------------------------------------------------------------


class Ranks:
    """A critic of one head that prefers the candidate with the largest first number."""

    def score(self, cond, candidates):
        return candidates[None, ..., 0]


def bounded_base():
    return replace(toy_base(), kernel=ODE(), clip_x0=1.0)


def test_a_fresh_residual_is_the_base_bit_for_bit():
    base, cond = bounded_base(), {"obs": torch.randn(7, 1)}
    actor = BoundedActor((2,), 1, takes_action=True, std=0.3)
    policy = ImprovedPolicy(base, OnActions(), actor, Ranks())
    expected = base.act(cond, generator=generator(3)).action
    assert torch.equal(policy.act(cond, generator=generator(3)).action, expected)
    assert torch.equal(policy.with_mode("base").act(cond, generator=generator(3)).action, expected)
    moved = policy.with_mode("explore").act(cond, generator=generator(3)).action
    assert 0 < float((moved - expected).abs().max()) <= 0.1 + 1e-6


def test_noise_from_the_prior_is_the_base_bit_for_bit():
    base, cond, operator = bounded_base(), {"obs": torch.randn(7, 1)}, OnNoise(box=1.5)
    w = operator.prior(base, cond, generator(5))
    assert w.abs().max() <= 1.5
    assert torch.equal(operator.execute(base, cond, w), base.act(cond, generator=generator(0), noise=w).action)
    short = base.with_sampler(ODE(), Schedule(steps=2)).act(cond, generator=generator(0), noise=w).action
    assert torch.equal(OnNoise(steps=2).execute(base, cond, w), short)
    assert not torch.equal(short, operator.execute(base, cond, w))
    seen = OnNoise(box=1.5, scores="actions").fallback(base, cond, {}, generator=generator(5))
    assert torch.equal(seen.value[:, 0], operator.execute(base, cond, w))


def test_reranking_takes_the_critics_favourite_of_the_base_samples():
    base, cond = replace(toy_base(), clip_x0=1.0), {"obs": torch.randn(7, 1)}
    operator = OnActions(samples=6, scale=None, keep_base=True)
    policy = ImprovedPolicy(base, operator, None, Ranks())
    decision = policy.act(cond, generator=generator(3))
    samples = decision.signals["base"]
    assert samples.shape == (7, 6, 2)
    best = samples[..., 0].argmax(1)
    assert torch.equal(decision.action, samples[torch.arange(7), best])
    assert torch.equal(decision.signals["chosen"], decision.action)


def test_edits_stand_beside_the_samples_they_correct():
    base, cond = replace(toy_base(), clip_x0=1.0), {"obs": torch.randn(5, 1)}
    torch.manual_seed(0)
    actor = BoundedActor((2,), 1, takes_action=True)
    operator = OnActions(samples=3, scale=0.2, keep_base=True)
    signals = operator.ask(base, cond, generator=generator())
    found = operator.candidates(base, actor, cond, signals, generator=generator(1))
    assert torch.equal(found.value[:, :3], signals["base"])
    assert float((found.value[:, 3:] - signals["base"]).detach().abs().max()) <= 0.2 + 1e-6
    assert found.value.abs().max() <= 1
    assert bool((found.log_prob[:, :3] == 0).all())
    u, log_prob = actor({"obs": cond["obs"].repeat_interleave(3, 0)}, signals["base"].flatten(0, 1),
                        generator=generator(1))
    torch.testing.assert_close(found.log_prob[:, 3:].flatten(), log_prob)
    torch.testing.assert_close(found.value[:, 3:], (signals["base"] + 0.2 * u.reshape(5, 3, 2)).clamp(-1, 1))


@pytest.mark.parametrize(("options", "message"), [
    ({"scale": 0.0}, "scale must lie in"), ({"scale": 2.5}, "scale must lie in"), ({"samples": 0}, "samples must be"),
    ({"samples": 1, "scale": None, "keep_base": True}, "samples to choose from"),
    ({"samples": 4, "scale": None}, "samples to choose from")])
def test_operators_refuse_numbers_that_make_no_policy(options, message):
    with pytest.raises(ValueError, match=message):
        OnActions(**options)


# --- the loop -------------------------------------------------------------------------------------------------------

TABLE = {
    "dsrl-sac": DSRL(learning=FAST),
    "dsrl-na": DSRL(variant="na", learning=FAST),
    "residual-td3": ResidualRL(scale=0.8, learning=replace(FAST, actor_std=0.3)),
    "residual-sac": ResidualRL(scale=0.8, learning=FAST),
    "residual-n-step": ResidualRL(scale=0.8, learning=replace(FAST, actor_std=0.3, n_step=3)),
    "expo": EXPO(scale=0.5, learning=FAST),
    "rerank": Rerank(learning=replace(FAST, backup="candidates")),
    "rerank-iql": Rerank(learning=replace(FAST, backup="expectile"), samples=8),
}


@pytest.mark.parametrize("algorithm", TABLE.values(), ids=TABLE)
def test_the_point_mass_improves_and_the_base_stays(algorithm):
    base = replace(toy_base(), clip_x0=1.0)
    pieces, policy, state = setup(algorithm, base=base)
    weights = copy.deepcopy(base.denoiser.state_dict())
    before = success(policy.with_mode("base"))
    loop = off_policy.optimize(pieces, policy, PointMass(episodes=16), state)
    for _ in range(14):
        next(loop)
    assert before < 0.35
    assert success(policy) > before + 0.35
    for name, tensor in base.denoiser.state_dict().items():
        assert torch.equal(tensor, weights[name])


def success(policy):
    return PointMass(episodes=200).collect(policy, generator=generator(77)).stats["success_rate"]


def test_offline_training_needs_no_source():
    """A critic learned from the base's own decisions makes re-ranking better without a further step."""
    base = replace(toy_base(), clip_x0=1.0)
    algorithm = Rerank(learning=replace(FAST, offline_updates=600, backup="expectile"))
    pieces, policy, state = setup(algorithm, base=base)
    data = Replay(state.statistics, "demonstrations", 5000)
    rollout = PointMass(episodes=300).collect(policy.with_mode("base"), generator=generator(1))
    learner = off_policy._Learner(pieces.learning, policy, state)
    data.add(transitions(rollout, learner.ask, gamma=FAST.discount, steps=1).without_signals())
    before = success(policy.with_mode("base"))
    next(off_policy.optimize(pieces, policy, None, state, demonstrations=data))
    assert success(policy) > before + 0.3


def test_the_cache_equals_asking_a_frozen_base_again():
    base = replace(toy_base(), clip_x0=1.0)
    pieces, policy, state = setup(EXPO(learning=FAST), base=base)
    cond = {"obs": torch.randn(6, 1)}
    cached = policy.operator.ask(base, cond, generator=generator(4))
    loop = off_policy.optimize(pieces, policy, PointMass(episodes=16), state)
    next(loop), next(loop)
    again = policy.operator.ask(base, cond, generator=generator(4))
    assert torch.equal(cached["base"], again["base"])


def test_what_was_chosen_is_what_was_executed_and_the_next_base_action_is_the_one_acted_on():
    base = replace(toy_base(), clip_x0=1.0)
    _, policy, _ = setup(ResidualRL(learning=replace(FAST, actor_std=0.3)), base=base)
    rollout = PointMass(episodes=4).collect(policy.with_mode("explore"), generator=generator(2))
    assert torch.equal(rollout.signals["chosen"], rollout.trajectory.sample)
    correction = rollout.signals["chosen"] - rollout.signals["base"][:, 0]
    assert float(correction.abs().max()) <= 0.2 + 1e-6
    rows = transitions(rollout, lambda cond: {"base": torch.full((len(cond["obs"]), 1, 2), 9.0)}, gamma=0.9, steps=1)
    going = ~(rollout.terminated | rollout.truncated) & rollout.valid
    here = torch.nonzero(going[0]).flatten()
    torch.testing.assert_close(rows.next_signals["base"][here], rollout.signals["base"][4 + here])


@pytest.mark.parametrize("algorithm", [DSRL(variant="na", learning=FAST), EXPO(learning=FAST), Rerank(learning=FAST)],
                         ids=["dsrl-na", "expo", "rerank"])
def test_resume_is_bit_exact_with_its_replay(tmp_path, algorithm):
    base = replace(toy_base(), clip_x0=1.0)
    pieces, policy, state = setup(algorithm, base=base)
    loop = off_policy.optimize(pieces, policy, PointMass(episodes=16), state)
    for _ in range(3):
        next(loop)
    saved = checkpoint.save(tmp_path, state)
    expected = [next(loop).metrics for _ in range(1)]
    pieces, policy, fresh = setup(algorithm, seed=5, base=replace(toy_base(seed=5), clip_x0=1.0))
    checkpoint.load(saved, fresh)
    resumed = off_policy.optimize(pieces, policy, PointMass(episodes=16), fresh)
    assert [next(resumed).metrics for _ in range(1)] == expected


def test_the_critic_target_is_the_bellman_target():
    """One batch, one head: the loss equals mean (Q - (r + discount Q'))^2 with Q' at the actor's action."""
    pieces, policy, state = setup(ResidualRL(learning=replace(FAST, heads=1, actor_std=1e-6)))
    learner = off_policy._Learner(pieces.learning, policy, state)
    batch = Transitions({"obs": torch.randn(5, 1)}, torch.rand(5, 2), torch.rand(5), torch.full((5,), 0.7),
                        {"obs": torch.randn(5, 1)}, {"base": torch.rand(5, 1, 2)}, {"base": torch.rand(5, 1, 2)},
                        torch.zeros(5))
    following = state.modules["critic_target"](batch.next_cond, batch.next_signals["base"][:, 0])[0]
    target = batch.reward + 0.7 * following
    expected = ((state.modules["critic"](batch.cond, batch.chosen)[0] - target) ** 2).mean().detach()
    metrics = {}
    learner._critic_loss(batch, metrics)
    assert metrics["loss/critic"] == pytest.approx(float(expected), rel=1e-4)
    clipped = off_policy._Learner(replace(pieces.learning, value_range=(0.0, 0.1)), policy, state)
    clipped._critic_loss(batch, metrics)
    assert metrics["q/target"] <= 0.1 + 1e-6


def test_the_temperature_rises_when_the_actor_is_too_certain():
    for target, rises in ((5.0, True), (-50.0, False)):
        algorithm = DSRL(learning=replace(FAST, target_entropy=target, critic_only_updates=0, warmup_decisions=1))
        pieces, policy, state = setup(algorithm)
        next(off_policy.optimize(pieces, policy, PointMass(episodes=16), state))
        alpha = float(state.modules["temperature"].log_alpha.detach().exp())
        assert (alpha > FAST.temperature) is rises


def test_the_actors_loss_leaves_the_critic_alone():
    pieces, policy, state = setup(EXPO(learning=FAST))
    learner = off_policy._Learner(pieces.learning, policy, state)
    base = torch.rand(5, 4, 2)
    batch = Transitions({"obs": torch.randn(5, 1)}, base[:, 0], torch.rand(5), torch.rand(5),
                        {"obs": torch.randn(5, 1)}, {"base": base}, {"base": base}, torch.zeros(5))
    learner._actor_loss(batch, {}).backward()
    assert all(p.grad is None for p in state.modules["critic"].parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in state.modules["actor"].parameters())


@pytest.mark.parametrize(("options", "message"), [
    ({"n_step": 0}, "n_step must be at least 1"), ({"discount": 1.5}, "discount must lie in"),
    ({"critic_learning_rate": 0.0}, "critic_learning_rate must be positive"),
    ({"demonstration_fraction": 1.5}, "demonstration_fraction must lie in")])
def test_learning_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Learning(**options)


def test_pieces_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="scores noise; use backup candidates"):
        OffPolicy(operator=OnNoise(), learning=Learning(backup="expectile"))
    with pytest.raises(ValueError, match="box must be positive"):
        DSRL(box=0.0).compose()
    with pytest.raises(ValueError, match="steps must be at least 1 or null"):
        DSRL(steps=0).compose()
    pieces, policy, state = setup(DSRL(learning=FAST))
    demos = Replay(state.statistics, "demonstrations", 10)
    with pytest.raises(ValueError, match="offline training needs demonstrations"):
        next(off_policy.optimize(pieces, policy, None, state, demonstrations=demos))
    demos.add(some_rows(2))
    with pytest.raises(ValueError, match="set the operator's scores to actions"):
        next(off_policy.optimize(pieces, policy, PointMass(), state, demonstrations=demos))
    assert math.isfinite(state.step)


def test_only_those_who_need_the_bases_word_store_it():
    greedy = Rerank(learning=replace(FAST, backup="candidates"))
    for algorithm, stored in ((Rerank(learning=replace(FAST, backup="expectile")), False), (greedy, True),
                              (ResidualRL(learning=FAST), True)):
        pieces, policy, state = setup(algorithm)
        next(off_policy.optimize(pieces, policy, PointMass(episodes=4), state))
        assert any("signals" in name for name in state.statistics) is stored
