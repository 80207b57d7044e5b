"""The denoising chain as a policy: denoiser + path + kernel + schedule.

Legend: N rows, K denoising steps, *E event axes, M scored rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.gaussian import Gaussian, standard_normal
from diffalign.diffusion.kernels import ODE, Kernel, NoisyODE
from diffalign.diffusion.paths import FlowPath, Path, convert
from diffalign.diffusion.schedules import Schedule, TrainedSteps
from diffalign.diffusion.trajectories import Cond, DenoisingTrajectory
from diffalign.policy.injection import Injects
from diffalign.policy.protocols import Decision, Denoiser, encoded, num_rows
from diffalign.policy.steering import Steers


@dataclass(frozen=True)
class DiffusionPolicy:
    """A stochastic policy whose action is the end of a denoising chain (DDPO, sec. 4; DPPO, sec. 4).

    event: shape of what is denoised, e.g. (3, 32, 32) or (chunk, action_dim). clip_x0 clamps the predicted x0 to
    +-clip_x0 and re-derives eps, as DPPO does for normalized actions; with clipped_eps False the eps of the
    network stays (diffusers' DDIM). zero_noise starts the chain at the start's mean (x = 0 unless it is steered)
    instead of a draw (an evaluation choice). executed: the entries [first, last) of the event's first axis that are
    the action, None for all; the others are denoised with it and thrown away (Diffusion Policy's horizon).

    Raises: ValueError if the kernel is only right on the flow path and the path is another one, or if the executed
    entries do not lie in the event.
    """

    denoiser: Denoiser
    path: Path
    kernel: Kernel
    schedule: Schedule
    event: tuple[int, ...]
    trained: TrainedSteps = field(default_factory=TrainedSteps)
    clip_x0: float | None = None
    zero_noise: bool = False
    clipped_eps: bool = True
    executed: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.executed is not None and not 0 <= self.executed[0] < self.executed[1] <= self.event[0]:
            raise ValueError(f"the executed entries {self.executed} do not lie in an event of {self.event[0]}")
        if self.kernel.flow_only and not isinstance(self.path, FlowPath):
            raise ValueError(f"{type(self.kernel).__name__} is derived for the flow path, got {self.path}; "
                             "use DDPM, DDIM(eta > 0) or CPS on other paths")

    def with_sampler(self, kernel: Kernel, schedule: Schedule | None = None, *, zero_noise: bool = False
                     ) -> DiffusionPolicy:
        """The same denoiser sampled another way, e.g. by the ODE for evaluation."""
        return replace(self, kernel=kernel, schedule=schedule or self.schedule, zero_noise=zero_noise,
                       trained=TrainedSteps())

    def predict(self, x: Float[Tensor, "M *E"], t: Float[Tensor, "M"], cond: Cond
                ) -> tuple[Float[Tensor, "M *E"], Float[Tensor, "M *E"]]:
        """(x0, eps) of the denoiser at (x, t), after clip_x0."""
        level = self.path.level(t, x.ndim - 1)
        x0, eps = convert(self.denoiser.prediction, self.denoiser(x, t, cond), x, level)
        if self.clip_x0 is not None:
            x0 = x0.clamp(-self.clip_x0, self.clip_x0)
            if self.clipped_eps:
                eps = (x - level.alpha * x0) / level.sigma
        return x0, eps

    def step(self, x: Float[Tensor, "M *E"], t: Float[Tensor, "M"], t_next: Float[Tensor, "M"],
             x0: Float[Tensor, "M *E"], eps: Float[Tensor, "M *E"], cond: Cond) -> Gaussian:
        """p(x_next | x) of the policy's kernel for a prediction made at (x, t); std from the denoiser if it injects."""
        step = self.kernel.moments(x, x0, eps, self.path.level(t, x.ndim - 1), self.path.level(t_next, x.ndim - 1))
        if isinstance(self.kernel, NoisyODE) and isinstance(self.denoiser, Injects):
            return Gaussian(step.mean, self.kernel.between(self.denoiser.noise_share(t, self.encoded(cond))))
        return step

    def leverage(self, t: Float[Tensor, "M"], t_next: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
        """|d mean / d output| of a step: how far the mean of x_next moves when the network's output does by one.

        Every kernel's mean is linear in (x, x0, eps), and these are linear in (x, output); x stays. For a network that
        predicts the velocity it is |d mean / d velocity|.
        """
        now, nxt = self.path.level(t, 1), self.path.level(t_next, 1)
        nothing = torch.zeros_like(now.alpha)
        x0, eps = convert(self.denoiser.prediction, nothing + 1, nothing, now)
        return self.kernel.moments(nothing, x0, eps, now, nxt).mean.abs().flatten()

    def start(self, cond: Cond) -> Gaussian:
        """Where the chain starts: N(0, I), or what a steered denoiser learned."""
        if isinstance(self.denoiser, Steers):
            return self.denoiser.start(self.encoded(cond))
        return standard_normal(num_rows(cond), self.event, next(iter(cond.values())).device)

    def during(self, update: int) -> DiffusionPolicy:
        """The policy with the trained steps that the update of this number (0 = first) has."""
        return replace(self, trained=self.trained.at(update, self.schedule.steps))

    def encoded(self, cond: Cond) -> Cond:
        """The condition as the denoiser encodes it; give it to `predict` and `step` to encode only once."""
        return encoded(self.denoiser, cond)

    def window(self, generator: torch.Generator) -> Tensor:
        """A draw of the trained denoising steps [K], for all decisions of one rollout."""
        return self.trained.draw(self.schedule.steps, generator)

    @torch.no_grad()
    def act(self, cond: Cond, *, generator: torch.Generator, trained: Tensor | None = None,
            noise: Float[Tensor, "N *E"] | None = None, step_noise: Float[Tensor, "N K *E"] | None = None
            ) -> Decision:
        """Run the chain for every row of cond and keep what the transition likelihood needs; cond is encoded once.

        `trained` [K] overrides the schedule's own draw, so that all decisions of one rollout share a window; `noise`
        overrides the draw of the chain's start, `step_noise` the standard normal draws of the steps (those of
        deterministic steps are not used).

        Raises: ValueError if given noise has another shape.
        """
        rows, silent = num_rows(cond), replace(self, kernel=ODE())
        device = next(iter(cond.values())).device
        times = self.schedule.times().to(device)
        window = self.window(generator) if trained is None else trained
        trained = window.clone()
        seen = self.encoded(cond)
        start = self.start(seen)
        if noise is None:
            noise = start.mean if self.zero_noise else start.sample(generator)
        elif noise.shape != start.mean.shape:
            raise ValueError(f"noise must be {tuple(start.mean.shape)} (rows of cond, event), got {tuple(noise.shape)}")
        wanted = (rows, self.schedule.steps, *self.event)
        if step_noise is not None and step_noise.shape != wanted:
            raise ValueError(f"step_noise must be {wanted} (rows of cond, steps, event), got {tuple(step_noise.shape)}")
        x = noise
        xs, means, stds, log_probs = [x], [], [], []
        for k in range(self.schedule.steps):
            t, t_next = times[k].expand(rows), times[k + 1].expand(rows)
            x0, eps = self.predict(x, t, seen)
            sampler = silent if self.trained.ode_elsewhere and not bool(window[k]) else self
            step = sampler.step(x, t, t_next, x0, eps, seen)
            noisy = bool((step.std > 0).all())
            if noisy:
                x = step.sample(generator) if step_noise is None else step.mean + step.std * step_noise[:, k]
            else:
                x = step.mean
            scored = noisy and bool(window[k])
            trained[k] = scored
            xs.append(x)
            means.append(step.mean if scored else torch.zeros_like(x))
            stds.append(step.std if scored else torch.zeros_like(step.std))
            log_probs.append(step.log_prob(x) if scored else torch.zeros(rows, device=device))
        trajectory = DenoisingTrajectory(torch.stack(xs, 1), times, trained, torch.stack(log_probs, 1),
                                         torch.stack(means, 1), torch.stack(torch.broadcast_tensors(*stds), 1), cond)
        return Decision(x if self.executed is None else x[:, slice(*self.executed)], trajectory)
