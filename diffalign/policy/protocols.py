"""The abstract types of the policy layer.

Legend: N rows, *E event axes, t in [0, 1] path time with 1 = noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.paths import Prediction
from diffalign.diffusion.trajectories import Cond, DenoisingTrajectory


@runtime_checkable
class Denoiser(Protocol):
    """A network, or a wrapper of networks (guidance, composition, reference): predicts from a noisy x.

    Implementations that own parameters are `nn.Module`s; the policy's `denoiser` must be one to be trained.
    """

    @property
    def prediction(self) -> Prediction: ...

    def __call__(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]: ...


@runtime_checkable
class Encodes(Protocol):
    """A denoiser that first turns its condition into another one, e.g. images into features."""

    def encode(self, cond: Cond) -> Cond:
        """The condition of all steps of a chain; one that is encoded already is returned as it is."""
        ...


@dataclass(frozen=True)
class Decision:
    """What a policy decided for N rows: the action (image, latent or action chunk) and how it was denoised.

    signals: what an off-policy learner must remember beside the action, every leaf [N, ...].
    """

    action: Float[Tensor, "N *E"]
    trajectory: DenoisingTrajectory
    signals: Cond = field(default_factory=dict)


@runtime_checkable
class Policy(Protocol):
    """What an environment or a prompt source needs."""

    def window(self, generator: torch.Generator) -> Tensor | None:
        """What all decisions of one rollout share: the trained denoising steps [K], or None."""
        ...

    def act(self, cond: Cond, *, generator: torch.Generator, trained: Tensor | None = None) -> Decision:
        """One decision per row of cond; `trained` is the rollout's window."""
        ...


@runtime_checkable
class BasePolicy(Policy, Protocol):
    """A frozen policy that an improvement operator changes: a denoising chain, or one whose chunks are queued."""

    @property
    def event(self) -> tuple[int, ...]: ...


@runtime_checkable
class ValueCritic(Protocol):
    """State value V(cond), one number per row."""

    def __call__(self, cond: Cond) -> Float[Tensor, "N"]: ...


def num_rows(cond: Cond) -> int:
    """The number of rows N of a conditioning mapping."""
    sizes = {name: leaf.shape[0] for name, leaf in cond.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"conditioning leaves must share their first axis, got {sizes}")
    return next(iter(sizes.values()))


def encoded(denoiser: Denoiser, cond: Cond) -> Cond:
    """The condition as the denoiser's steps need it: encoded where it encodes."""
    return denoiser.encode(cond) if isinstance(denoiser, Encodes) else cond


def select_rows(cond: Cond, index: Tensor) -> dict[str, Tensor]:
    """Rows `index` of every leaf."""
    return {name: leaf[index] for name, leaf in cond.items()}


def repeat_rows(cond: Cond, times: int) -> dict[str, Tensor]:
    """Every row `times` times, in a row."""
    return {name: leaf.repeat_interleave(times, 0) for name, leaf in cond.items()}
