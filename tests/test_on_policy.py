"""The on-policy loop: what it computes, what pulls in which direction, what it leaves alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from toys import MLPDenoiser, PointMass, PromptBandit, toy_policy

from diffalign.algorithms import AWM, DDPO, DPPO, ORW, DiffusionNFT, FlowGRPO
from diffalign.diffusion import DDPM, ODE, FlowSDE, TrainedSteps
from diffalign.policy.injection import noisy
from diffalign.rl.advantages import GAE, BestOfGroup, GroupNormalized
from diffalign.rl.critics import ValueNet
from diffalign.rl.likelihoods import Matching, Transition
from diffalign.rl.rollouts import Rollout, image_rollout
from diffalign.rl.surrogates import PPOClip
from diffalign.train import losses, on_policy
from diffalign.train.on_policy import OnPolicy, Optimization, optimize
from diffalign.train.state import TrainState, frozen_copy


class Constant:
    """Wraps a source and changes its rollouts."""

    def __init__(self, source, change):
        self.source, self.change = source, change

    def collect(self, policy, *, generator):
        return self.change(self.source.collect(policy, generator=generator))


def flat_reward(rollout):
    return replace(rollout, reward=torch.zeros_like(rollout.reward))


def setup(kernel, prediction="flow", *, seed=0, critic=False, rates=1e-3, ema_decay=None, noise=None, **options):
    """(policy, state) of a toy."""
    torch.manual_seed(seed)
    if prediction == "eps":
        options.setdefault("clip_x0", 2.0)  # an untrained eps network divides by alpha = 0.03 at t = 1
    denoiser = MLPDenoiser(prediction=prediction)
    if noise is not None:
        denoiser = noisy(denoiser, (2,), 1, noise, key="obs", seed=seed)
    policy = toy_policy(denoiser, kernel, **options)
    modules = {"policy": policy.denoiser} | ({"critic": ValueNet(1, (16,))} if critic else {})
    return policy, TrainState.create(modules, dict.fromkeys(modules, rates), ema_decay=ema_decay, seed=seed)


def parameters(state, role="policy"):
    return torch.cat([p.detach().flatten().clone() for p in state.modules[role].parameters()])


def run(pieces, policy, source, state, iterations, **options):
    loop = optimize(pieces, policy, source, state, **options)
    return [next(loop).metrics for _ in range(iterations)]


def demonstrations(generator):
    return torch.full((64, 2), 0.5) + 0.05 * torch.randn(64, 2, generator=generator), {"obs": torch.zeros(64, 1)}


def test_microbatches_do_not_change_the_result():
    """One microbatch or many: equal parameters, with a critic, unexecuted decisions, demonstrations and a KL."""
    plan = Optimization(epochs=1, minibatches=2)
    results = []
    for rows in (10_000, 50):
        policy, state = setup(DDPM(min_std=0.1), "eps", critic=True)
        reference = frozen_copy(policy.denoiser)
        pieces = DPPO(optimization=replace(plan, microbatch_rows=rows), behavior_cloning=0.3,
                      reference_kl=0.1).compose()
        source = PointMass(episodes=8)
        metrics = run(pieces, policy, source, state, 2, reference=reference, demonstrations=demonstrations)
        results.append((parameters(state), parameters(state, "critic"), metrics[1]))
    for one, many in zip(results[0][:2], results[1][:2]):
        torch.testing.assert_close(many, one, rtol=0, atol=1e-6)
    for name in ("loss", "kl/reference", "value/loss", "clip/high", "grad_norm/policy"):
        assert results[1][2][name] == pytest.approx(results[0][2][name], rel=1e-3, abs=1e-5)


def test_a_seed_decides_everything():
    runs = []
    for seed in (0, 0, 1):
        policy, state = setup(FlowSDE(), trained=TrainedSteps(size=2))
        state.generator.manual_seed(seed)
        runs.append((run(FlowGRPO().compose(), policy, PromptBandit(), state, 2), parameters(state)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_epochs_times_minibatches_optimizer_steps():
    policy, state = setup(FlowSDE(), ema_decay=0.9)
    run(FlowGRPO(optimization=Optimization(epochs=3, minibatches=4)).compose(), policy, PromptBandit(), state, 2)
    assert {int(entry["step"]) for entry in state.optimizer.state_dict()["state"].values()} == {24}
    assert state.ema.updates == 24
    assert state.step == 2


def test_minibatches_are_a_partition_of_the_rows(generator):
    parts = on_policy._minibatches(11, 3, generator)
    assert [len(part) for part in parts] == [4, 4, 3]
    assert sorted(torch.cat(parts).tolist()) == list(range(11))
    assert torch.cat(parts).tolist() != list(range(11))


def test_decisions_that_were_not_executed_do_not_count():
    """Garbage in their rewards, values and log-probs leaves every parameter bit-equal."""
    def spoil(rollout):
        gone = ~rollout.valid
        assert gone.any()
        reward = torch.where(gone, torch.tensor(1e6), rollout.reward)
        log_prob = rollout.trajectory.log_prob.masked_fill(gone.flatten()[:, None], -1e6)
        return replace(rollout, reward=reward, trajectory=replace(rollout.trajectory, log_prob=log_prob))

    results = []
    for change in (lambda rollout: rollout, spoil):
        policy, state = setup(DDPM(min_std=0.5), "eps", critic=True)
        source = Constant(PointMass(episodes=64), change)
        run(DPPO(optimization=Optimization(epochs=2, minibatches=2)).compose(), policy, source, state, 2)
        results.append(torch.cat([parameters(state), parameters(state, "critic")]))
    assert torch.equal(*results)


@pytest.mark.parametrize("truncated", [True, False])
def test_the_value_target_bootstraps_after_a_time_out_only(truncated):
    """V(obs) = obs; reward 1 at obs 2, then obs 5; gamma 0.9. Target 1 + 4.5 or 1; V = 2."""
    class OneDecision:
        def collect(self, policy, *, generator):
            trajectory = policy.act({"obs": torch.full((4, 1), 2.0)}, generator=generator).trajectory
            flag = torch.full((1, 4), truncated)
            return Rollout(trajectory, torch.ones(1, 4), ~flag, flag, torch.ones_like(flag),
                           {"obs": torch.full((4, 1), 5.0)}, torch.arange(4), torch.arange(4), {})

    policy, state = setup(DDPM(min_std=0.1), "eps", critic=True)
    critic = state.modules["critic"]
    critic.net = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with torch.no_grad():
        critic.net[0].weight.fill_(1.0)
        critic.net[0].bias.fill_(0.0)
    pieces = DPPO(advantage=GAE(gamma=0.9, whiten=False), optimization=Optimization()).compose()
    (metrics,) = run(pieces, policy, OneDecision(), state, 1)
    assert metrics["value/loss"] == pytest.approx((5.5 - 2) ** 2 if truncated else (1 - 2) ** 2)


def test_a_single_trained_step_trains():
    """robot_peers D1: with K' = 1 DPPO's clip coefficient is 0/0 and the loss NaN."""
    policy, state = setup(DDPM(min_std=0.1), "eps", critic=True, trained=TrainedSteps(start=-1))
    before = parameters(state)
    surrogate = PPOClip(low=0.01, high=0.01, unit="per_dim", step_start=0.1)
    metrics = run(DPPO(surrogate=surrogate).compose(), policy, PointMass(), state, 2)
    assert all(abs(value) < 1e6 for line in metrics for value in line.values())
    assert not torch.equal(parameters(state), before)


def test_critic_warmup_freezes_the_policy():
    policy, state = setup(DDPM(min_std=0.1), "eps", critic=True)
    start, critic = parameters(state), parameters(state, "critic")
    pieces = DPPO(optimization=Optimization(critic_warmup=2, weight_decay=0.1)).compose()
    loop = optimize(pieces, policy, PointMass(), state)
    for iteration in (1, 2, 3):
        metrics = next(loop).metrics
        assert torch.equal(parameters(state), start) == (iteration < 3)
        assert ("clip/high" in metrics) == (iteration == 3)
        assert not torch.equal(parameters(state, "critic"), critic)


def test_behavior_cloning_pulls_to_the_demonstrations(generator):
    policy, state = setup(DDPM(min_std=0.1), "eps", rates=2e-2)
    pieces = OnPolicy(likelihood=Transition(), advantage=GroupNormalized(), surrogate=PPOClip(), behavior_cloning=1.0,
                      optimization=Optimization(epochs=2))
    source = Constant(PromptBandit(images=2), flat_reward)
    metrics = run(pieces, policy, source, state, 60, demonstrations=demonstrations)
    assert metrics[-1]["behavior_cloning"] < 0.5 * metrics[0]["behavior_cloning"]
    sample = policy.act({"obs": torch.zeros(300, 1)}, generator=generator).action
    assert sample.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.3)


@pytest.mark.parametrize(("options", "metric"), [({"reference_kl": 1.0}, "kl/reference"),
                                                 ({"reference_velocity": 1.0}, "velocity/reference")])
def test_reference_terms_pull_back(options, metric):
    """No reward signal and a displaced policy: the penalty must shrink; without its weight it would stay."""
    policy, state = setup(FlowSDE(), rates=1e-2)
    reference = frozen_copy(policy.denoiser)
    with torch.no_grad():
        policy.denoiser.net[-1].bias.add_(1.0)
    source = Constant(PromptBandit(), flat_reward)
    metrics = run(FlowGRPO(**options).compose(), policy, source, state, 40, reference=reference)
    assert metrics[0][metric] > 0.3
    assert metrics[-1][metric] < 0.2 * metrics[0][metric]
    assert not any(p.requires_grad or p.grad is not None for p in reference.parameters())


def test_the_average_pulls_back():
    policy, state = setup(ODE(), rates=1e-2, ema_decay=0.999)
    state.ema.updates = 100_000  # far beyond its warm-up
    with torch.no_grad():
        policy.denoiser.net[-1].bias.add_(1.0)
    source = Constant(PromptBandit(), flat_reward)
    pieces = AWM(ema_velocity=1.0, optimization=Optimization(ema_decay=0.999)).compose()
    metrics = run(pieces, policy, source, state, 40)
    assert metrics[0]["velocity/ema"] == pytest.approx(1.0, abs=1e-3)
    assert metrics[-1]["velocity/ema"] < 0.2


def test_the_average_that_anchors_is_that_of_before_the_update():
    """It is scored in the policy's own network, which has its live weights again afterwards."""
    policy, state = setup(ODE(), ema_decay=0.5)
    pieces = AWM(ema_velocity=1.0, optimization=Optimization(ema_decay=0.5)).compose()
    trajectory = policy.act({"obs": torch.zeros(4, 1)}, generator=torch.Generator().manual_seed(0)).trajectory
    examples = pieces.likelihood.examples(policy, trajectory, torch.ones(4), decisions=torch.arange(4),
                                          generator=state.generator)
    rows = examples.rows(torch.arange(4))
    score = losses.anchors(pieces, policy, state, None)["ema"]
    before, start = score(rows).velocity, parameters(state)
    with torch.no_grad():
        policy.denoiser.net[-1].bias.add_(1.0)
    state.ema.update(policy.denoiser)
    live = parameters(state)
    assert torch.equal(score(rows).velocity, before)
    assert torch.equal(parameters(state), live)
    assert not torch.equal(live, start)


def test_metrics_say_what_happened():
    policy, state = setup(FlowSDE(), rates=1e-2)
    pieces = FlowGRPO(optimization=Optimization(epochs=4), reference_velocity=0.1).compose()
    first, second = run(pieces, policy, PromptBandit(), state, 2, reference=frozen_copy(policy.denoiser))
    assert first["ratio_drift"] < 1e-4
    assert second["ratio_drift"] < 1e-4
    assert first["clip/high"] > 0.1  # a clip of 1e-4 per dimension binds at once
    assert first["kl/old"] > 0
    assert second["velocity/reference"] > 0
    assert first["advantage/zero_fraction"] == 0


def test_reward_metrics_are_those_of_the_returns():
    seen = []
    policy, state = setup(FlowSDE())
    source = Constant(PromptBandit(), lambda rollout: seen.append(rollout.reward[0]) or rollout)
    (metrics,) = run(FlowGRPO().compose(), policy, source, state, 1)
    assert metrics["reward/mean"] == pytest.approx(seen[0].mean().item())
    assert metrics["reward/std"] == pytest.approx(seen[0].std(correction=0).item())


def test_a_single_environment_has_finite_metrics():
    policy, state = setup(DDPM(min_std=0.1), "eps", critic=True)
    (metrics,) = run(DPPO().compose(), policy, PointMass(episodes=1), state, 1)
    assert metrics["reward/std"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_negative_and_positive_advantages_move_the_density_their_way():
    """One update raises log p of rewarded rows and lowers that of punished ones."""
    policy, state = setup(FlowSDE(), rates=1e-3)
    kept = []
    source = Constant(PromptBandit(prompts=1), lambda r: kept.append(r) or r)
    pieces = OnPolicy(likelihood=Transition(), advantage=GroupNormalized(), surrogate=PPOClip(low=9.0, high=9.0),
                      optimization=Optimization())
    run(pieces, policy, source, state, 1)
    rollout = kept[0]
    data = on_policy.Outcome(rollout.reward, rollout.terminated, rollout.truncated, rollout.valid, rollout.group,
                             rollout.prompt)
    advantage = GroupNormalized()(data, {}).advantage
    examples = Transition().examples(policy, rollout.trajectory, advantage.flatten(), generator=state.generator,
                                     decisions=torch.arange(advantage.numel()))
    rows = examples.rows(torch.arange(len(examples)))
    change = Transition().score(policy, rows).log_prob - rows.old_log_prob
    assert (change * rows.advantage).mean() > 0
    assert change[rows.advantage > 1].mean() > change[rows.advantage < -1].mean()


def test_an_untouched_copy_of_everything_gives_the_same_iteration():
    """The loop keeps nothing outside policy, state and source."""
    policy, state = setup(FlowSDE())
    run(DDPO().compose(), policy, PromptBandit(), state, 1)
    twin = copy.deepcopy(policy.denoiser)
    twin_policy = replace(policy, denoiser=twin)
    twin_state = TrainState.create({"policy": twin}, {"policy": 1e-3}, seed=9)
    twin_state.optimizer.load_state_dict(state.optimizer.state_dict())
    twin_state.statistics = dict(state.statistics)
    twin_state.generator.set_state(state.generator.get_state())
    (one,) = run(DDPO().compose(), policy, PromptBandit(), state, 1)
    (two,) = run(DDPO().compose(), twin_policy, PromptBandit(), twin_state, 1)
    assert one == two


def test_image_rollout_is_one_terminal_decision(generator):
    policy = toy_policy(MLPDenoiser(), FlowSDE())
    trajectory = policy.act({"obs": torch.zeros(3, 1)}, generator=generator).trajectory
    rollout = image_rollout(trajectory, torch.arange(3.0), torch.arange(3), torch.arange(3), {"a": 1.0})
    assert rollout.reward.shape == (1, 3)
    assert rollout.terminated.all()
    assert rollout.valid.all()
    assert not rollout.truncated.any()
    with pytest.raises(ValueError, match=r"trajectory has 3 rows, reward \(1, 4\) needs 4"):
        image_rollout(trajectory, torch.arange(4.0), torch.arange(4), torch.arange(4), {})


def test_matching_uses_any_sampler():
    policy, state = setup(ODE())
    (metrics,) = run(AWM(matching=Matching(draws=2)).compose(), policy, PromptBandit(), state, 1)
    assert metrics["ratio_drift"] < 1e-4
    assert "kl/old" not in metrics


@pytest.mark.parametrize("behavior", ["averaged", "live"])
def test_averaged_weights_make_the_rollouts_and_the_live_ones_are_trained(behavior):
    """DiffusionNFT's old policy: what collects and what is stored as old is the average; live weights come back."""
    policy, state = setup(ODE(), ema_decay=0.9)
    with torch.no_grad():
        for p in policy.denoiser.parameters():
            p.add_(1.0)
    live, seen = parameters(state), []

    class Spy:
        def collect(self, policy, *, generator):
            seen.append(parameters(state))
            return PromptBandit().collect(policy, generator=generator)

    pieces = DiffusionNFT(behavior=behavior, optimization=Optimization(learning_rate=1e-9, ema_decay=0.9)).compose()
    run(pieces, policy, Spy(), state, 1)
    away = torch.zeros_like(live) if behavior == "live" else torch.full_like(live, -1.0)
    torch.testing.assert_close(seen[0], live + away, atol=1e-5, rtol=0)
    torch.testing.assert_close(parameters(state), live, atol=2e-3, rtol=0)


def test_decisions_of_no_weight_are_left_out_and_change_nothing_but_the_scale():
    """Best 2 of 8: a fourth of the rows, whose mean gradient is 4 times that over all rows; Adam does not see it."""
    pieces = ORW(advantage=BestOfGroup(keep=2), matching=Matching(draws=2), optimization=Optimization()).compose()
    policy, state = setup(ODE())
    rollout = PromptBandit(images=8).collect(policy, generator=torch.Generator().manual_seed(0))
    estimate, _ = on_policy._estimate(pieces, rollout, state)
    advantage = estimate.advantage.flatten()
    chosen = on_policy._decisions(pieces, advantage)
    assert len(chosen) == 4
    assert bool((advantage[chosen] == 4).all())
    draw = torch.Generator().manual_seed(1)
    examples = pieces.likelihood.examples(policy, rollout.trajectory, advantage, decisions=chosen, generator=draw)
    assert sorted(set(examples.decision.tolist())) == chosen.tolist()
    assert len(on_policy._decisions(replace(pieces, surrogate=PPOClip()), advantage)) == 16


def test_learning_rates_fall_by_a_cosine_and_stay_at_zero():
    plan = Optimization(decay_iterations=4)
    policy, state = setup(FlowSDE(), rates=1e-2)
    loop = optimize(FlowGRPO(optimization=plan).compose(), policy, PromptBandit(), state)
    rates, moved = [], []
    for _ in range(6):
        before = parameters(state)
        next(loop)
        rates.append(state.optimizer.param_groups[0]["lr"])
        moved.append(float((parameters(state) - before).abs().max()))
    assert rates == pytest.approx([1e-2 * 0.5 * (1 + math.cos(math.pi * min(k, 4) / 4)) for k in range(6)])
    assert min(moved[:4]) > 0
    assert moved[4:] == [0, 0]
    with pytest.raises(ValueError, match="decay_iterations must be at least 1"):
        Optimization(decay_iterations=0)


def test_a_window_slides_with_the_updates_of_the_state():
    """MixGRPO: two steps after every update, within 0..4; a state restored at update 5 goes on from there."""
    for begun, expected in ((0, [0, 2, 0, 2]), (5, [2, 0, 2, 0])):
        seen = []

        def record(rollout, seen=seen):
            seen.append(rollout.trajectory.trained.nonzero().flatten().tolist())
            return rollout

        policy, state = setup(FlowSDE(), trained=TrainedSteps(stop=4, size=2, move_every=1, stride=2,
                                                              ode_elsewhere=True))
        state.step = begun
        run(FlowGRPO().compose(), policy, Constant(PromptBandit(), record), state, 4)
        assert seen == [[first, first + 1] for first in expected]
