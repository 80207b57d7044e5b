"""Environment steps per second of a recipe's iterations (rollout and update), also beside another program's.

    python scripts/throughput.py configs/robot/pick_place_dppo.yaml                  # 3 rounds of 4 iterations
    python scripts/throughput.py CONFIG a.b=c --beside "COMMAND" --threads 1 --json

Every round is a fresh `diffalign train` whose first iteration is a warm-up and not counted; evaluations are not part
of an iteration. COMMAND takes turns with it, so that both see the same load of the machine, and prints one line of JSON
for each of its own iterations: {"env_steps": N, "rollout_s": seconds, "update_s": seconds}; lines that do not begin
with { are skipped. Both find the number of threads in OMP_NUM_THREADS. Medians over all iterations are printed, the
ratio of the two speeds, and what it was in each round. The recipe must be one of type robot_align.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

NAMES = ("env_steps_per_s", "env_steps", "rollout_s", "update_s")


@dataclass(frozen=True)
class Iteration:
    """One rollout and its update."""

    env_steps: float
    rollout_s: float
    update_s: float

    @property
    def env_steps_per_s(self) -> float:
        """End to end."""
        return self.env_steps / (self.rollout_s + self.update_s)


class Failed(RuntimeError):
    """A program ended with an error or without an iteration to count."""


def main() -> int:
    """0 done, 2 a program failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a recipe of type robot_align")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a value of the recipe")
    parser.add_argument("--beside", metavar="COMMAND", help="another program, in turn with ours")
    parser.add_argument("--iterations", type=int, default=4, help="counted iterations of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, of both programs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    if min(args.iterations, args.rounds, args.threads) < 1:
        parser.error(f"--iterations, --rounds and --threads must be at least 1, got {args.iterations}, {args.rounds} "
                     f"and {args.threads}")
    ours: list[list[Iteration]] = []
    theirs: list[list[Iteration]] = []
    loads = []
    try:
        for _ in range(args.rounds):
            ours.append(recipe(args.config, args.overrides, args.iterations, args.threads))
            loads.append(os.getloadavg()[0])
            if args.beside:
                theirs.append(beside(args.beside, args.threads))
                loads.append(os.getloadavg()[0])
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = summary(ours, theirs, loads)
    print(json.dumps(result, indent=2) if args.json else table(result))
    return 0


def recipe(config: str, overrides: list[str], iterations: int, threads: int) -> list[Iteration]:
    """The iterations of a run of the recipe in a temporary folder, without its first."""
    last = iterations + 1
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        output([sys.executable, "-m", "diffalign", "train", config, *overrides, f"iterations={last}",
                f"save_every={last}", f"evaluation.every={last}", "evaluation.episodes=2", "evaluation.videos=0",
                "--run", str(run)], threads)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["phase"] == "train"][1:]
    if any("time/rollout" not in record for record in train):
        raise Failed(f"{config} has no rollouts in its log; a recipe of type robot_align is needed")
    return [Iteration(record["env_steps"], record["time/rollout"], record["time/update"]) for record in train]


def beside(command: str, threads: int) -> list[Iteration]:
    """The iterations that the command prints."""
    lines = [line for line in output(shlex.split(command), threads).splitlines() if line.startswith("{")]
    if not lines:
        raise Failed(f"{command!r} printed no iteration")
    return [Iteration(**json.loads(line)) for line in lines]


def output(command: list[str], threads: int) -> str:
    """What the command prints. Raises: Failed with the end of its standard error."""
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def summary(ours: list[list[Iteration]], theirs: list[list[Iteration]], loads: list[float]) -> dict[str, Any]:
    """Medians of both; with another program also the ratio of the speeds, overall and by round."""
    result: dict[str, Any] = {"ours": medians(chain(*ours))}
    if theirs:
        result["beside"] = medians(chain(*theirs))
        result["ratio"] = result["ours"]["env_steps_per_s"] / result["beside"]["env_steps_per_s"]
        result["ratio_by_round"] = [medians(a)["env_steps_per_s"] / medians(b)["env_steps_per_s"]
                                    for a, b in zip(ours, theirs, strict=True)]
    return {**result, "load_average": [round(load, 1) for load in loads]}


def medians(iterations: Iterable[Iteration]) -> dict[str, float]:
    """By name, and how many iterations they are of."""
    every = list(iterations)
    found = {name: statistics.median(getattr(iteration, name) for iteration in every) for name in NAMES}
    return {**found, "iterations": len(every)}


def table(result: dict[str, Any]) -> str:
    """Aligned lines for people."""
    sides = [name for name in ("ours", "beside") if name in result]
    rows = [["", *result["ours"]], *([name, *(f"{value:.4g}" for value in result[name].values())] for name in sides)]
    lines = ["  ".join(cell.rjust(15) for cell in row) for row in rows]
    if "ratio" in result:
        each = ", ".join(f"{ratio:.2f}" for ratio in result["ratio_by_round"])
        lines.append(f"ratio {result['ratio']:.2f} (by round: {each})")
    return "\n".join([*lines, f"load average after each turn: {', '.join(map(str, result['load_average']))}"])


if __name__ == "__main__":
    raise SystemExit(main())
