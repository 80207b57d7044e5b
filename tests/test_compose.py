"""Composition of denoisers: identities, analytic scores, matched noise levels, weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import GaussianDenoiser, MLPDenoiser

from diffalign.diffusion import DDIM, DDPM, ODE, FlowPath, Schedule, VPPath
from diffalign.policy.compose import Composition, best_pair_weights, compose, disagreement, noise_predictions
from diffalign.policy.diffusion import DiffusionPolicy


def gaussian(path, prediction, mean, std, *, steps=20, kernel=None):
    denoiser = GaussianDenoiser(path, prediction, mean, std)
    return DiffusionPolicy(denoiser, path, kernel or ODE(), Schedule(steps=steps), (2,))


def cond(rows):
    return {"obs": torch.zeros(rows, 1)}


PATHS = {"flow": (FlowPath(), "flow"), "vp-eps": (VPPath(train_steps=1000), "eps"),
         "vp-v": (VPPath(train_steps=1000), "v"), "vp-x0": (VPPath(train_steps=1000), "x0")}


@pytest.mark.parametrize("first", PATHS)
@pytest.mark.parametrize("second", PATHS)
def test_the_composition_has_the_analytic_score(first, second):
    """eps = sigma sum_i w_i (x - alpha m_i) / (alpha^2 s_i^2 + sigma^2), at the host's level."""
    a, b = gaussian(*PATHS[first], 0.7, 0.5), gaussian(*PATHS[second], -0.4, 0.3)
    torch.manual_seed(0)
    x, t = torch.randn(30, 2), torch.linspace(0.05, 0.95, 30)
    if first == "flow" and second != "flow":  # levels that the member's table has, on the host's path
        t = a.path.time_at(b.path.level(t, 1))
    policy = compose([a, b], [0.3, 0.7])
    _, eps = policy.predict(x, t, cond(30))
    alpha, sigma = a.path.level(t, 1)
    expected = sum(w * sigma * (x - alpha * m) / (alpha**2 * s**2 + sigma**2)
                   for w, m, s in ((0.3, 0.7, 0.5), (0.7, -0.4, 0.3)))
    torch.testing.assert_close(eps, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", [VPPath(train_steps=10), VPPath(betas="linear"), FlowPath()], ids=repr)
def test_the_time_of_a_level_is_the_nearest_one(path):
    torch.manual_seed(0)
    t = path.time_at(FlowPath().level(torch.rand(200), 1))
    grid = torch.linspace(0, 1, path.train_steps + 1) if isinstance(path, VPPath) else t
    found, every = path.level(t, 0), path.level(grid, 0)
    torch.manual_seed(0)
    wanted = torch.atan2(*reversed(FlowPath().level(torch.rand(200), 0)))
    gaps = (wanted[:, None] - torch.atan2(every.sigma, every.alpha)).abs()
    torch.testing.assert_close((wanted - torch.atan2(found.sigma, found.alpha)).abs(), gaps.amin(1), atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(weight=st.floats(0, 1))
def test_composing_equals_is_the_identity(weight):
    torch.manual_seed(0)
    policy = DiffusionPolicy(MLPDenoiser(), FlowPath(), ODE(), Schedule(steps=5), (2,))
    both = compose([policy, policy], [weight, 1 - weight])
    one, two = (p.act({"obs": torch.ones(9, 1)}, generator=torch.Generator().manual_seed(2)).action
                for p in (policy, both))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_all_weight_on_one_policy_is_that_policy():
    torch.manual_seed(0)
    a, b = (DiffusionPolicy(MLPDenoiser(prediction="v"), VPPath(train_steps=10), DDPM(), Schedule(steps=10), (2,))
            for _ in range(2))
    some = {"obs": torch.ones(9, 1)}
    for weights, single in (((1.0, 0.0), a), ((0.0, 1.0), b)):
        one, two = (p.act(some, generator=torch.Generator().manual_seed(2)).action
                    for p in (single, compose([a, b], weights)))
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_equal_covariances_compose_to_the_mean_of_the_means():
    a, b = (gaussian(VPPath(train_steps=1000), "v", mean, 0.2, steps=200) for mean in (0.5, 1.5))
    sample = compose([a, b], [0.4, 0.6]).act(cond(2000), generator=torch.Generator().manual_seed(0)).action
    assert float(sample.mean()) == pytest.approx(0.4 * 0.5 + 0.6 * 1.5, abs=0.02)
    assert float(sample.std()) == pytest.approx(0.2, abs=0.02)


def test_disjoint_modes_meet_where_nobody_was_and_the_screen_says_so():
    a, b = (gaussian(VPPath(train_steps=1000), "v", mean, 0.1, steps=100) for mean in (-1.0, 1.0))
    sample = compose([a, b], [0.5, 0.5]).act(cond(500), generator=torch.Generator().manual_seed(0)).action
    assert float(sample.abs().mean()) < 0.3
    data = torch.cat([torch.randn(200, 2) * 0.1 - 1, torch.randn(200, 2) * 0.1 + 1])
    predictions, eps = noise_predictions([a, b], data, cond(400), count=4, generator=torch.Generator().manual_seed(0))
    assert disagreement(predictions, eps) > 1.5
    same, eps = noise_predictions([a, a], data, cond(400), count=4, generator=torch.Generator().manual_seed(0))
    assert disagreement(same, eps) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_closed_form_weights_beat_a_grid(seed):
    g = torch.Generator().manual_seed(seed)
    eps = torch.randn(50, 2, generator=g)
    predictions = eps + torch.randn(2, 1, 2, generator=g) + 0.5 * torch.randn(2, 50, 2, generator=g)
    best = best_pair_weights(predictions, eps)
    assert sum(best) == pytest.approx(1)
    assert min(best) >= 0

    def error(weight):
        return float(((1 - weight) * predictions[0] + weight * predictions[1] - eps).square().mean())

    assert error(best[1]) <= min(error(w) for w in torch.linspace(0, 1, 101).tolist()) + 1e-6


def test_bad_compositions_are_refused():
    a = gaussian(FlowPath(), "flow", 0.0, 1.0)
    coarse = gaussian(VPPath(train_steps=3), "v", 0.0, 1.0, steps=3)
    for weights, message in (((0.5, 0.6), "sum to 1"), ((-0.5, 1.5), "at least 0"), ((1.0,), "one weight per policy")):
        with pytest.raises(ValueError, match=message):
            Composition((a, a), weights)
    other = DiffusionPolicy(MLPDenoiser(event=4), FlowPath(), DDIM(eta=0.5), Schedule(steps=3), (2, 2))
    with pytest.raises(ValueError, match="same event"):
        Composition((a, other), (0.5, 0.5))
    with pytest.raises(ValueError, match="put the policy with the coarser table first"):
        compose([a, coarse], [0.5, 0.5]).act(cond(2), generator=torch.Generator())
    compose([coarse, a], [0.5, 0.5]).act(cond(2), generator=torch.Generator())
