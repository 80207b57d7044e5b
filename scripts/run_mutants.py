"""Kill every mutant of tests/mutants.txt: apply it to a copy of the tree and see the named tests fail.

    python scripts/run_mutants.py            # all of them
    python scripts/run_mutants.py kernels    # those whose file or test contains a word

Exit status 1 if a mutant survives, if its fragment is not found exactly once in its file, or if its tests do not pass
without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("diffalign", "tests", "robot", "image", "configs", "pyproject.toml", "README.md")
WORKERS = 2


@dataclass(frozen=True)
class Mutant:
    """A one-line edit and the tests of which at least one must fail."""

    number: int
    file: str
    fragment: str
    replacement: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number:3d} {self.file}: {self.fragment!r} -> {self.replacement!r}"


def read(file: Path) -> list[Mutant]:
    """The mutants of a file whose format its own header explains. Raises: ValueError for a malformed entry."""
    found = []
    for block in file.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            continue
        if len(lines) != 4 or not lines[1].startswith("- ") or not lines[2].startswith("+ "):
            raise ValueError(f"{file}: an entry is FILE, '- fragment', '+ replacement', TESTS; got {lines}")
        tests = tuple(f"tests/{name}" for name in lines[3].split())
        found.append(Mutant(len(found) + 1, lines[0].strip(), lines[1][2:], lines[2][2:], tests))
    return found


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """(pytest's exit status, its output) of tests in a copy of the tree."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(tree / part) for part in (".", "robot", "image")),
                   "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def verdict(mutant: Mutant, tree: Path) -> str:
    """'killed', or what is wrong. pytest exits 1 when a test failed; an error on collection does not count."""
    target = tree / mutant.file
    original = target.read_text()
    count = original.count(mutant.fragment)
    if count != 1:
        return f"the fragment occurs {count} times"
    target.write_text(original.replace(mutant.fragment, mutant.replacement))
    try:
        status, output = run_tests(tree, mutant.tests)
    finally:
        target.write_text(original)
    if status == 1:
        return "killed"
    return "SURVIVED" if status == 0 else f"pytest exited with {status}: {output[-400:]}"


def copy_tree(to: Path) -> Path:
    """A private copy for one worker."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.exists():
            shutil.copy(source, to / name)
    return to


def main(words: list[str]) -> int:
    """Run the chosen mutants in two processes and report."""
    every = read(ROOT / "tests" / "mutants.txt")
    mutants = [m for m in every if all(word in f"{m.file} {' '.join(m.tests)}" for word in words)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="diffalign_mutants_") as folder:
        trees: Queue[Path] = Queue()
        for worker in range(WORKERS):
            trees.put(copy_tree(Path(folder) / str(worker)))
        tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        status, output = run_tests(Path(folder) / "0", tests)
        if status != 0:
            print(f"the named tests do not pass without a mutant:\n{output[-3000:]}")
            return 1

        def judge(mutant: Mutant) -> bool:
            tree = trees.get()
            try:
                result = verdict(mutant, tree)
            finally:
                trees.put(tree)
            print(f"{mutant}\n      {result}", flush=True)
            return result == "killed"

        with ThreadPoolExecutor(WORKERS) as pool:
            killed = list(pool.map(judge, mutants))
    print(f"{sum(killed)} of {len(killed)} mutants killed in {time.monotonic() - started:.0f} s")
    return 0 if all(killed) and killed else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
