"""Pre-training: regression of the denoiser, the same loop for images and for behaviour cloning.

Legend: N rows, *E event axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.gaussian import standard_normal
from diffalign.diffusion.paths import training_target
from diffalign.diffusion.schedules import shifted
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.spec import spec
from diffalign.train import update
from diffalign.train.state import Iteration, TrainState, cosine, scale_learning_rates

Batch = Callable[[torch.Generator], tuple[Tensor, Cond]]
Metrics = Mapping[str, float]


@spec
class Pretraining:
    """Denoising (eps) or flow-matching regression.

    time: how t is drawn: `grid` = uniformly on the policy's own schedule (a K-step DDPM), `uniform` on (0, 1),
    `logit_normal` = sigmoid of a standard normal (SD3, sec. 3.1); the last two are then moved towards 1 by `shift` s:
    s t / (1 + (s - 1) t) (SD3, eq. 23). Cosine decay after `warmup_steps`; beta2 is Adam's.
    """

    steps: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-6
    ema_decay: float | None = 0.995
    max_grad_norm: float | None = 1.0
    beta2: float = 0.999
    time: Literal["uniform", "logit_normal", "grid"] = "uniform"
    shift: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {self.beta2}")
        if not self.shift > 0 or (self.time == "grid" and self.shift != 1.0):
            raise ValueError(f"shift must be positive, and 1 with time: grid (schedules shift too), got {self.shift}")


def draw_times(spec: Pretraining, policy: DiffusionPolicy, rows: int, generator: torch.Generator) -> Float[Tensor, "N"]:
    """Path times of one batch, in (0, 1]."""
    device = generator.device
    if spec.time == "grid":
        grid = policy.schedule.times()[:-1].to(device)
        return grid[torch.randint(len(grid), (rows,), generator=generator, device=device)]
    if spec.time == "logit_normal":
        t = torch.randn(rows, generator=generator, device=device).sigmoid()
    else:
        t = 1 - torch.rand(rows, generator=generator, device=device)
    return shifted(t, spec.shift)


def denoising_loss(policy: DiffusionPolicy, x0: Float[Tensor, "N *E"], cond: Cond, t: Float[Tensor, "N"],
                   eps: Float[Tensor, "N *E"]) -> Float[Tensor, "N"]:
    """Mean squared error over the event between the denoiser and its target at (t, eps)."""
    level = policy.path.level(t, x0.ndim - 1)
    x = level.alpha * x0 + level.sigma * eps
    target = training_target(policy.denoiser.prediction, x0, eps, level)
    return ((policy.denoiser(x, t, cond) - target) ** 2).flatten(1).mean(1)


def fit(spec: Pretraining, policy: DiffusionPolicy, batch: Batch, state: TrainState) -> Iterator[Iteration]:
    """Train state.modules["policy"] (the policy's denoiser) and yield after every step up to spec.steps."""

    def loss(generator: torch.Generator) -> tuple[Tensor, Metrics]:
        x0, cond = batch(generator)
        t = draw_times(spec, policy, x0.shape[0], generator)
        eps = standard_normal(x0.shape[0], tuple(x0.shape[1:]), x0.device).sample(generator)
        return denoising_loss(policy, x0, cond, t, eps).mean(), {}

    return regress(spec, loss, state)


def regress(spec: Pretraining, loss: Callable[[torch.Generator], tuple[Tensor, Metrics]], state: TrainState
            ) -> Iterator[Iteration]:
    """Minimise a loss that draws its own batch from the state's generator; yield after every step up to spec.steps.

    The loss comes with further metrics of its batch.
    """
    while state.step < spec.steps:
        scale_learning_rates(state, learning_rate_factor(spec, state.step))
        metrics = update.step(state, [(1.0, lambda: loss(state.generator))], max_grad_norm=spec.max_grad_norm)
        state.step += 1
        yield Iteration(state.step, metrics)


def fresh_state(spec: Pretraining, module: nn.Module, *, seed: int) -> TrainState:
    """The untrained state of a regression whose one module is the "policy"."""
    return TrainState.create({"policy": module}, {"policy": spec.learning_rate}, weight_decay=spec.weight_decay,
                             beta2=spec.beta2, ema_decay=spec.ema_decay, seed=seed)


def learning_rate_factor(spec: Pretraining, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0 at the last step."""
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return cosine(done)
