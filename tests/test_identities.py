"""Closed forms that tie the families together, each checked by sampling the project's own pieces."""

from __future__ import annotations

import math

import pytest
import torch
from toys import GaussianDenoiser, toy_policy

from diffalign.diffusion import CPS, DDPM, FlowPath, FlowSDE, VPPath
from diffalign.diffusion.gaussian import Gaussian
from diffalign.rl.advantages import best_of_group
from diffalign.rl.likelihoods import Rows, Scored, Transition
from diffalign.rl.surrogates import WeightedRegression


@pytest.mark.parametrize(("kernel", "prediction", "path"), [
    (FlowSDE(), "flow", FlowPath()), (CPS(), "flow", FlowPath()), (DDPM(), "eps", VPPath(train_steps=5))])
def test_the_log_ratio_of_a_step_has_mean_minus_kl_and_std_root_two_kl(kernel, prediction, path):
    """Old and new policy differ by a shifted mean: log r = eps . d / sigma - |d|^2 / (2 sigma^2) at every step."""
    n = 20_000
    old, new = (toy_policy(GaussianDenoiser(path, prediction, mean=mean), kernel, steps=5, path=path)
                for mean in (0.7, 0.75))
    trajectory = old.act({"obs": torch.zeros(n, 1)}, generator=torch.Generator().manual_seed(0)).trajectory
    examples = Transition().examples(old, trajectory, torch.zeros(n), decisions=torch.arange(n),
                                     generator=torch.Generator())
    for k in trajectory.trained.nonzero().flatten().tolist():
        rows = examples.rows((examples.step == k).nonzero().flatten())
        with torch.no_grad():
            scored = Transition().score(new, rows)
        assert rows.old is not None
        assert scored.gaussian is not None
        kl = float(rows.old.kl(scored.gaussian).mean())
        assert kl > 1e-5
        ratio = (scored.log_prob - rows.old_log_prob).double()
        assert abs(float(ratio.mean()) + kl) < 5 * math.sqrt(2 * kl / n) + 1e-6
        assert float(ratio.std()) == pytest.approx(math.sqrt(2 * kl), rel=0.05)


def test_weighted_regression_fits_the_tilted_gaussian():
    """Base N(mu, S), A = -P (a - c)^2 / 2: the fit is N(S'(mu / S + P c / T), S') with 1 / S' = 1 / S + P / T."""
    mu, s, p, c, temperature, n = 1.0, 1.0, 4.0, 1.25, 1.0, 100_000
    x = (mu + math.sqrt(s) * torch.randn(n, 1, generator=torch.Generator().manual_seed(0))).double()
    advantage = (-p * (x[:, 0] - c) ** 2 / 2).double()
    mean = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([mean, log_std], max_iter=100, line_search_fn="strong_wolfe")
    rows = Rows({}, {}, advantage, torch.zeros(n), None, torch.ones(n))

    def loss():
        optimizer.zero_grad()
        density = Gaussian(mean.expand(n, 1), log_std.exp().expand(n, 1)).log_prob(x)
        value = WeightedRegression(temperature=temperature)(Scored(density, None, None, 1), rows).loss.mean()
        value.backward()
        return value

    optimizer.step(loss)
    variance = 1 / (1 / s + p / temperature)
    assert float(mean.detach()) == pytest.approx(variance * (mu / s + p * c / temperature), abs=0.01)
    assert float(log_std.detach().exp() ** 2) == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize(("n", "mean", "nats"), [(4, 1.029, 0.636), (8, 1.424, 1.204), (16, 1.766, 1.835)])
def test_the_best_of_n_normals_is_log_n_minus_n_minus_one_over_n_nats_away(n, mean, nats):
    """The winner of n from N(0, 1) has density n phi(z) Phi(z)^(n - 1), so its KL is E[log n Phi(z)^(n - 1)]."""
    groups = 4000
    z = torch.randn(groups * n, generator=torch.Generator().manual_seed(n)).double()
    best = z[best_of_group(z.float(), torch.arange(groups).repeat_interleave(n), 1) > 0]
    assert len(best) == groups
    error = float(best.std()) / math.sqrt(groups)
    assert abs(float(best.mean()) - mean) < 5 * error + 5e-4
    divergence = math.log(n) + (n - 1) * torch.special.log_ndtr(best)
    assert abs(float(divergence.mean()) - nats) < 5 * float(divergence.std()) / math.sqrt(groups) + 5e-4
    assert nats == pytest.approx(math.log(n) - (n - 1) / n, abs=5e-4)
