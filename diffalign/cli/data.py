"""`diffalign data`: convert a data set of robot episodes, or check it and draw what it holds."""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import diffalign
from diffalign.cli import figures
from diffalign.cli.commands import say

_COLUMNS = ("name", "min", "max", "mean", "std", "shift", "scale")


def data(args: argparse.Namespace) -> int:
    """`diffalign data convert SRC --to FORMAT:PATH` and `diffalign data check SRC`; 1 if a check found problems."""
    from diffalign_robot.data import formats

    source = Path(args.source)
    found = formats.read(source)
    if args.parts:
        found = replace(found, keys=_parts(args.parts))
    if args.keys:
        found = found.select(args.keys.split(","))
    if args.rate_hz is not None:
        found = replace(found, rate_hz=args.rate_hz)
    if args.what == "convert":
        if not args.to:
            raise ValueError("convert needs --to FORMAT:PATH, e.g. --to robomimic:data/lift.hdf5")
        path = formats.write(found, args.to)
        say(f"{len(found.episodes.lengths)} episodes, {len(found.episodes.obs)} steps from {source} to {path}")
        return 0
    from diffalign_robot.data.check import check

    result = check(found)
    page = Path(args.out or f"{source.name}-check.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page(source, result, found.episodes), encoding="utf-8")
    print(json.dumps(result) if args.json else _text(result))
    say(f"report {page}")
    return 1 if result["problems"] else 0


def _parts(text: str) -> dict[str, int]:
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name and width.isdecimal() for name, _, width in parts):
        raise ValueError(f"--parts must be NAME=WIDTH,..., e.g. state=4,environment_state=35, got {text!r}")
    return {name: int(width) for name, _, width in parts}


def _text(result: Mapping[str, Any]) -> str:
    length, won = result["length"], result["success_rate"]
    lines = [f"{result['task']}: {result['episodes']} episodes, {result['steps']} steps, lengths {length['min']} to "
             f"{length['max']} (mean {length['mean']:.1f}), "
             + ("success not recorded" if won is None else f"{won:.0%} succeed")]
    width = max(len(row["name"]) for row in [*result["obs"], *result["action"]])
    lines += [f"  {row['name']:<{width}}  {row['min']:10.4g} .. {row['max']:<10.4g} mean {row['mean']:<10.4g} "
              f"std {row['std']:.4g}" for row in [*result["obs"], *result["action"]]]
    lines += [f"problem: {text}" for text in result["problems"]] + [f"note: {text}" for text in result["notes"]]
    return "\n".join(lines)


def _page(source: Path, result: Mapping[str, Any], episodes: Any) -> str:
    found = [*result["problems"], *result["notes"]] or ["none found"]
    problems = "".join(f"<li>{html.escape(text)}</li>" for text in found)
    drawn = {"Episode lengths": [figures.histogram(episodes.lengths.float().tolist(), "steps")]}
    for title, values, rows in (("Actions", episodes.action, result["action"]),
                                ("Observations", episodes.obs, result["obs"])):
        drawn[title] = [figures.histogram(column.tolist(), row["name"]) for column, row in zip(values.T, rows)]
    body = [f"<section><h2>Problems and notes</h2><ul>{problems}</ul></section>"]
    body += [f'<section><h2>{title}</h2><div class="curves">{"".join(pictures)}</div></section>'
             for title, pictures in drawn.items()]
    body.append(_table("Features and normalizers", [*result["action"], *result["obs"]]))
    return Template(files("diffalign.cli").joinpath("report.html").read_text()).substitute(
        title=html.escape(f"{source.name}: data set check"), body="\n".join(body), version=diffalign.__version__,
        subtitle=html.escape(_text(result).splitlines()[0]))


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    cells = "".join(f"<tr><td>{html.escape(row['name'])}</td>"
                    + "".join(f"<td>{row[name]:.5g}</td>" for name in _COLUMNS[1:]) + "</tr>" for row in rows)
    return f'<section><h2>{title}</h2><div class="scroll"><table><tr>{head}</tr>{cells}</table></div></section>'
