"""`diffalign list`: what a config can name, read off the closed unions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

Inventory = dict[str, dict[str, str]]
_WIDTH = 100


def show(args: argparse.Namespace) -> int:
    """`diffalign list [--json]`."""
    found = inventory()
    print(json.dumps(found) if args.json else as_text(found))
    return 0


def inventory() -> Inventory:
    """kind -> name -> one line, of the core and of both adapters."""
    from diffalign import algorithms, choices

    found = {"algorithms": described(algorithms.Algorithm)}
    found |= {kind: described(union) for kind, union in choices.UNIONS.items()}
    for module in ("diffalign_image.choices", "diffalign_robot.choices"):
        for kind, union in import_module(module).UNIONS.items():
            found[kind] = {**found.get(kind, {}), **described(union)}
    return found


def described(union: Any) -> dict[str, str]:
    """The first docstring sentence of every member of a closed union, by its `type`."""
    from diffalign.config import members

    return {name: first_line(member) for name, member in members(union).items()}


def first_line(member: type) -> str:
    """The first line of a docstring, without its final full stop."""
    text = " ".join((member.__doc__ or "").strip().partition("\n\n")[0].split())
    return text.removesuffix(".")


def as_text(found: Mapping[str, Mapping[str, str]]) -> str:
    """One block per kind with aligned descriptions."""
    width = max(len(name) for entries in found.values() for name in entries)
    blocks = []
    for kind, entries in found.items():
        lines = [
            f"  {name:<{width}}  {text if len(text) <= _WIDTH else text[: _WIDTH - 3] + '...'}"
            for name, text in entries.items()
        ]
        blocks.append("\n".join([kind, *lines]))
    return "\n\n".join(blocks)
