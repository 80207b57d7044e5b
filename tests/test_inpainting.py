"""Chains pulled towards known numbers: the correction is that of the papers, written independently."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from diffalign.diffusion import DDPM, ODE, FlowPath, Schedule, VPPath
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign_robot.inpainting import inpainted


class Linear:
    """x0, or the flow's velocity eps - x0, as a fixed linear function of x."""

    def __init__(self, prediction):
        self.prediction = prediction

    def __call__(self, x, t, cond):
        return 0.3 * x + 0.2 - t.reshape(-1, 1)


COND, STEPS, GUIDANCE = {"obs": torch.zeros(3, 1)}, 10, 5.0
KNOWN = torch.tensor([[0.5, -0.2], [0.9, 0.1], [-0.7, 0.4]])
WEIGHT = torch.tensor([[1.0, 0.0], [0.3, 0.0], [0.8, 0.6]])


def chain(prediction, path, **choices):
    return DiffusionPolicy(Linear(prediction), path, ODE(), Schedule(steps=STEPS), (2,), **choices)


def decided(policy, noise):
    return policy.act(COND, generator=torch.Generator(), noise=noise).action


def test_on_the_flow_path_it_corrects_the_velocity_as_published() -> None:
    """arXiv 2506.07339, algorithm 1, with tau = 1 - t: v' = v + min(5, (1 - tau) / (tau r^2)) W e."""
    x = noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for k in range(STEPS):
        tau = k / STEPS
        v = -Linear("flow")(x, torch.full((3,), 1 - tau), COND)
        ahead = x + (1 - tau) * v
        spread = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        strength = GUIDANCE if tau == 0 else min(GUIDANCE, (1 - tau) / (tau * spread))
        x = x + (v + strength * WEIGHT * (KNOWN - ahead)) / STEPS
    found = decided(inpainted(chain("flow", FlowPath()), KNOWN, WEIGHT), noise)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_on_the_vp_path_it_corrects_the_score() -> None:
    """x0' = (x + sigma^2 score') / alpha with score' = score + min(5 alpha / sigma, 1 / r^2) W e (Pi-GDM, J = 1)."""
    policy = chain("x0", VPPath(train_steps=STEPS))
    x = noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    times = policy.schedule.times()
    for now, after in pairwise(times):
        (alpha, sigma), (alpha_next, sigma_next) = (
            (float(level.alpha), float(level.sigma)) for level in (policy.path.level(t[None], 1) for t in (now, after)))
        x0 = Linear("x0")(x, now.expand(3), COND)
        score = (alpha * x0 - x) / sigma**2
        strength = min(GUIDANCE * alpha / sigma, (alpha**2 + sigma**2) / sigma**2)
        x0 = (x + sigma**2 * (score + strength * WEIGHT * (KNOWN - x0))) / alpha
        x = alpha_next * x0 + sigma_next * (x - alpha * x0) / sigma
    torch.testing.assert_close(decided(inpainted(policy, KNOWN, WEIGHT), noise), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [chain("flow", FlowPath(), clip_x0=0.5),
                                    chain("x0", VPPath(train_steps=STEPS), clip_x0=0.5)], ids=["flow", "vp"])
def test_a_weight_of_zero_changes_nothing(policy) -> None:
    noise = 2 * torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    free = decided(policy, noise)
    torch.testing.assert_close(decided(inpainted(policy, KNOWN, torch.zeros(3, 2)), noise), free, atol=1e-5, rtol=0)
    held = decided(inpainted(policy, KNOWN, torch.ones(3, 2)), noise)
    assert float((held - KNOWN).abs().mean()) < 0.5 * float((free - KNOWN).abs().mean())
    assert float(held[1, 0]) > 0.51  # what is known may lie beyond clip_x0


@pytest.mark.parametrize("steps", [2, 4, 10, 100])
@pytest.mark.parametrize(("prediction", "path"), [("flow", FlowPath()), ("x0", VPPath(train_steps=100))],
                         ids=["flow", "vp"])
def test_no_step_moves_further_than_what_is_known_differs(prediction, path, steps) -> None:
    policy, x = replace(chain(prediction, path), schedule=Schedule(steps=steps)), torch.zeros(3, 2)
    times, moved = policy.schedule.times(), []
    for now, after in pairwise(times):
        t, t_next = now.expand(3), after.expand(3)
        low, high = (inpainted(policy, torch.full((3, 2), known), torch.ones(3, 2)) for known in (0.0, 1.0))
        low, high = (each.step(x, t, t_next, *each.predict(x, t, COND), COND).mean for each in (low, high))
        moved.append(float((high - low).mean()))
    assert max(moved) <= 1
    assert max(moved) > 0.04


def test_what_inpainting_would_break_is_refused() -> None:
    policy = replace(chain("x0", VPPath(train_steps=STEPS)), kernel=DDPM())
    with pytest.raises(ValueError, match=r"inpainting needs a deterministic sampler, got DDPM.*use the sampler ode"):
        inpainted(policy, KNOWN, WEIGHT)
