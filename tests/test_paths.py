"""Noise paths and prediction kinds: against diffusers, and as identities of one another."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.diffusion import FlowPath, Level, VPPath, convert
from diffalign.diffusion.paths import alphas_cumprod, training_target

KINDS = ("eps", "x0", "v", "flow")
TABLES = {"linear": VPPath(betas="linear", train_steps=200, beta_start=1e-4, beta_end=0.02),
          "scaled_linear": VPPath(betas="scaled_linear", train_steps=1000, beta_start=0.00085, beta_end=0.012),
          "squaredcos_cap_v2": VPPath(betas="squaredcos_cap_v2", train_steps=100)}


@pytest.mark.parametrize("path", TABLES.values(), ids=TABLES)
def test_vp_table_equals_diffusers(path):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=path.train_steps, beta_schedule=path.betas,
                                        beta_start=path.beta_start, beta_end=path.beta_end)
    table = alphas_cumprod(path)
    assert table.shape == (path.train_steps + 1,)
    assert table[0] == 1
    torch.testing.assert_close(table[1:], scheduler.alphas_cumprod.double(), rtol=2e-5, atol=0)


def test_vp_level_is_the_root_of_the_table_at_the_nearest_entry():
    path = VPPath(train_steps=10)
    t = torch.tensor([0.0, 0.04, 0.06, 0.3, 1.0])  # entries 0, 0, 1, 3, 10
    assert path.index(t).tolist() == [0, 0, 1, 3, 10]
    level = path.level(t, 2)
    assert level.alpha.shape == level.sigma.shape == (5, 1, 1)
    abar = alphas_cumprod(path)[[0, 0, 1, 3, 10]]
    torch.testing.assert_close(level.alpha.flatten(), abar.sqrt().float())
    torch.testing.assert_close(level.sigma.flatten(), (1 - abar).sqrt().float())
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(5, 1, 1))
    assert level.alpha[0] == 1
    assert level.sigma[0] == 0


def test_vp_grid_of_a_schedule_hits_table_entries_exactly():
    """K steps on a table of 3 K entries: float32 times must not round to a neighbor."""
    for steps in (1, 7, 50, 333):
        path = VPPath(train_steps=3 * steps)
        index = path.index(torch.linspace(1, 0, steps + 1, dtype=torch.float64).float())
        assert index.tolist() == list(range(3 * steps, -1, -3))


def test_flow_level():
    level = FlowPath().level(torch.tensor([0.0, 0.25, 1.0]), 3)
    assert level.alpha.shape == (3, 1, 1, 1)
    assert level.alpha.flatten().tolist() == [1.0, 0.75, 0.0]
    assert level.sigma.flatten().tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("path", [FlowPath(), VPPath()], ids=["flow", "vp"])
@pytest.mark.parametrize("t", [-1e-3, 1.001])
def test_time_outside_the_unit_interval_is_refused(path, t):
    with pytest.raises(ValueError, match=r"path time must lie in \[0, 1\]"):
        path.level(torch.tensor([0.5, t]), 1)


@given(start=st.sampled_from(KINDS), end=st.sampled_from(KINDS), t=st.floats(0.03, 0.97), flow=st.booleans(),
       seed=st.integers(0, 999))
def test_prediction_kinds_round_trip(start, end, t, flow, seed):
    """target of one kind -> (x0, eps) -> target of another kind, on both paths."""
    draw = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(3, 2, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    level = (FlowPath() if flow else VPPath()).level(torch.full((3,), t, dtype=torch.float64), 2)
    x = level.alpha * x0 + level.sigma * eps
    got_x0, got_eps = convert(start, training_target(start, x0, eps, level), x, level)
    torch.testing.assert_close(got_x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got_eps, eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(training_target(end, got_x0, got_eps, level), training_target(end, x0, eps, level),
                               rtol=1e-8, atol=1e-8)


def test_training_targets_by_hand():
    """alpha 0.8, sigma 0.6, x0 2, eps -1: v = 0.8 * -1 - 0.6 * 2 = -2, flow = -1 - 2 = -3."""
    level = Level(torch.tensor([[0.8]]), torch.tensor([[0.6]]))
    x0, eps = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    targets = {kind: training_target(kind, x0, eps, level).item() for kind in KINDS}
    assert targets == pytest.approx({"eps": -1.0, "x0": 2.0, "v": -2.0, "flow": -3.0})


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_mean_the_same_x_at_any_output(kind):
    """Whatever the network says, alpha x0 + sigma eps = x: the implied pair explains the noisy input."""
    level = FlowPath().level(torch.tensor([0.3, 0.8]), 1)
    x, output = torch.randn(2, 5), torch.randn(2, 5)
    x0, eps = convert(kind, output, x, level)
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x, rtol=1e-5, atol=1e-5)


def test_pure_noise():
    """At alpha = 0 an eps prediction says nothing about x0, but x0, v and flow predictions do."""
    level = FlowPath().level(torch.ones(1), 1)
    x = torch.tensor([[0.5, -2.0]])
    with pytest.raises(ValueError, match="does not determine x0 where alpha = 0"):
        convert("eps", x, x, level)
    for kind in ("x0", "v", "flow"):
        x0, eps = convert(kind, training_target(kind, torch.full_like(x, 3.0), x, level), x, level)
        torch.testing.assert_close(x0, torch.full_like(x, 3.0))
        torch.testing.assert_close(eps, x)


@pytest.mark.parametrize("options", [{"train_steps": 0}, {"beta_start": 0.0}, {"beta_start": 0.03}, {"beta_end": 1.0}])
def test_vp_refusals(options):
    with pytest.raises(ValueError, match=r"train_steps must|need 0 < beta_start"):
        VPPath(**options)


def test_squaredcos_follows_nichol_and_dhariwal():
    """abar(t) = f(t) / f(0), f(t) = cos((t/T + 0.008) / 1.008 * pi/2)^2, until the cap on beta binds."""
    steps = 100
    table = alphas_cumprod(VPPath(train_steps=steps))
    for index in (1, 17, 50, 90):
        value = math.cos((index / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert table[index].item() == pytest.approx(value / start, rel=1e-9)
