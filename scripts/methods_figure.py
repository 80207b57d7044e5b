"""The table and the figure from the run folders METHOD-SEED of scripts/methods_{robot,image}.sh and scripts/hopper.sh.

    python scripts/methods_figure.py runs/methods-pick_place --png docs/methods_pick_place.png

Robot: the success of fresh.json (300 episodes a seed, pooled over the seeds with a Wilson interval), or with `--value
return` the mean return of each seed with its own interval, and the curve of the run's own evaluations. Image: the last
evaluation on held-out captions, mean over the seeds (from three on with a t interval), or with
`--at held_out/jpeg_kb=0.8` where the curves first pass that value, between two evaluations on a straight line.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml

from diffalign.train.statistics import mean_interval, wilson

BASES = ("bc", "bc_flow", "bc_other", "bc_plus", "bc_minus", "pretrain", "distill")
DATA = ("collect", "collect_other", "collect_plus", "collect_minus", "rollouts", "random", "start", "ppo")


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run: by name, one number an evaluation; `samples` are environment steps or images drawn."""

    values: dict[str, list[float]]
    samples: list[float]
    cpu_s: list[float]
    fresh: dict[str, Any] | None


def main() -> None:
    """Print the table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder of run folders METHOD-SEED")
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--value", choices=["success_rate", "return"], default="success_rate", help="of robots")
    parser.add_argument("--at", metavar="NAME=VALUE", help="of images: compare where the curves pass this value")
    args = parser.parse_args()
    found: dict[str, list[Curve]] = defaultdict(list)
    for run in sorted(args.folder.glob("*-*")):
        method, seed = run.name.rsplit("-", 1)
        if seed.isdigit() and method not in DATA and (run / "finished.json").is_file():
            found[method].append(read(run))
    if not found:
        raise SystemExit(f"{args.folder} has no finished runs named METHOD-SEED; scripts/methods_robot.sh makes them")
    if args.at:
        name, value = args.at.split("=")
        found = {method: [passing(curve, name, float(value)) for curve in curves] for method, curves in found.items()
                 if method not in BASES}
    robot = "bc" in found
    table = image_table if not robot else return_table if args.value == "return" else robot_table
    print("\n".join(table(found)))
    draw(found, args.value if robot else "held_out/verifiable", "environment steps" if robot else "images drawn",
         args.png)


def read(run: Path) -> Curve:
    """The evaluations of a run folder."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((run / "config.yaml").read_text())
    stamps = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    costs = {stamp["step"]: stamp["cpu_s"] for stamp in stamps}
    steps_done = {r["step"]: r["env_steps_total"] for r in records if "env_steps_total" in r}
    evaluations = [r for r in records if r["phase"] == "eval"]
    names = [name for name in evaluations[0] if name not in ("phase", "step")]
    images = config.get("prompts_per_update", 0) * config.get("images_per_prompt", 0)
    drawn = [steps_done.get(r["step"], 0.0) or images * r["step"] for r in evaluations]
    fresh = run / "fresh.json"
    return Curve({name: [r.get(name, float("nan")) for r in evaluations] for name in names}, drawn,
                 [costs.get(r["step"], float("nan")) for r in evaluations],
                 json.loads(fresh.read_text()) if fresh.is_file() else None)


def passing(curve: Curve, name: str, value: float) -> Curve:
    """The curve up to where the named evaluation first passes the value, which is its last point."""
    along = curve.values[name]
    for k, (before, after) in enumerate(pairwise(along)):
        if (before - value) * (after - value) <= 0:
            share = (before - value) / (before - after) if before != after else 0.0

            def cut(series: list[float], k: int = k, share: float = share) -> list[float]:
                return [*series[: k + 1], series[k] + share * (series[k + 1] - series[k])]

            return Curve({key: cut(series) for key, series in curve.values.items()}, cut(curve.samples),
                         cut(curve.cpu_s), None)
    raise SystemExit(f"{name} goes from {along[0]:g} to {along[-1]:g} in a run and never passes {value:g}")


def robot_table(found: dict[str, list[Curve]]) -> list[str]:
    """Markdown rows: success on fresh episodes, environment steps, CPU seconds."""
    rows = ["| method | seeds | success, fresh episodes | environment steps | CPU s |", "|---|---|---|---|---|"]
    for method, curves in found.items():
        fresh = [curve.fresh for curve in curves if curve.fresh]
        if not fresh:
            continue
        played = sum(f["episodes"] for f in fresh)
        won = sum(round(f["success_rate"] * f["episodes"]) for f in fresh)
        low, high = wilson(won, played)
        each = ", ".join(f"{f['success_rate']:.2f}" for f in fresh)
        rows.append(f"| {method} | {len(fresh)} | {won / played:.3f} [{low:.3f}, {high:.3f}] ({each}) "
                    f"| {last(curves, 'samples') / 1000:.0f}k | {last(curves, 'cpu_s'):.0f} |")
    return rows


def return_table(found: dict[str, list[Curve]]) -> list[str]:
    """Markdown rows: the mean return on fresh episodes of each seed, environment steps, CPU seconds."""
    rows = ["| method | return on fresh episodes, a seed each | environment steps | CPU s |", "|---|---|---|---|"]
    for method, curves in found.items():
        each = [f"{f['return_mean']:.0f} [{f['return_interval'][0]:.0f}, {f['return_interval'][1]:.0f}]"
                for f in (curve.fresh for curve in curves) if f]
        if each:
            rows.append(f"| {method} | {', '.join(each)} | {last(curves, 'samples') / 1000:.0f}k "
                        f"| {last(curves, 'cpu_s'):.0f} |")
    return rows


def image_table(found: dict[str, list[Curve]]) -> list[str]:
    """Markdown rows: score and size on held-out captions, KL, images, CPU seconds."""
    rows = ["| method | seeds | score | JPEG, kB | KL, nats | images drawn | CPU s |", "|---|---|---|---|---|---|---|"]
    for method, curves in found.items():
        score, size = (across([curve.values[name][-1] for curve in curves])
                       for name in ("held_out/verifiable", "held_out/jpeg_kb"))
        kl = float(np.mean([curve.values.get("kl_nats", [float("nan")])[-1] for curve in curves]))
        rows.append(f"| {method} | {len(curves)} | {score} | {size} | {kl:.0f} | {last(curves, 'samples') / 1000:.0f}k "
                    f"| {last(curves, 'cpu_s'):.0f} |")
    return rows


def across(values: list[float]) -> str:
    """Mean over seeds, with a t interval from three seeds on, and the seeds' own values."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean, low, high = mean_interval(values)
    interval = f" [{low:.3f}, {high:.3f}]" if len(values) > 2 else ""
    return f"{mean:.3f}{interval} ({', '.join(f'{value:.3f}' for value in values)})"


def last(curves: list[Curve], name: str) -> float:
    """Mean over the seeds of the last entry."""
    return float(np.mean([getattr(curve, name)[-1] for curve in curves]))


def draw(found: dict[str, list[Curve]], value: str, unit: str, target: Path) -> None:
    """One line a method (mean over seeds), against samples and against CPU seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    colors = plt.get_cmap("tab20").colors
    curves_of = {method: curves for method, curves in found.items() if method not in BASES}
    for color, (method, curves) in zip(colors, curves_of.items()):
        length = min(len(curve.samples) for curve in curves)
        mean = np.mean([curve.values[value][:length] for curve in curves], 0)
        for axis, name in zip(axes, ("samples", "cpu_s")):
            x = np.mean([getattr(curve, name)[:length] for curve in curves], 0)
            axis.plot(x, mean, marker="o", markersize=3, label=method, color=color)
    for axis, label in zip(axes, (unit, "CPU seconds, evaluations included")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(value)
    axes[1].legend(fontsize=8, ncols=2)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
