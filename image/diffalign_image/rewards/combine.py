"""Several rewards made one: per image (a sum, a product), or per batch (normalized, or under constraints).

Legend: K rewards, N images, B images of all processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from diffalign.rl.advantages import group_normalized
from diffalign.spec import spec
from diffalign_image.rewards.frames import Frames, OneReward, Single
from diffalign_image.rewards.protocol import Metadata, Reward

Multipliers = Mapping[str, float]
_EPS = 1e-4


@spec
class Term:
    """A reward and its weight: a factor in a sum, an exponent in a product.

    name: what logs call it, null for the reward's type.
    """

    weight: float
    reward: OneReward
    name: str | None = None


@runtime_checkable
class Combination(Protocol):
    """A spec with terms whose values it makes into one number an image.

    multipliers: what it returned last time, empty at first; a run keeps them in its state.
    """

    @property
    def terms(self) -> tuple[Term, ...]: ...

    def combine(self, values: Float[Tensor, "K B"], group: Int[Tensor, "B"], multipliers: Multipliers
                ) -> tuple[Float[Tensor, "B"], Multipliers]: ...


@spec
class WeightedSum:
    """Sum of weight * reward. The weights carry the exchange rate between units (kB, score)."""

    type: Literal["weighted_sum"] = "weighted_sum"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        _check(self)

    def combine(self, values: Float[Tensor, "K B"], group: Int[Tensor, "B"], multipliers: Multipliers
                ) -> tuple[Float[Tensor, "B"], Multipliers]:
        """The sum of each image."""
        return torch.einsum("k,kb->b", _weights(self, values), values), multipliers

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """The weighted sum."""
        return self.combine(_measured(self, images, captions, metadata), torch.arange(len(captions)), {})[0]


@spec
class Product:
    """Product of reward ** weight, for rewards that are never negative: one near 0 spoils the image."""

    type: Literal["product"] = "product"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        _check(self)
        if any(not term.weight > 0 for term in self.terms):
            raise ValueError(f"the weights of a product are exponents above 0, got {[t.weight for t in self.terms]}")

    def combine(self, values: Float[Tensor, "K B"], group: Int[Tensor, "B"], multipliers: Multipliers
                ) -> tuple[Float[Tensor, "B"], Multipliers]:
        """The product of each image. Raises: ValueError for a negative reward."""
        for name, value in zip(term_names(self), values, strict=True):
            if bool((value < 0).any()):
                raise ValueError(f"reward {name} is {float(value.min()):.4g} for an image, and a product needs rewards "
                                 "of at least 0; use weighted_sum, normalized_sum or per_reward")
        return (values ** _weights(self, values)[:, None]).prod(0), multipliers

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """The product."""
        return self.combine(_measured(self, images, captions, metadata), torch.arange(len(captions)), {})[0]


@spec
class NormalizedSum:
    """Sum of weight * (reward - mean) / std over the batch: the weights are free of units."""

    type: Literal["normalized_sum"] = "normalized_sum"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        _check(self)

    def combine(self, values: Float[Tensor, "K B"], group: Int[Tensor, "B"], multipliers: Multipliers
                ) -> tuple[Float[Tensor, "B"], Multipliers]:
        """The sum of each image."""
        centered = values - values.mean(1, keepdim=True)
        scaled = centered / (values.std(1, correction=0, keepdim=True) + _EPS)
        return torch.einsum("k,kb->b", _weights(self, values), scaled), multipliers


@spec
class PerReward:
    """GDPO: sum of weight * the reward's own group-normalized advantage, so that none drowns in another's spread.

    Liu et al. 2026 (GDPO, arXiv 2601.05242): each reward is normalized within the images of a prompt before the sum.
    With the advantage `group`, scale: batch, the sum is divided by its std over the batch, as there.
    """

    type: Literal["per_reward"] = "per_reward"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        _check(self)

    def combine(self, values: Float[Tensor, "K B"], group: Int[Tensor, "B"], multipliers: Multipliers
                ) -> tuple[Float[Tensor, "B"], Multipliers]:
        """The sum of each image. Raises: ValueError for a prompt with one image."""
        scaled = torch.stack([group_normalized(value, group, scale="group") for value in values])
        return torch.einsum("k,kb->b", _weights(self, values), scaled), multipliers


@spec
class Constraint:
    """A reward whose mean over images shall be at least `at_least`."""

    reward: OneReward
    at_least: float
    name: str | None = None


@spec
class Constrained:
    """reward + sum of multiplier * (constraint - at_least): the Lagrangian of maximizing it under mean constraints.

    After every rollout a multiplier rises by rate * (at_least - the batch's mean), never below 0 nor above `most` (dual
    ascent). The multipliers are in the checkpoint, so that a resumed run goes on with them.
    """

    type: Literal["constrained"] = "constrained"
    reward: OneReward
    constraints: tuple[Constraint, ...]
    rate: float = 0.1
    start: float = 0.0
    most: float = 100.0

    def __post_init__(self) -> None:
        if not self.constraints or not self.rate > 0 or not 0 <= self.start <= self.most:
            raise ValueError("constrained needs a constraint, rate > 0 and 0 <= start <= most, got "
                             f"{len(self.constraints)} constraints, {self.rate}, {self.start} and {self.most}")
        _check(self)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The reward and then the constraints."""
        return (Term(weight=1.0, reward=self.reward),
                *(Term(weight=1.0, reward=one.reward, name=one.name) for one in self.constraints))

    def combine(self, values: Float[Tensor, "K B"], group: Int[Tensor, "B"], multipliers: Multipliers
                ) -> tuple[Float[Tensor, "B"], Multipliers]:
        """The Lagrangian of each image with the multipliers given, and those for the next rollout."""
        total, following = values[0], {}
        for name, one, value in zip(term_names(self)[1:], self.constraints, values[1:], strict=True):
            now = multipliers.get(name, self.start)
            total = total + now * (value - one.at_least)
            lacking = one.at_least - float(value.double().mean())
            following[name] = min(max(now + self.rate * lacking, 0.0), self.most)
        return total, following


AnyReward = Annotated[Single | Frames | WeightedSum | Product, Field(discriminator="type")]
TrainingReward = Annotated[Single | Frames | WeightedSum | Product | NormalizedSum | PerReward | Constrained,
                           Field(discriminator="type")]


def named_rewards(reward: Reward | Combination) -> dict[str, Reward]:
    """The rewards that are measured, by the names that logs show: the terms, or the one reward as `reward`."""
    if not isinstance(reward, Combination):
        return {"reward": reward}
    return dict(zip(term_names(reward), (term.reward for term in reward.terms), strict=True))


def overall(reward: Reward | Combination, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values with the sum or product as `reward`; what only a batch makes one number of stays as it is."""
    if not isinstance(reward, WeightedSum | Product):
        return dict(values)
    stacked = torch.stack([values[name] for name in term_names(reward)])
    return {"reward": reward.combine(stacked, torch.arange(stacked.shape[1]), {})[0], **values}


def term_names(reward: Combination) -> list[str]:
    """The terms' names, their types where none is given; the second of a kind gets `_2`."""
    plain = [term.name or term.reward.type for term in reward.terms]
    return [name if plain[:i].count(name) == 0 else f"{name}_{plain[:i].count(name) + 1}"
            for i, name in enumerate(plain)]


def _check(reward: Combination) -> None:
    if not reward.terms:
        raise ValueError(f"{type(reward).__name__} needs at least one term, got none")
    names = term_names(reward)
    if len(set(names)) < len(names) or "reward" in names:
        raise ValueError(f"the terms' names must differ, and none may be `reward`, got {names}")


def _weights(reward: Combination, like: Tensor) -> Tensor:
    return torch.tensor([term.weight for term in reward.terms], dtype=like.dtype, device=like.device)


def _measured(reward: Combination, images: Tensor, captions: Sequence[str], metadata: Metadata) -> Tensor:
    return torch.stack([term.reward(images, captions, metadata) for term in reward.terms])
