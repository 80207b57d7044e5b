"""Learned noise (ReinFlow): bounds, exact likelihood on the sampler's own grid, schedule, entropy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_on_policy import run, setup
from toys import MLPDenoiser, PointMass, PromptBandit, toy_policy

from diffalign.algorithms import AWM, ReinFlow
from diffalign.diffusion import ODE, FlowPath, NoisyODE, TrainedSteps
from diffalign.policy.injection import NoisyDenoiser, noisy
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.likelihoods import Transition
from diffalign.rl.surrogates import GuardClip, PPOClip
from diffalign.train.on_policy import Optimization

KERNEL = NoisyODE(min_std=0.1, max_std=0.4)
COND = {"obs": torch.linspace(-1, 1, 6)[:, None]}


def noisy_policy(steps=4, kernel=KERNEL, **options):
    torch.manual_seed(0)
    denoiser = noisy(MLPDenoiser(event=3), (3,), 1, (8,), key="obs", seed=0)
    torch.nn.init.normal_(denoiser.noise.net[-1].weight, generator=torch.Generator().manual_seed(2))
    return toy_policy(denoiser, kernel, event=(3,), steps=steps, **options)


def scored(policy, generator):
    trajectory = policy.act(COND, generator=generator).trajectory
    examples = Transition().examples(policy, trajectory, torch.ones(6), decisions=torch.arange(6), generator=generator)
    rows = examples.rows(torch.arange(len(examples)))
    return trajectory, rows, Transition().score(policy, rows)


def test_untrained_noise_is_the_geometric_middle_and_stays_between_the_bounds():
    net = noisy(MLPDenoiser(event=3), (3,), 1, (8,), key="obs", seed=0)
    t = torch.rand(6)
    torch.testing.assert_close(KERNEL.between(net.noise_share(t, COND)), torch.full((6, 3), 0.2))
    torch.nn.init.normal_(net.noise.net[-1].weight, std=50.0)
    std = KERNEL.between(net.noise_share(t, COND))
    assert std.min() >= 0.1 - 1e-6
    assert std.max() <= 0.4 + 1e-6
    assert std.max() - std.min() > 0.25


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_likelihood_is_exact_on_the_grid_of_the_sampler(steps, generator):
    """Public code: sampling on linspace(0, 1, K), scoring on linspace(0, 1 - 1/K, K), first ratio 0.88 at K = 4."""
    policy = noisy_policy(steps)
    trajectory, rows, new = scored(policy, generator)
    torch.testing.assert_close(new.log_prob, rows.old_log_prob, rtol=1e-5, atol=1e-5)
    n, k = 4, steps - 1
    t = trajectory.times[k].expand(6)
    std = KERNEL.between(policy.denoiser.noise_share(t, COND))
    mean = trajectory.x[:, k] + policy.denoiser(trajectory.x[:, k], t, COND) / steps * -1
    by_hand = torch.distributions.Normal(mean, std).log_prob(trajectory.x[:, k + 1]).sum(1)
    torch.testing.assert_close(trajectory.log_prob[:, k], by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trajectory.std[:, k], std)
    assert std[n].unique().numel() == 3
    if steps > 1:  # another grid is noticed
        other = {**rows.data, "t": 1 - (1 - rows.data["t"]) * steps / (steps - 1)}
        moved = Transition().score(policy, replace(rows, data={**other, "t": other["t"].clamp(0.01, 1)}))
        assert (moved.log_prob - rows.old_log_prob).abs().max() > 0.05


def test_the_policy_gradient_reaches_mean_and_noise(generator):
    """At ratio 1 the gradient is that of -A log p, in both networks."""
    policy = noisy_policy()
    _, rows, new = scored(policy, generator)
    rows = replace(rows, advantage=torch.randn(len(rows.advantage), generator=generator))
    grads = [torch.autograd.grad(loss.sum(), list(policy.denoiser.parameters()), retain_graph=True)
             for loss in (PPOClip()(new, rows).loss, -rows.advantage * new.log_prob)]
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert all(g.abs().sum() > 0 for g in grads[0])


def test_other_kernels_ignore_the_noise(generator):
    policy = noisy_policy(kernel=ODE())
    plain = replace(policy, denoiser=policy.denoiser.denoiser)
    x = torch.randn(6, 3)
    assert torch.equal(policy.act(COND, generator=generator, noise=x).action,
                       plain.act(COND, generator=generator, noise=x).action)


def test_a_plain_denoiser_gets_the_least_noise(generator):
    trajectory = toy_policy(MLPDenoiser(event=3), KERNEL, event=(3,)).act(COND, generator=generator).trajectory
    torch.testing.assert_close(trajectory.std, torch.full_like(trajectory.std, 0.1))
    assert trajectory.trained.all()


def test_untrained_steps_may_be_silent(generator):
    trained = TrainedSteps(start=-1, ode_elsewhere=True)
    trajectory = noisy_policy(trained=trained).act(COND, generator=generator).trajectory
    assert trajectory.trained.tolist() == [False, False, False, True]
    assert not trajectory.std[:, :3].any()


def test_the_upper_bound_falls_after_35_percent_to_70_percent_of_the_range():
    """Published: hold for 0.35 of the training, then a cosine to 0.3 min + 0.7 max."""
    net = NoisyDenoiser(MLPDenoiser(event=3), noisy_policy().denoiser.noise)
    torch.nn.init.constant_(net.noise.net[-1].bias, 50.0)
    largest = []
    for progress in (0.0, 0.35, 0.675, 1.0):
        net.narrow(KERNEL, progress)
        largest.append(KERNEL.between(net.noise_share(torch.zeros(6), COND)).max().item())
    assert largest == pytest.approx([0.4, 0.4, 0.5 * (0.4 + 0.31), 0.31], abs=1e-5)
    assert NoisyODE(min_std=0.2, max_std=0.2).reach(1.0) == 1.0
    assert NoisyODE(min_std=0.1, max_std=0.2, final=1.0).reach(1.0) == pytest.approx(1.0)


def test_an_ode_mean_with_own_noise_widens_the_samples():
    """What the docstring says: K = 1 from x ~ N(0, 1) with flow v = x - c gives N(c, std^2)."""
    class Shift(torch.nn.Module):
        prediction = "flow"

        def forward(self, x, t, cond):
            return x - 0.5

    policy = toy_policy(Shift(), NoisyODE(min_std=0.3, max_std=0.3), event=(3,), steps=1, path=FlowPath())
    x = policy.act({"obs": torch.zeros(20000, 1)}, generator=torch.Generator().manual_seed(0)).action
    assert float(x.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(x.std()) == pytest.approx(0.3, abs=0.01)


def test_the_entropy_bonus_raises_the_noise_and_nothing_else():
    """Without a reward: entropy 1 widens the noise to its upper bound, entropy 0 leaves every weight."""
    shares = []
    for entropy in (0.0, 1.0):
        plan = Optimization(epochs=8)
        algorithm = ReinFlow(optimization=plan, entropy=entropy, advantage=GroupNormalized(scale="none"))
        policy, state = setup(KERNEL, noise=(8,), rates=3e-2)
        before = [p.clone() for p in policy.denoiser.denoiser.parameters()]

        class Flat(PromptBandit):
            def collect(self, policy, *, generator):
                rollout = super().collect(policy, generator=generator)
                return replace(rollout, reward=torch.zeros_like(rollout.reward))

        metrics = run(algorithm.compose(), policy, Flat(), state, 1)
        for p, q in zip(before, policy.denoiser.denoiser.parameters(), strict=True):
            assert torch.equal(p, q)
        share = policy.denoiser.noise_share(torch.full((2,), 0.5), {"obs": torch.zeros(2, 1)})
        shares.append(share.mean().item())
    assert shares[0] == 0.5
    assert shares[1] > 0.7
    std = math.sqrt(0.1 * 0.4)
    assert -metrics[0]["entropy/minus"] > math.log(std) + 0.5 * math.log(2 * math.pi * math.e)


def test_every_first_ratio_is_one_for_learned_noise():
    policy, state = setup(KERNEL, noise=(8,), critic=True)
    metrics = run(ReinFlow().compose(), policy, PointMass(episodes=8), state, 2)
    assert all(m["ratio_drift"] < 1e-4 for m in metrics)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: NoisyODE(min_std=0.0), "need 0 < min_std <= max_std, got 0.0 and 0.16"),
    (lambda: NoisyODE(min_std=0.3), "need 0 < min_std <= max_std, got 0.3 and 0.16"),
    (lambda: NoisyODE(hold=1.0), "need 0 <= hold < 1"),
    (lambda: replace(AWM().compose(), entropy=0.1), "entropy=0.1 needs Gaussian denoising steps"),
    (lambda: GuardClip()(*scored(noisy_policy(), torch.Generator())[:0:-1]), "learned noise has one per number")])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
