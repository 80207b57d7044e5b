"""`diffalign list`: what a config can name, read off the closed unions."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from diffalign.cli.errors import paragraph

Inventory = dict[str, dict[str, str]]
_WIDTH = 100
# kind -> the closed union of an adapter
_OF_ADAPTERS = {
    "rewards": ("diffalign_image.rewards", "TrainingReward"),
    "environments": ("diffalign_robot.choices", "Environment"),
    "policies": ("diffalign_robot.choices", "Network"),
    "encoders": ("diffalign_robot.image_choices", "Encoder"),
}


def show(args: argparse.Namespace) -> int:
    """`diffalign list [--json]`."""
    found = inventory()
    print(json.dumps(found) if args.json else as_text(found))
    return 0


def inventory() -> Inventory:
    """kind -> name -> one line, of the core and of the adapters; a kind whose extra is missing is empty."""
    from diffalign import algorithms, choices

    found = {"algorithms": described(algorithms.Algorithm),
             "off_policy_algorithms": described(algorithms.OffPolicyAlgorithm),
             "preference_algorithms": described(algorithms.PreferenceAlgorithm)}
    found |= {kind: described(union) for kind, union in choices.UNIONS.items()}
    for kind, (module, name) in _OF_ADAPTERS.items():
        try:
            found[kind] = described(getattr(import_module(module), name))
        except ModuleNotFoundError as error:
            text = paragraph(error)
            if text is None:
                raise
            found[kind] = {}
            print(f"{kind}: {text}", file=sys.stderr)
    return found


def described(union: Any) -> dict[str, str]:
    """The first docstring sentence of every member of a closed union, by its `type`."""
    from diffalign.config import members

    return {name: first_sentence(member) for name, member in members(union).items()}


def first_sentence(member: type) -> str:
    """The first sentence of a docstring without its full stop."""
    text = " ".join((member.__doc__ or "").partition("\n\n")[0].split())
    return re.split(r"(?<!\beq)(?<!\bsec)(?<!\bal)\.(?: |$)", text, maxsplit=1)[0]


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
