"""Likelihoods, regularizers, and what every surrogate's gradient is at the start of an update."""

from __future__ import annotations

import pytest
import torch
from toys import MLPDenoiser, toy_policy

from diffalign.diffusion import CPS, DDIM, DDPM, ODE, DanceSDE, FlowSDE, TrainedSteps, VPPath
from diffalign.diffusion.paths import convert
from diffalign.policy.normalize import Normalizer
from diffalign.rl.critics import ValueNet
from diffalign.rl.likelihoods import Matching, Transition
from diffalign.rl.regularizers import reference_kl, velocity_mse
from diffalign.rl.surrogates import ContrastiveMatching, DivergenceGate, GuardClip, PPOClip, SimplePO
from diffalign.train.state import frozen_copy

D = 3
ADVANTAGE = torch.tensor([1.5, -0.7, 0.2, -2.0, 0.0])
COND = {"obs": torch.linspace(-1, 1, 5)[:, None]}
SURROGATES = [kind(unit=unit) for kind in (PPOClip, SimplePO, DivergenceGate) for unit in ("nats", "per_dim")]
SURROGATES += [PPOClip(low=1e-4, high=2e-4, unit="per_dim"), PPOClip(low=0.1, high=0.2, dual=2.0, step_start=0.1)]


def rollout(kernel=None, prediction="flow", likelihood=None, steps=4, **options):
    """(policy, all rows, example set) of five decisions of three numbers."""
    policy = toy_policy(MLPDenoiser(event=D, prediction=prediction), kernel or FlowSDE(), event=(D,), steps=steps,
                        **options)
    draw = torch.Generator().manual_seed(0)
    trajectory = policy.act(COND, generator=draw).trajectory
    examples = (likelihood or Transition()).examples(policy, trajectory, ADVANTAGE, generator=draw,
                                                     decisions=torch.arange(len(ADVANTAGE)))
    return policy, examples.rows(torch.arange(len(examples))), examples


def gradient_of(loss, policy):
    grads = torch.autograd.grad(loss, list(policy.denoiser.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


PAIRS = [(surrogate, likelihood) for surrogate in SURROGATES
         for likelihood in (Transition(), Transition(denoising_discount=0.7), Matching(draws=3))
         if surrogate.needs is None or surrogate.needs in likelihood.provides]  # the others are refused (test_refusals)


@pytest.mark.parametrize(("surrogate", "likelihood"), PAIRS, ids=repr)
def test_ratio_is_one_and_the_gradient_is_the_policy_gradient(surrogate, likelihood):
    """At theta = theta_old every surrogate in every unit has gradient -A grad log p, row by row."""
    policy, rows, _ = rollout(likelihood=likelihood)
    new = likelihood.score(policy, rows)
    torch.testing.assert_close(new.log_prob, rows.old_log_prob, rtol=0, atol=2e-5)
    result = surrogate(new, rows)
    assert not result.held_low.any()
    assert not result.held_high.any()
    expected = gradient_of((-rows.advantage * new.log_prob).sum(), policy)
    assert expected.norm() > 0.1
    assert (gradient_of(result.loss.sum(), policy) - expected).norm() < 1e-4 * expected.norm()
    negative = rows.advantage < -1
    expected = gradient_of((-rows.advantage * new.log_prob)[negative].sum(), policy)
    assert (gradient_of(result.loss[negative].sum(), policy) - expected).norm() < 1e-4 * expected.norm()


GUARDED = [(FlowSDE(), "flow"), (CPS(), "flow"), (DanceSDE(eta=0.6), "flow"), (DDPM(), "eps"), (DDIM(eta=0.5), "v")]


@pytest.mark.parametrize(("kernel", "prediction"), GUARDED, ids=repr)
@pytest.mark.parametrize("unit", ["nats", "per_dim"])
def test_guard_starts_as_the_policy_gradient_equalized_per_step(kernel, prediction, unit):
    """Gradient -A (std / leverage) grad log p, with the leverage measured by moving the network's output at fixed x."""
    policy, rows, _ = rollout(kernel, prediction)
    new = Transition().score(policy, rows)
    t, t_next = rows.data["t"], rows.data["t_next"]
    now = policy.path.level(t, 1)
    x0, eps = policy.predict(rows.data["x"], t, rows.cond)
    output = policy.denoiser(rows.data["x"], t, rows.cond)
    moved = policy.step(rows.data["x"], t, t_next, *convert(prediction, output + 0.01, rows.data["x"], now), rows.cond)
    leverage = (moved.mean - policy.step(rows.data["x"], t, t_next, x0, eps, rows.cond).mean).abs().mean(1) / 0.01
    torch.testing.assert_close(new.leverage, leverage.detach(), rtol=1e-3, atol=1e-4)
    result = GuardClip(unit=unit)(new, rows)
    weight = rows.old.std.flatten() / leverage.detach()
    expected = gradient_of((-weight * rows.advantage * new.log_prob).sum(), policy)
    assert expected.norm() > 0.1
    assert (gradient_of(result.loss.sum(), policy) - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("dual", [None, 1.01])
@pytest.mark.parametrize("unit", ["nats", "per_dim"])
def test_guard_centres_each_row_by_its_own_shift(unit, dual):
    """c = sum(noise * shift) / std per row; the public code averages the KL over the batch (image_peers 2.6).

    dual caps the loss of negative advantages at that many times |A|.
    """
    policy, rows, _ = rollout(FlowSDE())
    with torch.no_grad():
        for p in policy.denoiser.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    new = Transition().score(policy, rows)
    noise = (rows.data["x_next"] - rows.old.mean) / rows.old.std
    centred = (noise * (new.gaussian.mean - rows.old.mean) / rows.old.std).sum(1)
    power = 1.0 if unit == "nats" else rows.old.std.flatten() / D
    ratio = (power * centred).exp()
    low, high = (torch.tensor([-0.1, 0.1]).exp()) if unit == "nats" else torch.tensor([0.9, 1.1])
    plain = torch.maximum(-rows.advantage * ratio, -rows.advantage * ratio.clamp(low, high))
    if dual is not None:
        capped = (rows.advantage < 0) & (plain > -dual * rows.advantage)
        assert capped.any()
        plain = torch.where(capped, -dual * rows.advantage, plain)
    result = GuardClip(low=0.1, high=0.1, unit=unit, dual=dual)(new, rows)
    torch.testing.assert_close(result.loss, rows.old.std.flatten() / (power * new.leverage) * plain, rtol=1e-3,
                               atol=1e-4)
    if unit == "nats":
        assert result.held_high.any()
        assert result.held_low.any()
        assert torch.equal(result.held_high, (ratio > high) & (rows.advantage > 0))


def test_transition_rows_are_decision_times_trained_step():
    """Steps 1..3 of 5 are trained; the discount counts the steps that are left of the whole chain."""
    _, rows, examples = rollout(likelihood=Transition(denoising_discount=0.5), steps=5,
                                trained=TrainedSteps(start=1, stop=4))
    path = examples.trajectory
    assert len(examples) == 15
    assert examples.decision.tolist() == [n for n in range(5) for _ in range(3)]
    for row in range(15):
        n, k = row // 3, 1 + row % 3
        assert torch.equal(rows.data["x"][row], path.x[n, k])
        assert torch.equal(rows.data["x_next"][row], path.x[n, k + 1])
        assert (rows.data["t"][row], rows.data["t_next"][row]) == (path.times[k], path.times[k + 1])
        assert rows.old_log_prob[row] == path.log_prob[n, k]
        assert torch.equal(rows.old.mean[row], path.mean[n, k])
        assert rows.old.std[row] == path.std[n, k]
        assert rows.cond["obs"][row] == COND["obs"][n]
        assert rows.advantage[row].item() == pytest.approx(ADVANTAGE[n].item() * 0.5 ** (4 - k))
    assert rows.position.tolist() == pytest.approx([0.0, 0.5, 1.0] * 5)


def test_the_last_step_has_the_full_advantage_and_position_one():
    """A single trained step has position 1 (robot_peers D1: DPPO's code gives 0/0 there)."""
    _, rows, _ = rollout(DDPM(min_std=0.1), "eps", Transition(denoising_discount=0.5), trained=TrainedSteps(start=-1))
    assert rows.position.tolist() == [1.0] * 5
    assert torch.equal(rows.advantage, ADVANTAGE)


@pytest.mark.parametrize(("weight", "prediction"), [("one", "flow"), ("t", "flow"), ("t2", "eps"), ("one", "x0")])
def test_matching_is_minus_the_weighted_training_loss(weight, prediction):
    policy, rows, examples = rollout(DDPM(), prediction, Matching(draws=2, weight=weight))
    assert len(examples) == 10
    assert examples.decision.tolist() == [0, 1, 2, 3, 4] * 2
    t, eps, x0 = rows.data["t"], rows.data["eps"], rows.data["x0"]
    assert torch.equal(x0, examples.trajectory.sample.repeat(2, 1))
    level = policy.path.level(t, 1)
    output = policy.denoiser(level.alpha * x0 + level.sigma * eps, t, rows.cond)
    target = {"flow": eps - x0, "eps": eps, "x0": x0}[prediction]
    factor = {"one": 1.0, "t": t, "t2": t**2}[weight]
    new = Matching(draws=2, weight=weight).score(policy, rows)
    torch.testing.assert_close(new.log_prob, -factor * ((output - target) ** 2).sum(1))
    assert new.gaussian is None
    assert new.dims == D


def test_matching_per_dim_is_awm():
    """AWM: r = exp(lp - lp_old), lp = -mean_D (v - (eps - x0))^2; loss max(-A r, -A clip(r)); ours is D times it."""
    policy, rows, _ = rollout(ODE(), likelihood=Matching(draws=2))
    old_error = -rows.old_log_prob / D
    with torch.no_grad():
        for p in policy.denoiser.parameters():
            p.add_(0.05 * torch.randn_like(p))
    level = policy.path.level(rows.data["t"], 1)
    x = level.alpha * rows.data["x0"] + level.sigma * rows.data["eps"]
    velocity = policy.denoiser(x, rows.data["t"], rows.cond)
    error = ((velocity - (rows.data["eps"] - rows.data["x0"])) ** 2).mean(1)
    ratio = (-error + old_error).exp()
    assert (ratio - 1).abs().max() > 0.05
    published = torch.maximum(-rows.advantage * ratio, -rows.advantage * ratio.clamp(0.5, 2.0))
    surrogate = PPOClip(low=0.5, high=1.0, unit="per_dim")
    torch.testing.assert_close(surrogate(Matching().score(policy, rows), rows).loss, D * published)


def test_matching_times():
    """grid: the sampler's own times without its first (AWM's discrete_wo_init); uniform: anywhere in (0, 1]."""
    _, rows, examples = rollout(likelihood=Matching(draws=40))
    assert sorted(set(rows.data["t"].tolist())) == pytest.approx([0.25, 0.5, 0.75])
    assert examples.t.shape == (200,)
    _, rows, _ = rollout(likelihood=Matching(draws=40, time="uniform"))
    t = rows.data["t"]
    assert len(t.unique()) == 200
    assert t.min() > 0
    assert t.mean().item() == pytest.approx(0.5, abs=0.07)
    _, rows, _ = rollout(ODE(), likelihood=Matching(), steps=1)
    assert set(rows.data["t"].tolist()) == {1.0}


def test_velocity_is_eps_minus_x0_in_both_likelihoods():
    for likelihood in (Transition(), Matching()):
        policy, rows, _ = rollout(likelihood=likelihood)
        x = rows.data.get("x")
        if x is None:
            level = policy.path.level(rows.data["t"], 1)
            x = level.alpha * rows.data["x0"] + level.sigma * rows.data["eps"]
        torch.testing.assert_close(likelihood.score(policy, rows).velocity,
                                   policy.denoiser(x, rows.data["t"], rows.cond))


def anchored(likelihood, **options):
    """Scores of a moved policy and of its origin on the same rows."""
    policy, rows, _ = rollout(likelihood=likelihood, **options)
    anchor = toy_policy(frozen_copy(policy.denoiser), policy.kernel, event=(D,), steps=4, path=policy.path)
    with torch.no_grad():
        policy.denoiser.net[-1].bias.add_(torch.tensor([0.1, -0.2, 0.3]))
    return likelihood.score(policy, rows), likelihood.score(anchor, rows)


def test_velocity_mse_is_the_mean_over_the_event():
    new, anchor = anchored(Transition())
    torch.testing.assert_close(velocity_mse(new, anchor), torch.full((15,), (0.01 + 0.04 + 0.09) / 3))


def test_reference_kl_is_the_exact_kl_of_the_step():
    """DDPM(eps) with equal stds: |dm|^2 / (2 std^2), summed over the event."""
    new, anchor = anchored(Transition(), kernel=DDPM(), prediction="eps", path=VPPath(betas="linear", train_steps=8))
    expected = ((new.gaussian.mean - anchor.gaussian.mean) ** 2).sum(1) / (2 * new.gaussian.std[:, 0] ** 2)
    torch.testing.assert_close(reference_kl(new, anchor), expected, rtol=1e-4, atol=1e-5)
    assert expected.min() > 1e-3


def test_reference_kl_needs_a_density():
    new, anchor = anchored(Matching())
    with pytest.raises(ValueError, match="reference_kl needs Gaussian steps"):
        reference_kl(new, anchor)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Matching(draws=0), "draws must be at least 1, got 0"),
    (lambda: Transition(denoising_discount=0.0), r"denoising_discount must lie in \(0, 1\]"),
    (lambda: Transition(denoising_discount=1.1), r"denoising_discount must lie in \(0, 1\]"),
    (lambda: rollout(ODE()), r"ODE\(type='ode'\) has no stochastic trained step")])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_value_net_starts_at_zero_and_normalizes_its_observation():
    data = torch.randn(50, 4) * 10 + 3
    normalizer = Normalizer.fit(data)
    net = ValueNet(4, (8,), key="state", normalizer=normalizer)
    assert (net({"state": data}) == 0).all()
    torch.nn.init.normal_(net.net[-1].weight)
    plain = ValueNet(4, (8,), key="state")
    plain.net.load_state_dict(net.net.state_dict())
    value = net({"state": data})
    assert value.shape == (50,)
    torch.testing.assert_close(value, plain({"state": normalizer.normalize(data)}))
    assert "normalizer.shift" in net.state_dict()


def test_value_net_holds_what_is_far_away():
    """A feature that hardly moved in the data, 400 standard deviations off, counts as 10; a near one as it is."""
    normalizer = Normalizer.of(torch.zeros(2), torch.tensor([1.0, 0.005]))
    net = ValueNet(2, (8,), normalizer=normalizer)
    torch.nn.init.normal_(net.net[-1].weight)
    far, held = torch.tensor([[3.0, 2.0], [3.0, -2.0]]), torch.tensor([[3.0, 0.05], [3.0, -0.05]])
    torch.testing.assert_close(net({"obs": far}), net({"obs": held}))
    assert (net({"obs": held}) - net({"obs": held * 0.99})).abs().min() > 1e-4


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_contrastive_matching_is_diffusion_nft(beta):
    """The published loss in velocities on the flow path, without its factor 5 and summed over the event."""
    policy, rows, _ = rollout(ODE(), likelihood=Matching(draws=3))
    x0, eps, t = rows.data["x0"], rows.data["eps"], rows.data["t"][:, None]
    x = (1 - t) * x0 + t * eps
    old = policy.denoiser(x, rows.data["t"], rows.cond).detach()
    with torch.no_grad():
        for p in policy.denoiser.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    velocity = policy.denoiser(x, rows.data["t"], rows.cond)
    share = (rows.advantage.clamp(-1, 1) / 1 / 2 + 0.5)[:, None]
    expected = 0.0
    for p, v in ((share, beta * velocity + (1 - beta) * old), (1 - share, (1 + beta) * old - beta * velocity)):
        error = x - t * v - x0
        expected = expected + p / beta * error.square().mean(1, keepdim=True) / error.abs().mean(1, keepdim=True)
    surrogate = ContrastiveMatching(beta=beta, advantage_clip=1.0)
    found = surrogate(Matching().score(policy, rows), rows)
    torch.testing.assert_close(found.loss, D * expected[:, 0], rtol=1e-4, atol=1e-5)
    assert not found.held_low.any()


def test_contrastive_matching_starts_as_a_weighted_policy_gradient_and_ignores_no_advantage():
    """At the old policy: A / clip times the gradient of |x0_new - x0|^2 / w; beta does not matter there."""
    policy, rows, _ = rollout(ODE(), likelihood=Matching(draws=3))
    new = Matching().score(policy, rows)
    torch.testing.assert_close(new.error, rows.data["old_error"])
    error = new.predicted[0] - rows.data["x0"]
    width = error.detach().abs().mean(1)
    expected = gradient_of((rows.advantage / 5 * error.square().sum(1) / width).sum(), policy)
    assert expected.norm() > 0.1
    for beta in (1.0, 0.1):
        loss = ContrastiveMatching(beta=beta)(new, rows).loss
        assert (gradient_of(loss.sum(), policy) - expected).norm() < 1e-3 * expected.norm()
        assert gradient_of(loss[rows.advantage == 0].sum(), policy).norm() < 1e-3


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_matching_error_is_the_networks_and_its_scale_leads_to_that_of_x0(prediction):
    policy, rows, _ = rollout(DDPM(), prediction=prediction, likelihood=Matching(draws=3), path=VPPath())
    new = Matching().score(policy, rows)
    off = (new.predicted[0] - rows.data["x0"]).abs()
    torch.testing.assert_close(new.x0_scale[:, None] * new.error.abs(), off, rtol=1e-4, atol=1e-4)
    if prediction == "eps":
        torch.testing.assert_close(new.error, new.predicted[1] - rows.data["eps"])


def test_contrastive_matching_of_an_eps_network_can_leave_its_errors_as_they_are():
    """In the network's space a row's loss does not depend on how x0 follows from the output there."""
    policy, rows, _ = rollout(DDPM(), prediction="eps", likelihood=Matching(draws=3), path=VPPath())
    new = Matching().score(policy, rows)
    own, published = (ContrastiveMatching(advantage_clip=1.0, space=space)(new, rows).loss
                      for space in ("network", "x0"))
    error = new.error.detach()
    torch.testing.assert_close(own, error.square().sum(1) / error.abs().mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(published, new.x0_scale * own, rtol=1e-4, atol=1e-5)
    assert new.x0_scale.max() > 3 * new.x0_scale.min()
