"""A bounded log of JSON lines that survives the death of its process."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_NAME = re.compile(r"log-(\d{6})\.jsonl")


class Log:
    """Appends records to log-000001.jsonl, -000002 ... and drops the oldest file when there are more than `files`.

    Every record is one write to the operating system, so that a killed process loses at most the line it was writing; a
    power cut can lose what the system has not yet written, at most the last file.
    """

    def __init__(self, folder: Path, *, file_bytes: int = 4_000_000, files: int = 8) -> None:
        """Goes on after the files that are there. Raises: ValueError for bounds below one file of 1,000 bytes."""
        if file_bytes < 1000 or files < 1:
            raise ValueError(f"file_bytes must be at least 1000 and files at least 1, got {file_bytes} and {files}")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file_bytes, self.files = folder, file_bytes, files
        self._number = max(_numbers(folder), default=0)
        self._descriptor = -1
        self._next_file()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record of numbers, strings, arrays and what JSON knows; NaN becomes null."""
        line = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        if self._size and self._size + len(line) > self.file_bytes:
            self._next_file()
        os.write(self._descriptor, line)
        self._size += len(line)

    def close(self) -> None:
        """Flush to the disk."""
        if self._descriptor >= 0:
            _flush(self._descriptor)
            self._descriptor = -1

    def _next_file(self) -> None:
        if self._descriptor >= 0:  # in a thread: a disk takes 10 ms, two periods of a loop at 200 Hz
            threading.Thread(target=_flush, args=(self._descriptor,), name="log").start()
        self._number += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(self.folder / f"log-{self._number:06d}.jsonl", flags, 0o644)
        self._size = 0
        for number in _numbers(self.folder)[: -self.files]:
            (self.folder / f"log-{number:06d}.jsonl").unlink()


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a log, oldest first; a line that a dying process left half-written is left out."""
    for number in _numbers(folder):
        for line in (folder / f"log-{number:06d}.jsonl").read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)
    os.close(descriptor)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
