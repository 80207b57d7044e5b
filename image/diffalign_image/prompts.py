"""Prompts from a text or JSONL file, drawn without replacement, and their embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KEPT = 1024  # prompts whose embeddings stay in memory; about 2.7 MB each for SD3 in half precision


@dataclass(frozen=True)
class Prompt:
    """A text and what else a reward should know about it."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(file: str) -> list[Prompt]:
    """One prompt a line: plain text, or in a .jsonl file an object with `prompt` and an optional object `metadata`.

    Empty lines are skipped. Raises: ValueError naming the first line that is not so, or if there is no prompt.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"prompts: {file} does not exist; give a text file with one prompt a line, or a .jsonl file")
    lines = [(i, line.strip()) for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    found = [parse(line, f"prompts: {file}, line {i}") for i, line in lines if line]
    if not found:
        raise ValueError(f"prompts: {file} holds no prompt")
    return found


def _from_text(line: str, where: str) -> Prompt:
    return Prompt(line)


def _from_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{where}: expected {{"prompt": "...", "metadata": {{...}}}}, got {line[:80]}')
    metadata = record.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: metadata must be an object, got {type(metadata).__name__}")
    extra = sorted(set(record) - {"prompt", "metadata"})
    if extra:
        raise ValueError(f"{where}: unknown fields {extra}; put them into metadata")
    return Prompt(record["prompt"], metadata)


def positions(first: int, count: int, total: int, seed: int) -> list[int]:
    """Prompts first .. first + count - 1 of an endless sequence of shuffles of range(total).

    A pure function of its arguments: every prompt comes once before any comes again, on any number of processes and
    after any number of restarts.
    """
    orders: dict[int, list[int]] = {}
    found = []
    for place in range(first, first + count):
        shuffle, index = divmod(place, total)
        if shuffle not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + shuffle)
            orders[shuffle] = torch.randperm(total, generator=generator).tolist()
        found.append(orders[shuffle][index])
    return found


class Embeddings:
    """The conditioning of prompts, each encoded once and by itself, so that it never depends on the rest of a batch.

    at_work: the context within which `encode` works; text encoders that wait in main memory come to the device there.
    """

    def __init__(self, encode: Callable[[str], dict[str, Tensor]],
                 at_work: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._encode = encode
        self._at_work = at_work
        self._known: dict[str, dict[str, Tensor]] = {}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Rows in the order of the prompts."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            with self._at_work():
                self._known |= {prompt: self._encode(prompt) for prompt in new}
        rows = [self._known[prompt] for prompt in prompts]
        for prompt in list(self._known)[:-_KEPT]:
            del self._known[prompt]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
