"""Replay: decisions with their n-step returns, in a ring of plain tensors that a checkpoint can hold.

Legend: H decisions, B episodes, N = H * B rows, S stored decisions, M sampled ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.protocols import select_rows
from diffalign.rl.rollouts import Rollout

ONLINE, DEMONSTRATION = 0, 1  # where a decision came from: the `source` column


@dataclass(frozen=True)
class Transitions:
    """Decisions: r = sum of gamma^i r_i over the steps taken, discount = gamma^steps, 0 after termination.

    chosen is what the critic scores (an action, or the noise that made it). signals / next_signals are what the base
    policy said at cond and at next_cond when the decision was made.
    """

    cond: Cond
    chosen: Float[Tensor, "M *E"]
    reward: Float[Tensor, "M"]
    discount: Float[Tensor, "M"]
    next_cond: Cond
    signals: Cond
    next_signals: Cond
    source: Float[Tensor, "M"]

    def columns(self) -> dict[str, Tensor]:
        """Flat tensors by column name."""
        flat = {"chosen": self.chosen, "reward": self.reward, "discount": self.discount, "source": self.source}
        for name in ("cond", "next_cond", "signals", "next_signals"):
            flat |= {f"{name}.{leaf}": tensor for leaf, tensor in getattr(self, name).items()}
        return flat

    def without_signals(self) -> Transitions:
        """The same decisions with nothing of the base, for critics that do not ask it."""
        return replace(self, signals={}, next_signals={})

    @classmethod
    def of(cls, columns: Mapping[str, Tensor]) -> Transitions:
        """The inverse of `columns`."""
        nested: dict[str, dict[str, Tensor]] = {name: {} for name in ("cond", "next_cond", "signals", "next_signals")}
        for name, tensor in columns.items():
            group, _, leaf = name.partition(".")
            if leaf:
                nested[group][leaf] = tensor
        return cls(chosen=columns["chosen"], reward=columns["reward"], discount=columns["discount"],
                   source=columns["source"], cond=nested["cond"], next_cond=nested["next_cond"],
                   signals=nested["signals"], next_signals=nested["next_signals"])


def transitions(rollout: Rollout, ask: Callable[[Cond], Cond], *, gamma: float, steps: int) -> Transitions:
    """The executed decisions of a rollout with their n-step returns.

    Sums stop at the end of the episode: a termination has discount 0, a time-out keeps gamma^i and the observation
    before the reset, where `ask` gives the base's signals. Elsewhere the next signals are those that the policy acted
    on next.
    """
    horizon, episodes = rollout.reward.shape
    ended = rollout.terminated | rollout.truncated
    ended = ended | ~rollout.valid
    ended[-1] = True
    reward, discount = torch.zeros_like(rollout.reward), torch.zeros_like(rollout.reward)
    last = torch.zeros(horizon, episodes, dtype=torch.long)
    for h in range(horizon):
        going = torch.ones(episodes, dtype=torch.bool)
        for i in range(min(steps, horizon - h)):
            reward[h] += torch.where(going, gamma**i * rollout.reward[h + i], 0.0)
            last[h] = torch.where(going, h + i, last[h])
            discount[h] = torch.where(going, gamma ** (i + 1) * (~rollout.terminated[h + i]).float(), discount[h])
            going = going & ~ended[h + i]
    column = torch.arange(episodes).expand(horizon, episodes)
    final = (last * episodes + column).flatten()  # the row after which the next state lies
    following = {name: leaf[(final + episodes).clamp(max=horizon * episodes - 1)]
                 for name, leaf in rollout.signals.items()}
    cut = ended.flatten()[final]
    at_end = ask(select_rows(rollout.next_cond, final[cut]))
    for name, leaf in at_end.items():
        following[name][cut] = leaf
    kept = rollout.valid.flatten()
    signals = {name: leaf for name, leaf in rollout.signals.items() if name != "chosen"}
    following.pop("chosen", None)
    return Transitions(cond=select_rows(rollout.trajectory.cond, kept), chosen=rollout.signals["chosen"][kept],
                       reward=reward.flatten()[kept], discount=discount.flatten()[kept],
                       next_cond=select_rows(select_rows(rollout.next_cond, final), kept),
                       signals=select_rows(signals, kept), next_signals=select_rows(following, kept),
                       source=torch.full((int(kept.sum()),), float(ONLINE)))


class Replay:
    """A ring of at most `capacity` decisions in `store` (a mapping that the checkpoint saves) under `name`.

    Storage doubles as it fills, so that checkpoints are no larger than what was seen.
    """

    def __init__(self, store: MutableMapping[str, Tensor], name: str, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a replay needs a capacity of at least 1, got {capacity}")
        self.store, self.name, self.capacity = store, name, capacity

    def __len__(self) -> int:
        return int(self.store[f"{self.name}/size"]) if f"{self.name}/size" in self.store else 0

    def add(self, rows: Transitions) -> None:
        """Append, over the oldest where full. Raises: ValueError if more rows than fit, or other columns."""
        columns = rows.columns()
        count = len(rows.reward)
        if count > self.capacity:
            raise ValueError(f"{count} decisions do not fit a replay of {self.capacity}; raise the capacity")
        if f"{self.name}/size" not in self.store:
            for key, tensor in columns.items():
                self.store[f"{self.name}/rows/{key}"] = tensor.new_zeros(min(count, self.capacity), *tensor.shape[1:])
            self.store[f"{self.name}/size"] = self.store[f"{self.name}/next"] = torch.zeros((), dtype=torch.long)
        known = {key.removeprefix(f"{self.name}/rows/") for key in self.store if key.startswith(f"{self.name}/rows/")}
        if known != set(columns):
            raise ValueError(f"this replay holds {sorted(known)}, got {sorted(columns)}; the operator changed")
        start = int(self.store[f"{self.name}/next"])
        self._grow(start + count)
        where = (start + torch.arange(count)) % self.capacity
        for key, tensor in columns.items():
            self.store[f"{self.name}/rows/{key}"][where] = tensor
        self.store[f"{self.name}/next"] = torch.tensor((start + count) % self.capacity)
        self.store[f"{self.name}/size"] = torch.tensor(min(self.capacity, len(self) + count))

    def _grow(self, rows: int) -> None:
        """Room for this many rows, up to the capacity; a ring that has wrapped is full and does not grow."""
        for key in [key for key in self.store if key.startswith(f"{self.name}/rows/")]:
            held = self.store[key]
            size = min(self.capacity, max(rows, 2 * len(held)))
            if rows > len(held) and size > len(held):
                self.store[key] = torch.cat([held, held.new_zeros(size - len(held), *held.shape[1:])])

    def sample(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Columns of `count` rows, uniformly with replacement. Raises: ValueError if empty."""
        if not len(self):
            raise ValueError(f"the {self.name} replay is empty")
        index = torch.randint(len(self), (count,), generator=generator)
        prefix = f"{self.name}/rows/"
        return {key.removeprefix(prefix): tensor[index] for key, tensor in self.store.items() if key.startswith(prefix)}


def mixed(online: Replay, demonstrations: Replay | None, count: int, fraction: float, generator: torch.Generator
          ) -> Transitions:
    """A batch with exactly round(fraction * count) demonstrations, whatever the sizes (RLPD's symmetric sampling).

    An empty replay leaves its share to the other.
    """
    parts = []
    from_demos = round(fraction * count) if demonstrations is not None and len(demonstrations) else 0
    if not len(online):
        from_demos = count
    if demonstrations is not None and from_demos:
        parts.append(demonstrations.sample(from_demos, generator))
    if count - from_demos:
        parts.append(online.sample(count - from_demos, generator))
    return Transitions.of({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
