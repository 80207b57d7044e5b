"""Consistency distillation: a student that jumps from any time of a trajectory to its clean end in one call.

The probability-flow ODE dx/dt = v(x, t) of the teacher carries x_t to one end x_0; call that map f(x_t, t). It is
constant along a trajectory, and f(x, 0) = x:

    d/dt f(x_t, t) = 0   =>   f(x_t, t) = f(x_s, s) for the x_s that the ODE reaches from x_t at s < t,

and with f(x, 0) = x that determines it (Song et al. 2023, arXiv 2303.01469, sec. 3). The student's f is its x0: for
a velocity network on the flow path x0 = x - t v(x, t), which is x at t = 0 whatever the network says, so no skip
connections are needed, and a student may start as its teacher, which is right at s -> 0 already: there E[x_0 | x_s]
and the end of the ODE agree. Elsewhere they do not: the teacher's x0 is a mean over ends, f one of them. On data
x_t = alpha x_0 + sigma eps and adjacent times t > s of a grid the loss is (Song et al., eq. 7)

    E d(f_student(x_t, t), f_target(x_s, s)),    x_s = alpha_s x0_teacher(x_t, t) + sigma_s eps_teacher(x_t, t),

where x_s is one ODE step (on the flow path Euler's) of the teacher, guided if it is, and no gradient passes the
target. Its optimum is the end of the teacher's ODE on the grid's own steps. Sampled by CPS(noise_level=1), x_next =
alpha' f + sigma' fresh noise, this is multistep consistency sampling (alg. 1), and a policy gradient on it is RLCM.

Legend: N rows, G intervals of the grid, *E event axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.gaussian import standard_normal
from diffalign.diffusion.schedules import Schedule
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser
from diffalign.spec import spec
from diffalign.train.state import Iteration, TrainState, frozen_copy
from diffalign.train.supervised import Batch, Metrics, Pretraining, regress


@spec
class Distillation:
    """How a consistency model is distilled.

    grid: intervals between the times at which the student learns, spaced as its sampling schedule, whose times must be
    among them; t is drawn uniformly from the grid (fitting.time: grid). target: the `average` of the student's weights
    (fitting.ema_decay; Song et al. 2023) or the `student` itself, without gradient (Song & Dhariwal 2023, sec. 3.2).
    huber: c of the pseudo-Huber distance sqrt(m + c^2) - c of the mean squared difference m (Song & Dhariwal
    2023, sec. 3.3, there of the sum: c = 0.00054 sqrt(dims)); null is m itself.
    """

    fitting: Pretraining
    grid: int = 16
    target: Literal["average", "student"] = "average"
    huber: float | None = None

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"grid must be at least 1, got {self.grid}")
        if self.huber is not None and not self.huber > 0:
            raise ValueError(f"huber must be positive, or null for the squared distance, got {self.huber}")
        if self.fitting.time != "grid":
            raise ValueError("distillation learns at the times of its grid: set fitting.time to grid, got "
                             f"{self.fitting.time}")
        if self.target == "average" and self.fitting.ema_decay is None:
            raise ValueError("target average needs fitting.ema_decay; set it, or use target: student")

    def times(self, schedule: Schedule) -> Float[Tensor, "G1"]:
        """The grid from 1 to 0 with the schedule's spacing.

        Raises: ValueError if the schedule would sample at a time that the student does not learn at.
        """
        times = Schedule(steps=self.grid, shift=schedule.shift).times()
        gap = (schedule.times()[:, None] - times).abs().amin(1).max()
        if gap > 1e-5:
            raise ValueError(f"the student learns at {self.grid} times with shift {schedule.shift:g} and would be "
                             f"sampled at others by {schedule}; use a number of steps that divides the grid")
        return times


def consistency_loss(student: DiffusionPolicy, target: DiffusionPolicy, teacher: DiffusionPolicy,
                     x0: Float[Tensor, "N *E"], cond: Cond, t: Float[Tensor, "N"], s: Float[Tensor, "N"],
                     eps: Float[Tensor, "N *E"], *, huber: float | None) -> Float[Tensor, "N"]:
    """d(student's x0 at (x_t, t), target's x0 at (x_s, s)) a row, x_s one step of the teacher's kernel from x_t.

    The gradient reaches the student alone.
    """
    level = student.path.level(t, x0.ndim - 1)
    x = level.alpha * x0 + level.sigma * eps
    with torch.no_grad():
        reached = teacher.step(x, t, s, *teacher.predict(x, t, cond), cond).mean
        aim, _ = target.predict(reached, s, cond)
    found, _ = student.predict(x, t, cond)
    squares = ((found - aim) ** 2).flatten(1).mean(1)
    return squares if huber is None else (squares + huber**2).sqrt() - huber


@torch.no_grad()
def end_error(student: DiffusionPolicy, teacher: DiffusionPolicy, cond: Cond, *, generator: torch.Generator
              ) -> Float[Tensor, "N"]:
    """Root mean squared distance, a row, of one call of the student from the end of the teacher's chain.

    Both start from the same noise. An untrained student is off by about the spread of the ends.
    """
    noise = teacher.start(cond).sample(generator)
    end = teacher.act(cond, generator=generator, noise=noise).action
    found, _ = student.predict(noise, torch.ones(len(noise), device=noise.device), student.encoded(cond))
    return ((found - end) ** 2).flatten(1).mean(1).sqrt()


def distill(plan: Distillation, student: DiffusionPolicy, teacher: DiffusionPolicy, batch: Batch, state: TrainState
            ) -> Iterator[Iteration]:
    """Train state.modules["policy"] (the student's denoiser) and yield after every step up to plan.fitting.steps.

    Raises: ValueError for a schedule off the grid, a student that predicts x0, a teacher with a noisy kernel or one
    that is the student.
    """
    if student.denoiser.prediction == "x0":
        raise ValueError("a student that predicts x0 is not the identity at t = 0; let it predict flow, v or eps")
    if teacher.kernel.stochastic:
        raise ValueError(f"the teacher's step must be deterministic, got {teacher.kernel}; use ODE")
    if teacher.denoiser is student.denoiser:
        raise ValueError("the teacher is the student itself and would change with it; give it a frozen copy")
    times = plan.times(student.schedule).to(state.generator.device)
    average = frozen_copy(state.modules["policy"])
    target = replace(student, denoiser=cast(Denoiser, average)) if plan.target == "average" else student

    def loss(generator: torch.Generator) -> tuple[Tensor, Metrics]:
        if state.ema is not None:
            state.ema.copy_to(average)
        x0, cond = batch(generator)
        k = torch.randint(plan.grid, (x0.shape[0],), generator=generator, device=x0.device)
        eps = standard_normal(x0.shape[0], tuple(x0.shape[1:]), x0.device).sample(generator)
        return consistency_loss(student, target, teacher, x0, cond, times[k], times[k + 1], eps,
                                huber=plan.huber).mean(), {}

    return regress(plan.fitting, loss, state)
