"""Reverse kernels: published formulas, diffusers' schedulers, and the identities between kernels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from toys import GaussianDenoiser, toy_policy

from diffalign.diffusion import CPS, DDIM, DDPM, ODE, DanceSDE, FlowPath, FlowSDE, VPPath, convert
from diffalign.diffusion.kernels import posterior_std

PATHS = {"flow": FlowPath(), "vp": VPPath(train_steps=100)}


def step(path, kernel, x, x0, eps, t, t_next):
    rows = x.shape[0]
    levels = [path.level(torch.full((rows,), value, dtype=x.dtype), x.ndim - 1) for value in (t, t_next)]
    return kernel.moments(x, x0, eps, *levels)


def noised(path, t, rows=4, event=(3,)):
    """Consistent (x, x0, eps) in float64."""
    x0, eps = (torch.randn(rows, *event, dtype=torch.float64) for _ in range(2))
    level = path.level(torch.full((rows,), t, dtype=torch.float64), len(event))
    return level.alpha * x0 + level.sigma * eps, x0, eps


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.6, 1.0])
def test_steps_equal_diffusers(prediction, eta):
    """DDPM (eta None) and DDIM(eta): every step of a 10-step chain; timestep = table index - 1."""
    diffusers = pytest.importorskip("diffusers")
    options = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
               "beta_end": 0.012, "clip_sample": False, "timestep_spacing": "trailing",
               "prediction_type": {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction]}
    scheduler = diffusers.DDPMScheduler(**options) if eta is None else diffusers.DDIMScheduler(**options)
    scheduler.set_timesteps(10)
    path = VPPath(betas="scaled_linear", train_steps=1000, beta_start=0.00085, beta_end=0.012)
    kernel = DDPM() if eta is None else DDIM(eta=eta)
    x, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert scheduler.timesteps.tolist() == [1000 - 100 * k - 1 for k in range(10)]
    for k, timestep in enumerate(scheduler.timesteps):
        now, nxt = (path.level(torch.full((2,), 1 - j / 10), 2) for j in (k, k + 1))
        gaussian = kernel.moments(x, *convert(prediction, output, x, now), now, nxt)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        ours = gaussian.mean + gaussian.std * noise
        draw = torch.Generator().manual_seed(k)
        if eta is None:
            theirs = scheduler.step(output, timestep, x, generator=draw).prev_sample
        else:
            theirs = scheduler.step(output, timestep, x, eta=eta, generator=draw).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("t", "t_next"), [(0.9, 0.7), (0.5, 0.01), (0.2, 0.0)])
def test_ddim_spans_ddpm_and_ode(path, t, t_next):
    x, x0, eps = noised(path, t)
    ddpm, ddim1 = step(path, DDPM(), x, x0, eps, t, t_next), step(path, DDIM(eta=1.0), x, x0, eps, t, t_next)
    torch.testing.assert_close(ddim1.mean, ddpm.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ddim1.std, ddpm.std)
    ode, ddim0 = step(path, ODE(), x, x0, eps, t, t_next), step(path, DDIM(eta=0.0), x, x0, eps, t, t_next)
    torch.testing.assert_close(ddim0.mean, ode.mean, rtol=1e-9, atol=1e-9)
    assert (ddim0.std == 0).all()
    assert (ode.std == 0).all()
    half = step(path, DDIM(eta=0.5), x, x0, eps, t, t_next)
    torch.testing.assert_close(half.std, 0.5 * ddpm.std)


def test_posterior_std_is_ho_2020_eq_7():
    """beta_tilde = (1 - abar') / (1 - abar) * beta with beta = 1 - abar / abar'."""
    path = VPPath(train_steps=100)
    levels = [path.level(torch.tensor([t], dtype=torch.float64), 1) for t in (0.6, 0.45)]
    abar, abar_next = (level.alpha.item() ** 2 for level in levels)
    expected = math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
    assert posterior_std(*levels).item() == pytest.approx(expected, rel=1e-9)


def test_ode_on_the_flow_path_is_euler():
    x, x0, eps = noised(FlowPath(), 0.7)
    torch.testing.assert_close(step(FlowPath(), ODE(), x, x0, eps, 0.7, 0.4).mean, x + (eps - x0) * (0.4 - 0.7))


@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.9), (0.9, 0.75), (0.3, 0.1)])
def test_flow_sde_is_flow_grpo_eq_9(t, t_next):
    """The authors' form: x (1 + g^2/(2t) dt) + v (1 + g^2 (1-t)/(2t)) dt, std g sqrt(-dt), g = a sqrt(t/(1-t))."""
    a, dt = 0.7, t_next - t
    x, x0, eps = noised(FlowPath(), t)
    g2 = a**2 * t / (1 - (t if t < 1 else t_next))
    v = eps - x0
    gaussian = step(FlowPath(), FlowSDE(noise_level=a), x, x0, eps, t, t_next)
    expected = x * (1 + g2 / (2 * t) * dt) + v * (1 + g2 * (1 - t) / (2 * t)) * dt
    torch.testing.assert_close(gaussian.mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gaussian.std, torch.full_like(gaussian.std, math.sqrt(g2 * -dt)))


def test_dance_sde_is_dance_grpo_eq_8():
    """mu = x + v dt - eta^2/2 score dt with score = -(x - (1 - t) x0) / t^2."""
    eta, t, t_next = 0.3, 0.6, 0.45
    x, x0, eps = noised(FlowPath(), t)
    score = -(x - (1 - t) * x0) / t**2
    gaussian = step(FlowPath(), DanceSDE(eta=eta), x, x0, eps, t, t_next)
    expected = x + (eps - x0) * (t_next - t) - 0.5 * eta**2 * score * (t_next - t)
    torch.testing.assert_close(gaussian.mean, expected)
    torch.testing.assert_close(gaussian.std, torch.full_like(gaussian.std, eta * math.sqrt(t - t_next)))


def test_flow_sde_with_constant_g_is_dance():
    t, t_next, eta = 0.6, 0.5, 0.3
    x, x0, eps = noised(FlowPath(), t)
    flow = step(FlowPath(), FlowSDE(noise_level=eta * math.sqrt((1 - t) / t)), x, x0, eps, t, t_next)
    dance = step(FlowPath(), DanceSDE(eta=eta), x, x0, eps, t, t_next)
    torch.testing.assert_close(flow.mean, dance.mean)
    torch.testing.assert_close(flow.std, dance.std)


@pytest.mark.parametrize(("t", "t_next"), [(0.95, 0.9), (0.5, 0.3), (0.2, 0.05)])
def test_velocity_gain_of_flow_sde(t, t_next):
    """|d mean / d v| / |dt| = 1 + a^2 / 2 at every step (image_peers 2.6)."""
    a = 0.9
    x, v = torch.randn(1, 1, dtype=torch.float64), torch.randn(1, 1, dtype=torch.float64, requires_grad=True)
    mean = step(FlowPath(), FlowSDE(noise_level=a), x, x - t * v, x + (1 - t) * v, t, t_next).mean
    (gain,) = torch.autograd.grad(mean.sum(), v)
    assert abs(gain.item()) / (t - t_next) == pytest.approx(1 + a**2 / 2, rel=1e-9)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kernel", [CPS(noise_level=0.3), CPS(noise_level=0.8), CPS(noise_level=1.0), DDPM(),
                                    DDIM(eta=0.4)], ids=repr)
def test_exact_marginal_of_a_point_mass_at_every_step(path, kernel):
    """With x0 known, x_next ~ N(alpha' x0, sigma'^2): the eps coefficient and std add up, and 0 remains at the end."""
    grid = torch.linspace(1, 0, 11).tolist()
    x0 = torch.full((1, 1), 1.5, dtype=torch.float64)
    for t, t_next in pairwise(grid):
        now, nxt = (path.level(torch.tensor([s], dtype=torch.float64), 1) for s in (t, t_next))
        plus, minus = (kernel.moments(now.alpha * x0 + now.sigma * e, x0, torch.full_like(x0, e), now, nxt)
                       for e in (1.0, -1.0))
        spread = (plus.mean - minus.mean) / 2
        assert torch.allclose((plus.mean + minus.mean) / 2, nxt.alpha * x0, rtol=1e-9)
        assert torch.allclose((spread**2 + plus.std**2).sqrt(), nxt.sigma, rtol=1e-9, atol=1e-12)
    assert plus.std.item() == 0
    assert spread.item() == pytest.approx(0, abs=1e-12)


def test_cps_std_is_the_published_share():
    """s = sigma' sin(a pi / 2): 0.5 * sin(0.8 * pi / 2) = 0.4755."""
    x, x0, eps = noised(FlowPath(), 0.7)
    gaussian = step(FlowPath(), CPS(noise_level=0.8), x, x0, eps, 0.7, 0.5)
    assert gaussian.std.flatten()[0].item() == pytest.approx(0.475528, abs=1e-6)


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), DDPM(), DDIM(), CPS()], ids=repr)
def test_the_last_step_is_noiseless(kernel, generator):
    """The authors' Flow-SDE leaves noise of std 0.228 in the sample (10 steps, shift 3); ours leaves none."""
    policy = toy_policy(GaussianDenoiser(FlowPath(), "flow", mean=0.7, std=1e-4), kernel, steps=10, event=(1,))
    sample = policy.act({"obs": torch.zeros(500, 1)}, generator=generator).action
    assert sample.std().item() < 1e-3
    assert sample.mean().item() == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_min_std_is_a_floor_of_the_std_alone(kind):
    path, floor = VPPath(train_steps=10), 0.15
    grid = torch.linspace(1, 0, 11).tolist()
    bare, floored = [], []
    for t, t_next in pairwise(grid):
        x, x0, eps = noised(path, t)
        plain, wide = (step(path, kind(min_std=m), x, x0, eps, t, t_next) for m in (0.0, floor))
        torch.testing.assert_close(wide.mean, plain.mean)
        bare.append(plain.std.flatten()[0].item())
        floored.append(wide.std.flatten()[0].item())
    assert floored == pytest.approx([max(floor, std) for std in bare])
    assert bare[-1] == 0
    assert floored[-1] == pytest.approx(floor)
    assert max(bare) > floor  # the floor does not bind everywhere


def test_which_kernels_have_a_density():
    assert [k.stochastic for k in (DDPM(), DDIM(eta=0.1), DDIM(eta=0.0), DDIM(eta=0.0, min_std=0.1), ODE())] == [
        True, True, False, True, False]
    assert [k.stochastic for k in (FlowSDE(), FlowSDE(noise_level=0.0), DanceSDE(), DanceSDE(eta=0.0), CPS(),
                                   CPS(noise_level=0.0))] == [True, False, True, False, True, False]


@pytest.mark.parametrize(("kind", "options", "message"), [
    (DDPM, {"min_std": -0.1}, "min_std must be at least 0, got -0.1"),
    (DDIM, {"eta": 1.01}, r"eta must lie in \[0, 1\]"),
    (DDIM, {"eta": -0.01}, r"eta must lie in \[0, 1\]"), (DDIM, {"min_std": -1.0}, "min_std must be at least 0"),
    (FlowSDE, {"noise_level": -0.1}, "noise_level must be at least 0"),
    (FlowSDE, {"noise_level": math.nan}, "noise_level"),
    (DanceSDE, {"eta": -1.0}, "eta must be at least 0"),
    (CPS, {"noise_level": 1.1}, r"noise_level must lie in \[0, 1\]")])
def test_refusals(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
