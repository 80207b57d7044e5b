"""Log-prob, ratio, loss and gradient of the authors' own code on the same numbers (tests/data/published.json has them).

Units: their log-prob is the mean over the D numbers of an event, ours the sum, so theirs = ours / D and their ratio is
exp(difference / D), our `per_dim`; our per_dim loss is D times theirs. All agree to 1e-5.

What cannot be the same number, by a defect or choice of theirs:
- DDPO: the step that reaches timestep 0 keeps some noise (its `final_alpha_cumprod` branch is never taken); ours ends
  in clean data without noise. No case of it is in the file. Flow-GRPO and GRPO-Guard noise their last step too.
- Flow-GRPO: the KL lacks |dt|, so that theirs is |dt| / D times the KL of the step.
- CPS: the "log-prob" drops 1 / (2 std^2) and the constants, so that their ratio is exp(2 std^2 / D x difference):
  another clip and another scale at every step.
- GRPO-Guard: the bias is averaged over the batch, because dim=() means every dim; right for one row alone. 1 / |dt| is
  1 / leverage up to 1 + a^2 / 2.
- DiffusionNFT: the logged policy_loss is the whole loss (`loss += ...` adds the KL in place).
- AWM: fails with undefined names where beta or ema_beta is 0, so that both penalties are in its loss.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from diffalign.diffusion import CPS, DDIM, ODE, FlowPath, FlowSDE, Schedule, VPPath
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.likelihoods import Matching, Rows, Transition
from diffalign.rl.regularizers import reference_kl, velocity_mse
from diffalign.rl.surrogates import ContrastiveMatching, GuardClip, PPOClip, clipped

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published.json").read_text())
D = 12
SD15 = VPPath(betas="scaled_linear", train_steps=1000, beta_start=0.00085, beta_end=0.012)


class Answers(nn.Module):
    """A denoiser that gives one recorded output."""

    def __init__(self, output, prediction):
        super().__init__()
        self.output, self.prediction = output, prediction

    def forward(self, x, t, cond):
        return self.output


def cases(method, part="cases"):
    return [pytest.param({name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
                          for name, value in case.items()}, id=f"{method}-{number}")
            for number, case in enumerate(PUBLISHED[method][part])]


def policy(output, prediction="flow", path=FlowPath(), kernel=ODE()):  # noqa: B008  # frozen specs
    return DiffusionPolicy(Answers(output, prediction), path, kernel, Schedule(steps=1), (2, 2, 3))


def agree(ours, theirs):
    expected = torch.as_tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-5, atol=1e-5)


def steps(case, t, t_next, prediction, path, kernel):
    """(new, old, rows, output): the case scored by the new and by the old output."""
    count = len(case["x"])
    data = {"x": case["x"], "x_next": case["x_next"], "t": torch.full((count,), t, dtype=torch.float64),
            "t_next": torch.full((count,), t_next, dtype=torch.float64)}
    unscored = Rows(data, {}, case["advantage"].clamp(-5, 5), torch.zeros(count), None, torch.ones(count))
    output = case["new_output"].clone().requires_grad_()
    new, old = (Transition().score(policy(one, prediction, path, kernel), unscored)
                for one in (output, case["old_output"]))
    rows = Rows(data, {}, unscored.advantage, old.log_prob, old.gaussian, unscored.position)
    return new, old, rows, output


def check_ratio_and_loss(case, new, old, rows, output, rest=0.0):
    agree(old.log_prob / D, case["old_log_prob"])
    agree(new.log_prob / D, case["log_prob"])
    agree(((new.log_prob - old.log_prob) / D).exp(), case["ratio"])
    loss = PPOClip(low=case["clip"], high=case["clip"], unit="per_dim")(new, rows).loss.mean() / D + rest
    agree(loss, case["loss"])
    agree(torch.autograd.grad(loss, output)[0], case["gradient"])


@pytest.mark.parametrize(("method", "rows"), [("ddpo", 5), ("flow_grpo", 1), ("cps", 2), ("guard", 2), ("awm", 5)])
def test_the_clips_bind_in_the_data(method, rows):
    """Rows beyond the limits, on the side that A makes worse."""
    held = 0
    for parameter in cases(method):
        case = parameter.values[0]
        beyond = case["ratio"] - 1
        held += int(((beyond.abs() > case["clip"]) & (beyond * case["advantage"] > 0)).sum())
    assert held >= rows


@pytest.mark.parametrize("case", cases("ddpo"))
def test_ddpo(case):
    """Their timestep is our table entry minus one."""
    times = [(case[name] + 1) / 1000 for name in ("timestep", "next_timestep")]
    check_ratio_and_loss(case, *steps(case, *times, case["prediction"], SD15, DDIM(eta=1.0)))


@pytest.mark.parametrize("case", cases("flow_grpo"))
def test_flow_grpo(case):
    new, old, rows, output = steps(case, case["t"], case["t_next"], "flow", FlowPath(), FlowSDE(noise_level=0.7))
    anchor = Transition().score(policy(case["reference_output"], kernel=FlowSDE(noise_level=0.7)), rows)
    kl = reference_kl(new, anchor).mean() * (case["t"] - case["t_next"]) / D
    agree(kl, case["kl"])
    check_ratio_and_loss(case, new, old, rows, output, case["beta"] * kl)


@pytest.mark.parametrize("case", cases("cps"))
def test_cps(case):
    new, old, rows, output = steps(case, case["t"], case["t_next"], "flow", FlowPath(), CPS(noise_level=0.8))
    std = case["t_next"] * math.sin(0.8 * math.pi / 2)
    power = 2 * std**2 / D
    for ours, theirs in ((old, "old_log_prob"), (new, "log_prob")):
        agree(power * (ours.log_prob + D * (math.log(std) + 0.5 * math.log(2 * math.pi))), case[theirs])
    ratio = (power * (new.log_prob - old.log_prob)).exp()
    agree(ratio, case["ratio"])
    limits = (torch.full_like(ratio, 1 + sign * case["clip"]) for sign in (-1, 1))
    loss = clipped(ratio, rows.advantage, *limits, dual=None).loss.mean()
    agree(loss, case["loss"])
    agree(torch.autograd.grad(loss, output)[0], case["gradient"])


def guarded(case):
    """(our loss in their unit, our centred ratio, output)."""
    new, old, rows, output = steps(case, case["t"], case["t_next"], "flow", FlowPath(), FlowSDE(noise_level=0.7))
    loss = GuardClip(low=case["clip"], high=case["clip"], unit="per_dim")(new, rows).loss
    std = old.gaussian.std.flatten()
    ratio = ((new.log_prob - old.log_prob + old.gaussian.kl(new.gaussian)) * std / D).exp()
    agree(old.log_prob / D, case["old_log_prob"])
    agree(new.log_prob / D, case["log_prob"])
    return (loss * new.leverage).mean() / (D * (case["t"] - case["t_next"])), ratio, output


@pytest.mark.parametrize("case", cases("guard"))
def test_guard_where_theirs_is_right(case):
    loss, ratio, output = guarded(case)
    agree(ratio, case["ratio"])
    agree(loss, case["loss"])
    agree(torch.autograd.grad(loss, output)[0], case["gradient"])


@pytest.mark.parametrize("case", cases("guard", "batch_of_four"))
def test_guard_in_a_batch_averages_the_bias_in_theirs_alone(case):
    """Theirs is our ratio with every row's KL replaced by the mean of the batch."""
    _, ratio, _ = guarded(case)
    assert (ratio - case["ratio"]).abs().max() > 1e-4
    new, old, _, _ = steps(case, case["t"], case["t_next"], "flow", FlowPath(), FlowSDE(noise_level=0.7))
    kl = old.gaussian.kl(new.gaussian)
    agree(ratio * (old.gaussian.std.flatten() * (kl.mean() - kl) / D).exp(), case["ratio"])


def matched(case, output, weight="one"):
    """(score of an output, rows of the case without an old policy)."""
    count = len(case["x0"])
    data = {"x0": case["x0"], "eps": case["eps"], "t": case["t"]}
    rows = Rows(data, {}, case["advantage"], torch.zeros(count), None, torch.ones(count))
    return Matching(weight=weight).score(policy(output), rows), rows


@pytest.mark.parametrize("case", cases("nft"))
def test_nft(case):
    output = case["new_output"].clone().requires_grad_()
    (new, rows), (old, _), (anchor, _) = (matched(case, one) for one in (output, case["old_output"],
                                                                          case["reference_output"]))
    rows.data["old_error"] = old.error
    loss = ContrastiveMatching(beta=case["beta"], advantage_clip=case["advantage_clip"])(new, rows).loss / D
    agree(loss, case["row_loss"])
    total = case["advantage_clip"] * loss.mean() + case["reference_weight"] * velocity_mse(new, anchor).mean()
    agree(total, case["loss"])
    agree(total, case["policy_loss"])
    agree(torch.autograd.grad(total, output)[0], case["gradient"])


WEIGHTS = {"Uniform": "one", "t": "t", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}


@pytest.mark.parametrize("case", cases("awm"))
def test_awm(case):
    output = case["new_output"].clone().requires_grad_()
    weight = WEIGHTS[case["weighting"]]
    (new, rows), (old, _), (anchor, _), (average, _) = (matched(case, one, weight) for one in (
        output, case["old_output"], case["reference_output"], case["average_output"]))
    rows = Rows(rows.data, {}, rows.advantage.clamp(-5, 5) / 5, old.log_prob, None, rows.position)
    rest = case["beta"] * velocity_mse(new, anchor).mean() + case["ema_beta"] * velocity_mse(new, average).mean()
    check_ratio_and_loss(case, new, old, rows, output, rest)
