"""`key=value` words of the command line as a frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Span(NamedTuple):
    """A stretch of time in seconds, written `start:duration`."""

    start_s: float
    duration_s: float

    def holds(self, moment_s: float) -> bool:
        """Whether a moment lies in it."""
        return self.start_s <= moment_s < self.start_s + self.duration_s


def words(pairs: Sequence[str]) -> dict[str, str]:
    """{key: value} of `key=value` words. Raises: ValueError for a word that is none, or a key that comes twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"{pair!r} is no option of a robot; write key=value")
        if key in found:
            raise ValueError(f"the robot's option {key!r} is given twice")
        found[key] = value
    return found


def read(cls: type[T], options: Mapping[str, str], what: str) -> T:
    """The dataclass with its fields read from text by their types: float, int, str, tuple[str, ...], Span, or None.

    Raises: ValueError for an unknown option, a missing one, or text that is no such value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in options:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(f"{what} has no option {name!r}{hint} It has {', '.join(fields)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in options:
            raise ValueError(f"{what} needs the option {name}=...")
    return cls(**{name: _value(what, name, str(fields[name].type), text) for name, text in options.items()})


def _value(what: str, name: str, kind: str, text: str) -> Any:
    readers: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str, "Span": _span,
                                                "tuple[str, ...]": lambda text: tuple(text.split(","))}
    try:
        return readers[kind.removesuffix(" | None")](text)
    except ValueError:
        form = {"Span": "start:duration in seconds"}.get(kind.removesuffix(" | None"), kind)
        raise ValueError(f"{what}: {name} must be {form}, got {text!r}") from None


def _span(text: str) -> Span:
    start, _, duration = text.partition(":")
    return Span(float(start), float(duration))
