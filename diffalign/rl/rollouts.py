"""One rollout type for images (H = 1) and robots (H decisions).

Legend: H decisions, B parallel episodes (prompts x group, or environments), N = H * B rows in time-major order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffalign.diffusion.trajectories import Cond, DenoisingTrajectory
from diffalign.policy.diffusion import DiffusionPolicy

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Rollout:
    """Experience of one policy version.

    `trajectory` rows and `next_cond` rows are N = H * B, time-major (row h * B + b). `next_cond` is the observation
    after the step and before any reset. `terminated` ends the task, `truncated` is a time limit: the first removes
    the bootstrap value, both end the episode. `valid` is False for decisions that were not executed (an environment
    that idles after its episode ended). `group` numbers rows that are compared with each other, `prompt` names the
    condition across iterations for running statistics. `stats` are logged as they are. `signals` are those of the
    policy's decisions, rows as in `trajectory`.
    """

    trajectory: DenoisingTrajectory
    reward: Float[Tensor, "H B"]
    terminated: Bool[Tensor, "H B"]
    truncated: Bool[Tensor, "H B"]
    valid: Bool[Tensor, "H B"]
    next_cond: Cond
    group: Int[Tensor, "B"]
    prompt: Int[Tensor, "B"]
    stats: Metrics
    signals: Cond = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.reward.numel()
        if self.trajectory.x.shape[0] != rows:
            raise ValueError(f"trajectory has {self.trajectory.x.shape[0]} rows, reward {tuple(self.reward.shape)} "
                             f"needs {rows} (time-major H * B)")
        bad = ~torch.isfinite(self.reward)
        if bool(bad.any()):
            h, b = (int(i) for i in bad.nonzero()[0])
            raise FloatingPointError(f"reward of decision {h}, episode {b} is {self.reward[h, b].item()}; "
                                     f"{int(bad.sum())} of {rows} rewards are not finite. "
                                     "Fix the reward or the environment; nothing was updated")


@runtime_checkable
class RolloutSource(Protocol):
    """An environment, a prompt set with rewards, or a learned model: collects with the current policy."""

    def collect(self, policy: DiffusionPolicy, *, generator: torch.Generator) -> Rollout:
        """One rollout; all randomness comes from the generator, so that a resumed run repeats it."""
        ...


def image_rollout(trajectory: DenoisingTrajectory, reward: Float[Tensor, "B"], group: Int[Tensor, "B"],
                  prompt: Int[Tensor, "B"], stats: Metrics) -> Rollout:
    """The H = 1 rollout of a prompt batch: every episode is one decision that terminates."""
    ended = torch.ones(1, reward.shape[0], dtype=torch.bool, device=reward.device)
    return Rollout(trajectory, reward[None], ended, torch.zeros_like(ended), torch.ones_like(ended),
                   trajectory.cond, group, prompt, stats)
