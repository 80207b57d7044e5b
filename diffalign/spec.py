"""`@spec`: a frozen, keyword-only dataclass that is both a config schema and a callable component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def spec(cls: type[T]) -> type[T]:
    """The class as a frozen keyword-only dataclass whose YAML form refuses unknown keys.

    `__pydantic_config__` is read by `diffalign.config` only; a spec is built in Python without pydantic.
    """
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)
