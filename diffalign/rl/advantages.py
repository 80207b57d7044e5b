"""Advantage estimators: pure functions on [H, B] and the specs that name them in a config.

Legend: H decisions, B parallel episodes, P distinct prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffalign.spec import spec

Statistics = Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What an estimator reads: rewards and episode ends of the gathered batch, values where there is a critic."""

    reward: Float[Tensor, "H B"]
    terminated: Bool[Tensor, "H B"]
    truncated: Bool[Tensor, "H B"]
    valid: Bool[Tensor, "H B"]
    group: Int[Tensor, "B"]
    prompt: Int[Tensor, "B"]
    value: Float[Tensor, "H B"] | None = None
    next_value: Float[Tensor, "H B"] | None = None

    @property
    def episode_return(self) -> Float[Tensor, "B"]:
        """Undiscounted sum of the valid rewards."""
        return (self.reward * self.valid).sum(0)


@dataclass(frozen=True)
class Estimate:
    """Advantage per decision and, with a critic, the value target."""

    advantage: Float[Tensor, "H B"]
    target: Float[Tensor, "H B"] | None
    statistics: Statistics


@runtime_checkable
class AdvantageEstimator(Protocol):
    """A spec; `statistics` is what it returned last time (empty at first)."""

    @property
    def needs_critic(self) -> bool: ...
    def __call__(self, outcome: Outcome, statistics: Statistics) -> Estimate: ...


def gae(reward: Float[Tensor, "H B"], value: Float[Tensor, "H B"], next_value: Float[Tensor, "H B"],
        terminated: Bool[Tensor, "H B"], truncated: Bool[Tensor, "H B"], *, gamma: float, lam: float
        ) -> Float[Tensor, "H B"]:
    """delta_h = r_h + gamma V(s_{h+1}) [not terminated] - V(s_h);  A_h = delta_h + gamma lam A_{h+1} [episode goes on].

    Schulman et al. 2016, eq. 16. `next_value` is the value of the observation after the step and before a reset, so
    a time-out bootstraps (DPPO's public code does not) and nothing flows across an episode boundary.
    """
    delta = reward + gamma * next_value * ~terminated - value
    goes_on = (~(terminated | truncated)).to(reward.dtype)
    advantage = torch.zeros_like(reward)
    running = torch.zeros_like(reward[0])
    for h in reversed(range(reward.shape[0])):
        running = delta[h] + gamma * lam * goes_on[h] * running
        advantage[h] = running
    return advantage


def group_sums(x: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of x over the row's group, size of the row's group, compact group index), each [B]."""
    _, index = torch.unique(group, return_inverse=True)
    total = torch.zeros(int(index.max()) + 1, dtype=x.dtype, device=x.device)
    size = torch.zeros_like(total).index_add(0, index, torch.ones_like(x))
    if bool((size < 2).any()):
        raise ValueError(f"a group of one row has no baseline ({int((size < 2).sum())} of {len(size)} groups); "
                         "use at least two samples per prompt, or the prompt_running advantage")
    return total.index_add(0, index, x)[index], size[index], index


def group_normalized(reward: Float[Tensor, "B"], group: Int[Tensor, "B"], *,
                     scale: Literal["group", "batch", "none"] = "group", eps: float = 1e-4) -> Float[Tensor, "B"]:
    """(r - mean of the group) / (std + eps), population std.

    Shao et al. 2024 (DeepSeekMath), sec. 4.1.1. scale: the group's std, the batch's std (Flow-GRPO's `global_std`:
    groups of equal rewards stay small), or none (Dr.GRPO, Liu et al. 2025).

    Raises: ValueError if a group has one member.
    """
    total, size, _ = group_sums(reward, group)
    centered = reward - total / size
    if scale == "none":
        return centered
    if scale == "batch":
        return centered / (reward.std(correction=0) + eps)
    squares, _, _ = group_sums(centered**2, group)
    return centered / ((squares / size).sqrt() + eps)


def tied_fraction(reward: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> float:
    """The share of groups whose rewards are all equal, so that nothing can be learned from them."""
    numbers, index = torch.unique(group, return_inverse=True)
    low, high = (torch.zeros(len(numbers), dtype=reward.dtype, device=reward.device).scatter_reduce(
        0, index, reward, how, include_self=False) for how in ("amin", "amax"))
    return float((low == high).float().mean())


def extremes(reward: Float[Tensor, "B"], group: Int[Tensor, "B"], keep: int) -> Bool[Tensor, "B"]:
    """Whether a row is among the `keep` best or the `keep` worst of its group, ties to the first (DanceGRPO).

    Raises: ValueError if a group has fewer than 2 keep rows.
    """
    chosen = torch.zeros_like(reward, dtype=torch.bool)
    for number in torch.unique(group).tolist():
        rows = torch.nonzero(group == number).flatten()
        if len(rows) < 2 * keep:
            raise ValueError(f"a group of {len(rows)} rows has no best {keep} and worst {keep}; raise the samples per "
                             "prompt, or lower extremes")
        order = reward[rows].argsort(descending=True, stable=True)
        chosen[rows[torch.cat([order[:keep], order[-keep:]])]] = True
    return chosen


def leave_one_out(reward: Float[Tensor, "B"], group: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """r_i - mean of the others in the group (RLOO, Ahmadian et al. 2024; the form of LOOP)."""
    total, size, _ = group_sums(reward, group)
    return reward - (total - reward) / (size - 1)


def prompt_running(reward: Float[Tensor, "B"], prompt: Int[Tensor, "B"], statistics: Statistics, *, buffer: int,
                   min_count: int, eps: float = 1e-6) -> tuple[Float[Tensor, "B"], Statistics]:
    """DDPO's per-prompt tracker: (r - mean) / (std + eps) over the prompt's last `buffer` rewards, these included.

    Black et al. 2023, sec. 4.3 and their code. A prompt with fewer than min_count rewards uses the batch's mean and
    std. The new statistics hold the rewards [P, buffer] (newest last, NaN where empty).
    """
    known = statistics.get("rewards", torch.empty(0, buffer, dtype=reward.dtype))
    missing = int(prompt.max()) + 1 - known.shape[0]
    if missing > 0:
        known = torch.cat([known, torch.full((missing, buffer), float("nan"), dtype=reward.dtype)])
    known = known.clone()
    advantage = (reward - reward.mean()) / (reward.std(correction=0) + eps)
    for p in torch.unique(prompt).tolist():
        rows = prompt == p
        history = known[p][~known[p].isnan()]
        history = torch.cat([history, reward[rows]])[-buffer:]
        known[p] = torch.cat([torch.full((buffer - len(history),), float("nan"), dtype=reward.dtype), history])
        if len(history) >= min_count:
            advantage[rows] = (reward[rows] - history.mean()) / (history.std(correction=0) + eps)
    return advantage, {"rewards": known}


def whiten(advantage: Float[Tensor, "H B"], valid: Bool[Tensor, "H B"], eps: float = 1e-8) -> Float[Tensor, "H B"]:
    """Mean 0 and std 1 over the valid entries of the whole batch."""
    chosen = advantage[valid]
    return (advantage - chosen.mean()) / (chosen.std(correction=0) + eps)


def _spread(outcome: Outcome, per_episode: Tensor, statistics: Statistics, clip: float | None) -> Estimate:
    advantage = per_episode if clip is None else per_episode.clamp(-clip, clip)
    return Estimate(advantage.expand_as(outcome.reward) * outcome.valid, None, statistics)


@spec
class GAE:
    """Generalized advantage estimation with a value critic. gamma and lam are per decision (a chunk is one)."""

    type: Literal["gae"] = "gae"
    gamma: float = 0.99
    lam: float = 0.95
    whiten: bool = True
    needs_critic = True

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def __call__(self, outcome: Outcome, statistics: Statistics) -> Estimate:
        """Advantages and the lambda-return targets."""
        if outcome.value is None or outcome.next_value is None:
            raise ValueError("the gae advantage needs a value critic")
        advantage = gae(outcome.reward, outcome.value, outcome.next_value, outcome.terminated, outcome.truncated,
                        gamma=self.gamma, lam=self.lam)
        target = advantage + outcome.value
        if self.whiten:
            advantage = whiten(advantage, outcome.valid)
        return Estimate(advantage * outcome.valid, target, statistics)


@spec
class GroupNormalized:
    """GRPO: the episode return against its group's mean; scale `none` is Dr.GRPO, `batch` is Flow-GRPO's global std.

    extremes: only so many best and as many worst episodes of a group keep their advantage, the others get 0
    (DanceGRPO's best-of-N; with optimization.skip_zero_advantage they cost nothing).
    """

    type: Literal["group"] = "group"
    scale: Literal["group", "batch", "none"] = "group"
    whiten: bool = False
    clip: float | None = 5.0
    extremes: int | None = None
    needs_critic = False

    def __post_init__(self) -> None:
        if self.extremes is not None and self.extremes < 1:
            raise ValueError(f"extremes must be at least 1 or null, got {self.extremes}")

    def __call__(self, outcome: Outcome, statistics: Statistics) -> Estimate:
        """One advantage per episode, the same for all its decisions."""
        advantage = group_normalized(outcome.episode_return, outcome.group, scale=self.scale)
        if self.whiten:
            advantage = whiten(advantage[None], torch.ones_like(advantage[None], dtype=torch.bool))[0]
        if self.extremes is not None:
            advantage = advantage * extremes(outcome.episode_return, outcome.group, self.extremes)
        return _spread(outcome, advantage, statistics, self.clip)


def best_of_group(reward: Float[Tensor, "B"], group: Int[Tensor, "B"], keep: int) -> Float[Tensor, "B"]:
    """size / keep for the `keep` best rows of each group and 0 for the others: weights of mean 1, ties to the first.

    Raises: ValueError if a group has fewer than keep rows.
    """
    weight = torch.zeros_like(reward)
    for number in torch.unique(group).tolist():
        rows = torch.nonzero(group == number).flatten()
        if len(rows) < keep:
            raise ValueError(f"a group of {len(rows)} rows cannot keep its best {keep}; raise the samples per prompt")
        order = reward[rows].argsort(descending=True, stable=True)
        weight[rows[order[:keep]]] = len(rows) / keep
    return weight


@spec
class BestOfGroup:
    """Rejection sampling (RAFT, Dong et al. 2023): the best `keep` episodes of a group count, the others do not.

    For the weighted surrogate. One round of it moves the policy by at most log(size / keep) nats.
    """

    type: Literal["best_of_group"] = "best_of_group"
    keep: int = 2
    needs_critic = False

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")

    def __call__(self, outcome: Outcome, statistics: Statistics) -> Estimate:
        """One weight per episode, the same for all its decisions."""
        return _spread(outcome, best_of_group(outcome.episode_return, outcome.group, self.keep), statistics, None)


@spec
class LeaveOneOut:
    """RLOO: the episode return against the mean of the others in its group."""

    type: Literal["leave_one_out"] = "leave_one_out"
    clip: float | None = None
    needs_critic = False

    def __call__(self, outcome: Outcome, statistics: Statistics) -> Estimate:
        """One advantage per episode, the same for all its decisions."""
        return _spread(outcome, leave_one_out(outcome.episode_return, outcome.group), statistics, self.clip)


@spec
class PromptRunning:
    """DDPO: the reward against running statistics of its prompt; works with one sample per prompt."""

    type: Literal["prompt_running"] = "prompt_running"
    buffer: int = 32
    min_count: int = 16
    clip: float | None = 5.0
    needs_critic = False

    def __post_init__(self) -> None:
        if not 2 <= self.min_count <= self.buffer:
            raise ValueError(f"need 2 <= min_count <= buffer, got {self.min_count} and {self.buffer}")

    def __call__(self, outcome: Outcome, statistics: Statistics) -> Estimate:
        """One advantage per episode; the statistics go into the checkpoint."""
        advantage, new = prompt_running(outcome.episode_return, outcome.prompt, statistics, buffer=self.buffer,
                                        min_count=self.min_count)
        return _spread(outcome, advantage, new, self.clip)
