"""Kill every mutant of tests/mutants.txt: apply it to a copy of the tree and see the named tests fail.

    python scripts/run_mutants.py            # all of them
    python scripts/run_mutants.py kernels    # those whose file or test contains a word

Exit status 1 if a mutant survives, if its fragment is not found exactly once in its file, or if its tests do not pass
without it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("diffalign", "tests", "robot", "image", "configs", "scripts", "pyproject.toml", "README.md")
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


def preload() -> None:
    """Import what every test needs except the project, so that each mutant costs a fork and not an import."""
    import pydantic  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # pulls in the slow half of torch


def start(tree: Path, tests: tuple[str, ...]) -> int:
    """The id of a forked process that runs tests in a copy of the tree and exits with pytest's status."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        status = run_tests(tree, tests)
    except BaseException:
        traceback.print_exc()
    finally:  # never unwind into the parent's clean-up
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_tests(tree: Path, tests: tuple[str, ...]) -> int:
    """pytest's exit status, with its output in tree/log; for a forked process."""
    import pytest

    os.chdir(tree)
    log = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    paths = [str(tree / part) for part in (".", "robot", "image")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for processes that a test starts
    sys.dont_write_bytecode = True
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]))


def swap(mutant: Mutant, tree: Path, old: str, new: str) -> int:
    """How often `old` occurs in the mutant's file of a copy; replaced by `new` if once."""
    target = tree / mutant.file
    text = target.read_text()
    if text.count(old) == 1:
        target.write_text(text.replace(old, new))
    return text.count(old)


def verdict(status: int, tree: Path) -> str:
    """pytest exits with 1 when a test failed; an error before the tests does not count as a kill."""
    if status == 1:
        return "killed"
    return "SURVIVED" if status == 0 else f"pytest exited with {status}: {(tree / 'log').read_text()[-600:]}"


def copy_tree(to: Path) -> Path:
    """A private copy for one worker."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.exists():
            shutil.copy(source, to / name)
    return to


def run(mutants: list[Mutant], trees: list[Path]) -> int:
    """How many of the mutants were killed; one runs in each tree at a time."""
    pristine = {mutant.file: (trees[0] / mutant.file).read_text() for mutant in mutants}
    waiting, running, killed = list(mutants), {}, 0
    while waiting or running:
        while waiting and trees:
            mutant, tree = waiting.pop(0), trees.pop()
            count = swap(mutant, tree, mutant.fragment, mutant.replacement)
            if count != 1:
                print(f"{mutant}\n      the fragment occurs {count} times", flush=True)
                trees.append(tree)
            else:
                running[start(tree, mutant.tests)] = (mutant, tree)
        if not running:
            continue
        pid, status = os.wait()
        mutant, tree = running.pop(pid)
        result = verdict(os.waitstatus_to_exitcode(status), tree)
        (tree / mutant.file).write_text(pristine[mutant.file])
        trees.append(tree)
        killed += result == "killed"
        print(f"{mutant}\n      {result}", flush=True)
    return killed


def main(words: list[str]) -> int:
    """Check that the tests pass, run the chosen mutants in two processes, and report."""
    every = read(ROOT / "tests" / "mutants.txt")
    mutants = [m for m in every if all(word in f"{m.file} {' '.join(m.tests)}" for word in words)]
    if not mutants:
        print(f"no mutant's file or tests contain {' and '.join(words)}; without words all {len(every)} run")
        return 2
    started = time.monotonic()
    preload()
    with tempfile.TemporaryDirectory(prefix="diffalign_mutants_") as folder:
        trees = [copy_tree(Path(folder) / str(worker)) for worker in range(WORKERS)]
        tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        _, status = os.waitpid(start(trees[0], tests), 0)
        if status:
            print(f"the named tests do not pass without a mutant:\n{(trees[0] / 'log').read_text()[-3000:]}")
            return 1
        killed = run(mutants, trees)
    print(f"{killed} of {len(mutants)} mutants killed in {time.monotonic() - started:.0f} s")
    return 0 if killed == len(mutants) > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
