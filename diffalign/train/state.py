"""Everything that training changes, in one place that a checkpoint can hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Iteration:
    """What one step of a training loop reports."""

    step: int
    metrics: dict[str, float]


class TrainState:
    """Modules, optimizer, EMA, running statistics, step count and the random generator.

    modules: by role, e.g. {"policy": ..., "critic": ...}; ema: the averaged copy of the "policy" module or None;
    statistics: tensors of advantage estimators; counters: totals that a job keeps (environment steps, images); step:
    finished iterations.
    """

    def __init__(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, ema: EMA | None,
                 generator: torch.Generator) -> None:
        self.modules = dict(modules)
        self.optimizer = optimizer
        self.ema = ema
        self.statistics: dict[str, Tensor] = {}
        self.counters: dict[str, float] = {}
        self.step = 0
        self.generator = generator

    @classmethod
    def create(cls, modules: Mapping[str, nn.Module], learning_rates: Mapping[str, float], *, weight_decay: float = 0.0,
               beta2: float = 0.999, ema_decay: float | None = None, seed: int) -> TrainState:
        """A fresh state: AdamW with one parameter group per module that has a learning rate.

        Only parameters with requires_grad are trained; a module without a learning rate is carried but not trained.
        """
        unknown = set(learning_rates) - set(modules)
        if unknown:
            raise ValueError(f"learning rates for {sorted(unknown)}, but the modules are {sorted(modules)}")
        groups = [{"params": [p for p in modules[name].parameters() if p.requires_grad], "lr": rate, "name": name,
                   "initial_lr": rate} for name, rate in learning_rates.items()]
        empty = [str(group["name"]) for group in groups if not group["params"]]
        if empty:
            raise ValueError(f"modules {empty} have no trainable parameters; unfreeze them or drop their learning rate")
        optimizer = torch.optim.AdamW(groups, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
        device = next(modules[next(iter(learning_rates))].parameters()).device
        ema = EMA(modules["policy"], ema_decay) if ema_decay is not None else None
        return cls(modules, optimizer, ema, torch.Generator(device).manual_seed(seed))

    def count(self, name: str, amount: float) -> float:
        """Add to a counter and return its total."""
        self.counters[name] = self.counters.get(name, 0.0) + amount
        return self.counters[name]

    @contextmanager
    def ema_modules(self) -> Iterator[None]:
        """Within the block the "policy" module holds the averaged weights (no change without an EMA)."""
        if self.ema is None:
            yield
            return
        with holding(self.modules["policy"], self.ema.weights):
            yield


@contextmanager
def holding(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the module's parameters of these names hold `weights`, which hold the module's meanwhile."""
    _exchange(module, weights)
    try:
        yield
    finally:
        _exchange(module, weights)


@torch.no_grad()
def _exchange(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in weights:
            held = parameter.clone()
            parameter.copy_(weights[name])
            weights[name].copy_(held)


def scale_learning_rates(state: TrainState, factor: float) -> None:
    """Set every group's learning rate to `factor` times its initial one."""
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def cosine(done: float) -> float:
    """1 at done = 0, falling to 0 at done = 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


class EMA:
    """Exponential moving average of a module's trainable parameters.

    decay is reached as min(decay, (1 + n) / (10 + n)) over n updates, so that early averages are not stuck at the
    initial weights (the warm-up of Flow-GRPO and of diffusers' EMAModel).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """One averaging step towards the module's current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, p in module.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(p.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged weights into the module."""
        for name, p in module.named_parameters():
            if name in self.weights:
                p.copy_(self.weights[name])


def frozen_copy(module: nn.Module) -> nn.Module:
    """A detached copy in evaluation mode, e.g. the reference policy."""
    return copy.deepcopy(module).eval().requires_grad_(False)
