"""The Gaussian step against torch.distributions, and the KL's dependence on the step size."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from diffalign.diffusion import FlowPath, FlowSDE, Gaussian, standard_normal


def reference(gaussian, event_dims):
    return Independent(Normal(gaussian.mean, gaussian.std.expand_as(gaussian.mean)), event_dims)


def two(dtype=torch.float64):
    """Unequal means and stds, std per row and per element."""
    one = Gaussian(torch.randn(4, 2, 3, dtype=dtype), torch.rand(4, 1, 1, dtype=dtype) + 0.3)
    other = Gaussian(torch.randn(4, 2, 3, dtype=dtype), torch.rand(4, 2, 3, dtype=dtype) + 0.5)
    return one, other


def test_log_prob_equals_torch():
    for gaussian in two():
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        torch.testing.assert_close(gaussian.log_prob(x), reference(gaussian, 2).log_prob(x))
        assert gaussian.dims == 6


def test_kl_equals_torch_in_both_directions():
    one, other = two()
    for a, b in ((one, other), (other, one)):
        torch.testing.assert_close(a.kl(b), kl_divergence(reference(a, 2), reference(b, 2)))
    torch.testing.assert_close(one.kl(one), torch.zeros(4, dtype=torch.float64))


def test_kl_equals_monte_carlo(generator):
    """KL(p || q) = E_p[log p - log q]; 400k samples, tolerance four standard errors (which are below 0.01)."""
    p = Gaussian(torch.tensor([[0.2, -0.4]]), torch.tensor([[0.8]]))
    q = Gaussian(torch.tensor([[0.5, 0.1]]), torch.tensor([[1.3]]))
    many = Gaussian(p.mean.expand(400_000, 2), p.std.expand(400_000, 1))
    x = many.sample(generator)
    gap = p.log_prob(x) - q.log_prob(x)
    error = gap.std().item() / len(gap) ** 0.5
    assert error < 0.01
    assert p.kl(q).item() == pytest.approx(gap.mean().item(), abs=4 * error)


def test_samples_have_the_stated_moments(generator):
    gaussian = Gaussian(torch.tensor([[1.0, -2.0]]).expand(100_000, 2), torch.tensor([[0.25]]))
    x = gaussian.sample(generator)
    assert x.mean(0).tolist() == pytest.approx([1.0, -2.0], abs=0.004)
    assert x.std(0).tolist() == pytest.approx([0.25, 0.25], abs=0.003)
    prior = standard_normal(3, (2, 5))
    assert prior.mean.shape == (3, 2, 5)
    assert (prior.std == 1).all()


def test_low_precision_is_scored_in_float32():
    mean, x = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.full((1, 4096), 0.5, dtype=torch.bfloat16)
    log_prob = Gaussian(mean, torch.ones(1, 1, dtype=torch.bfloat16)).log_prob(x)
    assert log_prob.dtype == torch.float32
    expected = Independent(Normal(mean.double(), 1.0), 1).log_prob(x.double())
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=0)


def test_gradients_reach_mean_and_std_but_not_x():
    mean = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    std = (torch.rand(2, 1, dtype=torch.float64) + 0.5).requires_grad_()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda m, s: Gaussian(m, s).log_prob(x.detach()), (mean, std))
    Gaussian(mean, std).log_prob(x).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(mean.grad, ((x - mean) / std**2).detach())


def test_a_step_without_noise_has_no_density():
    still = Gaussian(torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]))
    fine = standard_normal(2, (1,))
    with pytest.raises(ValueError, match="std 0 is deterministic and has no density"):
        still.log_prob(torch.zeros(2, 1))
    for pair in ((still, fine), (fine, still)):
        with pytest.raises(ValueError, match="has no density"):
            pair[0].kl(pair[1])


@pytest.mark.parametrize(("t", "t_next"), [(0.9, 0.8), (0.9, 0.85), (0.3, 0.1)])
def test_kl_of_a_flow_sde_step_divides_by_dt(t, t_next):
    """Flow-GRPO's code has |dm|^2 / (2 g^2); the KL is |dm|^2 / (2 g^2 |dt|), here with D = 5 summed."""
    kernel, path, a = FlowSDE(noise_level=0.7), FlowPath(), 0.7
    levels = [path.level(torch.full((1,), s, dtype=torch.float64), 1) for s in (t, t_next)]
    x, v, gap = (torch.randn(1, 5, dtype=torch.float64) for _ in range(3))
    new, old = (kernel.moments(x, x - t * w, x + (1 - t) * w, *levels) for w in (v, v + 0.1 * gap))
    g2 = a**2 * t / (1 - t)
    expected = ((new.mean - old.mean) ** 2).sum(1) / (2 * g2 * (t - t_next))
    torch.testing.assert_close(new.kl(old), expected)
    # image_methods I3: c(a) (1-t)/t |dt| |dv|^2 with c(a) = (1 + a^2/2)^2 / (2 a^2)
    closed = (1 + a**2 / 2) ** 2 / (2 * a**2) * (1 - t) / t * (t - t_next) * ((0.1 * gap) ** 2).sum(1)
    torch.testing.assert_close(new.kl(old), closed)
