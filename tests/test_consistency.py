"""Consistency distillation: exact on Gaussian data, where the end of every ODE trajectory is known in closed form."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from toys import GaussianDenoiser, MLPDenoiser, toy_policy

from diffalign.diffusion import CPS, ODE, FlowPath, Schedule, VPPath
from diffalign.train.consistency import Distillation, consistency_loss, distill, end_error
from diffalign.train.supervised import Pretraining, fresh_state

MEAN, STD = 0.7, 0.5
FITTING = Pretraining(steps=600, batch_size=256, learning_rate=2e-2, warmup_steps=10, ema_decay=0.9, time="grid")
PATHS = [("flow", FlowPath()), ("v", VPPath())]


def ends(x, t, path):
    """The end of the trajectory through (x, t), on which (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) is constant."""
    alpha, sigma = path.level(t, x.ndim - 1)
    return MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


class Ends(nn.Module):
    """The perfect student."""

    def __init__(self, path, prediction):
        super().__init__()
        self.path, self.prediction = path, prediction

    def forward(self, x, t, cond):
        alpha, sigma = self.path.level(t, x.ndim - 1)
        kept = alpha * x if self.prediction == "v" else x
        return (kept - ends(x, t, self.path)) / sigma.clamp(min=1e-6)


class Affine(nn.Module):
    """A velocity a(t) x + b(t), which holds the closed form."""

    prediction = "flow"

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Mish(), nn.Linear(32, 2))

    def forward(self, x, t, cond):
        slope, offset = self.net(t[:, None]).unbind(1)
        return slope[:, None] * x + offset[:, None]


def gaussian_batch(generator):
    x0 = MEAN + STD * torch.randn(256, 2, generator=generator)
    return x0, {"obs": torch.zeros(256, 1)}


def mean_loss(network, teacher, grid, path):
    """Over every interval of the grid, with the network as its own target."""
    generator, policy = torch.Generator().manual_seed(0), toy_policy(network, CPS(noise_level=1.0), path=path)
    times = Schedule(steps=grid).times()
    total = 0.0
    for t, s in itertools.pairwise(times):
        x0, cond = gaussian_batch(generator)
        eps = torch.randn(x0.shape, generator=generator)
        rows = consistency_loss(policy, policy, teacher, x0, cond, t.expand(256), s.expand(256), eps, huber=None)
        total += float(rows.mean()) / grid
    return total


@pytest.mark.parametrize(("prediction", "path"), PATHS)
def test_the_exact_map_has_no_loss_and_the_posterior_mean_has(prediction, path):
    """The map is off by the error of the ODE step, dt^2, squared dt^4; the teacher's x0 moves by dt, squared dt^2."""
    exact, teacher = Ends(path, prediction), GaussianDenoiser(path, prediction, MEAN, STD)
    stepping = toy_policy(teacher, ODE(), path=path)
    perfect = [mean_loss(exact, stepping, grid, path) for grid in (20, 40)]
    blurred = [mean_loss(teacher, stepping, grid, path) for grid in (20, 40)]
    assert perfect[1] < 2e-5
    assert perfect[0] / perfect[1] == pytest.approx(16, rel=0.4)
    assert blurred[0] / blurred[1] == pytest.approx(4, rel=0.3)
    assert blurred[1] > 40 * perfect[1]


def test_the_loss_by_hand():
    """Flow path, one row of two numbers, t = 0.8 -> s = 0.5; constant velocities 1, 2 and 3."""

    class Constant(nn.Module):
        prediction = "flow"

        def __init__(self, velocity):
            super().__init__()
            self.velocity = nn.Parameter(torch.tensor(velocity))

        def forward(self, x, t, cond):
            return self.velocity.expand_as(x)

    student, target, teacher = (toy_policy(Constant(v), ODE()) for v in (1.0, 2.0, 3.0))
    x0, eps, t, s = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.tensor([0.8]), torch.tensor([0.5])
    # x_t = 0.8 eps, f = x_t - 0.8; x_s = x_t - 0.3 * 3, aim = x_s - 0.5 * 2 = x_t - 1.9: 1.1 apart
    rows = consistency_loss(student, target, teacher, x0, {}, t, s, eps, huber=None)
    assert rows.tolist() == pytest.approx([1.21])
    smooth = consistency_loss(student, target, teacher, x0, {}, t, s, eps, huber=0.3)
    assert smooth.tolist() == pytest.approx([(1.21 + 0.09) ** 0.5 - 0.3])
    smooth.sum().backward()
    assert student.denoiser.velocity.grad is not None
    assert target.denoiser.velocity.grad is None
    assert teacher.denoiser.velocity.grad is None


@pytest.mark.parametrize("target", ["average", pytest.param("student", marks=pytest.mark.slow)])
def test_distillation_reaches_the_closed_form(target):
    """One call ends where 8 Euler steps end, m + s_8 x; the teacher's ends at m whatever the noise.

    An Euler step multiplies the distance from the mean's path by 1 + dt v'(t), v' = (t - (1 - t) s^2) / variance(t).
    """
    torch.manual_seed(0)
    student = toy_policy(Affine(), CPS(noise_level=1.0), steps=2)
    teacher = toy_policy(GaussianDenoiser(FlowPath(), "flow", MEAN, STD), ODE())
    plan = Distillation(fitting=FITTING, grid=8, target=target)
    t = Schedule(steps=8).times()[:-1]
    reached = float((1 - (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) / 8).prod())
    state = fresh_state(FITTING, student.denoiser, seed=0)
    for _ in distill(plan, student, teacher, gaussian_batch, state):
        pass
    x, t, cond = torch.randn(512, 2), torch.ones(512), {"obs": torch.zeros(512, 1)}
    with state.ema_modules(), torch.no_grad():
        off = {name: float((policy.predict(x, t, cond)[0] - MEAN - reached * x).square().mean().sqrt())
               for name, policy in (("student", student), ("teacher", teacher))}
    assert reached == pytest.approx(STD, abs=0.1)
    assert off["student"] < 0.05
    assert off["teacher"] > 0.4


@pytest.mark.parametrize("target", ["average", "student"])
def test_the_target_is_the_average_or_the_student(target):
    torch.manual_seed(0)
    student = toy_policy(MLPDenoiser(), CPS(noise_level=1.0), steps=2)
    teacher = toy_policy(GaussianDenoiser(FlowPath(), "flow", MEAN, STD), ODE())
    plan = Distillation(fitting=replace(FITTING, steps=6), grid=4, target=target, huber=0.1)
    state = fresh_state(plan.fitting, student.denoiser, seed=0)
    loop = distill(plan, student, teacher, gaussian_batch, state)
    for _ in range(5):
        next(loop)
    frozen, average = copy.deepcopy(student), copy.deepcopy(student)
    state.ema.copy_to(average.denoiser)
    for policy in (frozen, average):
        policy.denoiser.requires_grad_(False)
    generator = torch.Generator()
    generator.set_state(state.generator.get_state())
    found = next(loop).metrics["loss"]
    x0, cond = gaussian_batch(generator)
    k = torch.randint(4, (256,), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    times = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    by_hand = {name: float(consistency_loss(frozen, aim, teacher, x0, cond, times[k], times[k + 1], eps,
                                            huber=plan.huber).mean())
               for name, aim in (("average", average), ("student", frozen))}
    assert found == pytest.approx(by_hand[target], rel=1e-5)
    assert by_hand["average"] != pytest.approx(by_hand["student"], rel=1e-3)


def test_the_end_error_is_the_distance_from_the_teachers_chain():
    teacher = toy_policy(GaussianDenoiser(FlowPath(), "flow", MEAN, STD), ODE(), steps=400)
    cond = {"obs": torch.zeros(64, 1)}
    exact = toy_policy(Ends(FlowPath(), "flow"), CPS(noise_level=1.0))
    assert end_error(exact, teacher, cond, generator=torch.Generator().manual_seed(0)).max() < 0.01
    found = end_error(teacher, teacher, cond, generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))  # the teacher's one call is the mean
    torch.testing.assert_close(found, (STD * x).square().mean(1).sqrt(), atol=0.01, rtol=0)


def test_refusals():
    for wrong, message in (({"grid": 0}, "grid must be at least 1"), ({"huber": 0.0}, "huber must be positive"),
                           ({"fitting": replace(FITTING, time="uniform")}, "set fitting.time to grid"),
                           ({"fitting": replace(FITTING, ema_decay=None)}, "needs fitting.ema_decay")):
        with pytest.raises(ValueError, match=message):
            replace(Distillation(fitting=FITTING), **wrong)
    Distillation(fitting=replace(FITTING, ema_decay=None), target="student")
    plan = Distillation(fitting=FITTING, grid=16)
    assert plan.times(Schedule(steps=4, shift=3.0)).equal(Schedule(steps=16, shift=3.0).times())
    for schedule in (Schedule(steps=3), Schedule(steps=4, terminal=0.1), Schedule(steps=32)):
        with pytest.raises(ValueError, match="use a number of steps that divides the grid"):
            plan.times(schedule)
    student = toy_policy(MLPDenoiser(), CPS(noise_level=1.0), steps=4)
    teacher = toy_policy(GaussianDenoiser(FlowPath(), "flow"), ODE())
    state = fresh_state(FITTING, student.denoiser, seed=0)
    skipless = toy_policy(MLPDenoiser(prediction="x0"), CPS(noise_level=1.0), steps=4, path=FlowPath())
    for bad_student, bad_teacher, message in ((skipless, teacher, "not the identity at t = 0"),
                                              (student, replace(teacher, kernel=CPS()), "must be deterministic"),
                                              (student, replace(student, kernel=ODE()), "the student itself")):
        with pytest.raises(ValueError, match=message):
            distill(plan, bad_student, bad_teacher, gaussian_batch, state)
