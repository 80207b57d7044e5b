"""With the exact denoiser of N(0.7, 0.5^2), every kernel must reproduce that distribution at t = 0."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from toys import GaussianDenoiser, toy_policy

from diffalign.diffusion import CPS, DDIM, DDPM, ODE, DanceSDE, FlowPath, FlowSDE, VPPath

SAMPLES = 20_000
CRITICAL = 1.628 / SAMPLES**0.5  # Kolmogorov-Smirnov, 1 % level: 0.0115
VP = VPPath(train_steps=200)  # cosine: ends at pure noise, so that N(0, I) is the right start
# CPS refreshes a fixed share of the noise per step; as the steps grow that is an SDE only if the share shrinks with
# them, here sin(0.05 pi / 2)^2 = 0.006 a step. At its default 0.8 it is exact for a point mass only (test_kernels).
CASES = [(FlowPath(), kernel) for kernel in (DDPM(), DDIM(eta=0.5), ODE(), FlowSDE(), FlowSDE(noise_level=1.4),
                                             DanceSDE(eta=0.3), CPS(noise_level=0.05))]
CASES += [(VP, kernel) for kernel in (DDPM(), DDIM(eta=0.5), ODE(), CPS(noise_level=0.05))]


def distance(path, kernel, prediction="v"):
    policy = toy_policy(GaussianDenoiser(path, prediction), kernel, steps=200, event=(1,), path=path)
    draw = torch.Generator().manual_seed(1)
    x = policy.act({"obs": torch.zeros(SAMPLES, 1)}, generator=draw).action[:, 0]
    return stats.kstest(x.double().numpy(), stats.norm(0.7, 0.5).cdf).statistic


@pytest.mark.parametrize(("path", "kernel"), CASES, ids=lambda case: repr(case))
def test_the_data_marginal_is_kept(path, kernel):
    assert distance(path, kernel) < CRITICAL


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_in_other_prediction_kinds(prediction):
    assert distance(VP, DDPM(), prediction) < CRITICAL


def test_the_distance_can_tell():
    """The same test refuses a sampler that is wrong by a little: CPS with large fresh shares shrinks the spread."""
    assert distance(FlowPath(), CPS(noise_level=0.8)) > 3 * CRITICAL
