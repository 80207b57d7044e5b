"""What an off-policy algorithm is made of: an operator on a frozen base policy, a critic and an update plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffalign.policy.operators import Operator
from diffalign.spec import spec


@spec
class Learning:
    """How critic and actor learn, the same for every off-policy algorithm.

    discount is per decision (a chunk counts as one); n_step sums that many decisions' rewards before bootstrapping.
    backup: `candidates` takes the best candidate that the operator finds in the next state (SAC, TD3, EXPO's on-the-fly
    backup), `expectile` a state value regressed on the data's own actions (IQL). heads critics, of which the backup
    takes the lowest of `pair` random ones. actor_std: fixed (TD3) or None to learn it with an entropy target of
    target_entropy nats per number of the event and a learned temperature (SAC). demonstration_fraction of a batch comes
    from the demonstrations. The first warmup_decisions decisions are the base's own; the actor rests for
    critic_only_updates and then learns every actor_every-th update. value_range clips targets, where returns are known.

    Raises: ValueError where numbers are out of range.
    """

    discount: float = 0.97
    n_step: int = 1
    backup: Literal["candidates", "expectile"] = "candidates"
    expectile: float = 0.8
    heads: int = 4
    pair: int = 2
    critic_hidden: tuple[int, ...] = (256, 256)
    actor_hidden: tuple[int, ...] = (256, 256)
    actor_std: float | None = None
    temperature: float = 0.1
    target_entropy: float = -0.5
    entropy_backup: bool = False
    critic_learning_rate: float = 3e-4
    actor_learning_rate: float = 3e-4
    max_grad_norm: float | None = 10.0
    target_rate: float = 0.005
    batch_size: int = 128
    updates_per_decision: float = 1.0
    offline_updates: int = 500
    demonstration_fraction: float = 0.5
    capacity: int = 100_000
    warmup_decisions: int = 1000
    critic_only_updates: int = 500
    actor_every: int = 1
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("n_step", "heads", "pair", "batch_size", "capacity", "actor_every", "offline_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("critic_learning_rate", "actor_learning_rate", "temperature", "updates_per_decision"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("discount", "expectile", "target_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.demonstration_fraction <= 1:
            raise ValueError(f"demonstration_fraction must lie in [0, 1], got {self.demonstration_fraction}")


@dataclass(frozen=True)
class OffPolicy:
    """A composition of an operator and a learning plan; the algorithm specs build it.

    Raises: ValueError where they do not fit each other.
    """

    operator: Operator
    learning: Learning

    @property
    def uses_signals(self) -> bool:
        """Whether a stored state needs what the base says there: for an actor, or to find the best next candidate."""
        return self.operator.needs_actor or self.learning.backup == "candidates"

    def __post_init__(self) -> None:
        if self.learning.backup == "expectile" and not self.operator.scores_actions:
            raise ValueError("the expectile backup learns from data's actions, but this operator's critic scores "
                             "noise; use backup candidates, or scores: actions")
