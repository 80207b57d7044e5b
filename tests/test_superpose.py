"""OR and AND of policies: densities along the chain, unions, equal likelihoods."""

from __future__ import annotations

import pytest
import torch
from toys import GaussianDenoiser

from diffalign.diffusion import DDPM, ODE, Schedule, VPPath
from diffalign.policy.compose import compose
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.superpose import Superposition, equal_density_weights

PATH = VPPath(train_steps=1000)


def gaussian(mean, std, *, path=PATH, prediction="v", steps=200):
    return DiffusionPolicy(GaussianDenoiser(path, prediction, mean, std), path, DDPM(), Schedule(steps=steps), (2,))


def cond(rows):
    return {"obs": torch.zeros(rows, 1)}


def log_density(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x).sum(1)


def draw(policy, rows, seed=0):
    return policy.act(cond(rows), generator=torch.Generator().manual_seed(seed))


def tracking_error(operator, **options):
    """(mean, std) of the tracked log q_1 - log q_2 minus that of the exact Gaussians at the end of 200 steps."""
    a, b = gaussian(0.3, 0.5), gaussian(-0.4, 0.7)
    decision = draw(Superposition((a, b), operator, **options), 400)
    tracked = decision.signals["log_density"][:, 0] - decision.signals["log_density"][:, 1]
    error = tracked - log_density(decision.action, 0.3, 0.5) + log_density(decision.action, -0.4, 0.7)
    return float(error.mean()), float(error.std())


@pytest.mark.parametrize("operator", ["or", "and"])
def test_tracked_densities_are_the_analytic_ones(operator):
    mean, std = tracking_error(operator)
    assert abs(mean) < 0.1
    assert std < 0.25


def test_a_gain_of_one_is_no_diffusion_any_more():
    """It cancels the noise along the difference of the means, and with it the quadratic variation: a lasting bias."""
    assert tracking_error("and", gain=1.0)[0] > 0.2


def test_or_samples_the_union_where_averaging_samples_the_middle():
    a, b = gaussian(-1.0, 0.1), gaussian(1.0, 0.1)
    sample = draw(Superposition((a, b), "or", temperature=1.0), 600).action.mean(1)
    assert float(((sample.abs() - 1).abs() < 0.4).float().mean()) > 0.97
    share = float((sample > 0).float().mean())
    assert 0.4 < share < 0.6
    middle = draw(compose([a, b], [0.5, 0.5]), 600).action.mean(1)
    assert float((middle.abs() < 0.3).float().mean()) > 0.97


def test_a_bias_tilts_the_union():
    a, b = gaussian(-1.0, 0.1), gaussian(1.0, 0.1)
    sample = draw(Superposition((a, b), "or", bias=(3.0, 0.0)), 400).action.mean(1)
    assert float((sample < 0).float().mean()) > 0.85


def test_and_keeps_the_densities_equal():
    """N(0.6, 0.5) and N(-0.6, 0.5): equal densities mean sum(x) = 0; a convex sample spreads with std 0.7."""
    a, b = gaussian(0.6, 0.5), gaussian(-0.6, 0.5)
    both, convex = draw(Superposition((a, b), "and"), 400).action.sum(1), draw(compose([a, b], [0.5, 0.5]), 400).action
    assert float(both.std()) < 0.15
    assert abs(float(both.mean())) < 0.1
    assert float(convex.sum(1).std()) > 0.5


def test_the_weights_of_a_step_solve_its_equations():
    torch.manual_seed(0)
    means, density = torch.randn(20, 3, 5), torch.randn(20, 3)
    weights = equal_density_weights(means, torch.full((20, 1), 0.7), density)
    torch.testing.assert_close(weights.sum(1), torch.ones(20))
    x = torch.einsum("np,npe->ne", weights, means)
    total = density + torch.stack([log_density(x - means[:, i], 0.0, 0.7) for i in range(3)], 1)
    torch.testing.assert_close(total, total[:, :1].expand(-1, 3), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("operator", ["or", "and"])
def test_the_same_policy_twice_is_that_policy(operator):
    one = gaussian(0.3, 0.5, steps=20)
    policy = Superposition((one, one), operator)
    decision = draw(policy, 6)
    assert decision.signals["log_density"].abs().max() == 0
    alone = draw(Superposition((one, one), "or"), 6)
    torch.testing.assert_close(decision.action, alone.action, atol=1e-5, rtol=1e-5)
    sample = draw(policy, 3000).action
    assert float(sample.mean()) == pytest.approx(0.3, abs=0.04)
    assert float(sample.std()) == pytest.approx(float(draw(one, 3000).action.std()), abs=0.03)


def test_bad_superpositions_are_refused():
    a = gaussian(0.0, 1.0)
    deterministic = DiffusionPolicy(GaussianDenoiser(PATH, "v"), PATH, ODE(), Schedule(steps=5), (2,))
    for arguments, message in ((((a,), "or"), "at least two policies"), (((deterministic, a), "or"), "deterministic"),
                               (((a, a), "or", 0.0), "temperature must be positive"),
                               (((a, a), "and", 1.0, 0.0), "gain must lie in"),
                               (((a, a), "or", 1.0, 0.1, (1.0,)), "one bias per policy")):
        with pytest.raises(ValueError, match=message):
            Superposition(*arguments)
