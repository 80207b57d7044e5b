"""report.html of a run folder: one self-contained page made of the files that the run left."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import diffalign
from diffalign import config as configs
from diffalign.cli import figures
from diffalign.cli.evaluations import Evaluation, Measure, read_evaluations
from diffalign.cli.progress import KEY_METRICS, duration

# type -> (title, what a step is, what the train metrics are measured on)
_JOBS = {
    "robot_collect": ("Demonstrations by a scripted expert", "episodes", "One point an episode."),
    "robot_bc": ("Behaviour cloning", "steps", "Measured on training batches."),
    "robot_align": ("Robot policy alignment", "iterations", "Measured on the exploring policy's own rollouts."),
    "robot_off_policy": ("Off-policy improvement of a frozen robot policy", "iterations",
                         "Measured on the exploring policy's own rollouts."),
    "robot_preference": ("Robot policy preference learning", "steps", "Measured on training batches."),
    "robot_recordings": ("Recorded robot episodes", "episodes", "As the robot noted them, or as you labelled them."),
    "robot_compose": ("Composition of robot policies", "weights tried", "Success of each candidate in the search."),
    "image_pretrain": ("Image model pre-training", "steps", "Measured on training batches."),
    "image_distill": ("Consistency distillation of an image model", "steps", "Measured on training batches."),
    "image_align": ("Image model alignment", "iterations", "Measured on the exploring policy's own images."),
    "image_compose": ("Composition of image models", "weights tried", "Reward of each candidate in the search."),
    "image_superpose": ("AND or OR of several captions or models", "ways of sampling", ""),
    "image_best_of": ("Best of several images", "images drawn for one that is kept", ""),
    "image_finetune": ("Fine-tuning of a pretrained image pipeline", "iterations",
                       "Measured on the exploring policy's own images."),
    "image_preference": ("Image preference learning", "steps", "Measured on training batches."),
}
_MAX_CURVES = 9


def write(run: Path) -> Path:
    """Write run/report.html and return its path.

    Raises: ValueError if the folder holds no run.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run} is not a run folder (it has no config.yaml); give the folder of a `diffalign train` run"
        )
    config = configs.read(run / "config.yaml")
    evaluations = read_evaluations(run / "evaluations")
    records = read_metrics(run / "metrics.jsonl")
    job_type = str(config.get("type"))
    what, steps, measured_on = _JOBS.get(job_type, (job_type, "steps", ""))
    body = [
        _headline(evaluations),
        _media(run),
        _evaluation_section(evaluations),
        _curves(
            [r for r in records if r["phase"] == "train"],
            "Training curves",
            f"{measured_on} Over {steps}; no substitute for the evaluations.",
        ),
        "" if evaluations else _curves([r for r in records if r["phase"] != "train"], "Evaluations", f"Over {steps}."),
        _config_section(run, config),
        _environment_section(run),
    ]
    page = Template(files("diffalign.cli").joinpath("report.html").read_text()).substitute(
        title=html.escape(f"{run.resolve().name}: {what}"),
        subtitle=_subtitle(run, config, records, steps),
        body="\n".join(part for part in body if part),
        version=diffalign.__version__,
    )
    target, partial = run / "report.html", run / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _subtitle(run: Path, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], steps: str) -> str:
    parts = [
        f"<code>{html.escape(str(config.get('type')))}</code>",
        f"seed {html.escape(str(config.get('seed', 0)))}",
    ]
    if records:
        parts.append(f"{max(r['step'] for r in records)} {steps}")
    finished = run / "finished.json"
    if finished.is_file():
        record = json.loads(finished.read_text())
        parts.append(f"{'last session ' if record['resumed'] else ''}{duration(record['seconds'])}")
    else:
        parts.append("not finished")
    base = config.get("base")
    if isinstance(base, str) and Path(base, "config.yaml").is_file():
        link = os.path.relpath(Path(base, "report.html").resolve(), run.resolve())
        parts.append(f'started from <a href="{html.escape(link)}">{html.escape(Path(base).name)}</a>')
    return " &middot; ".join(parts)


def _headline(evaluations: Sequence[Evaluation]) -> str:
    """Before and after of every measure, as large numbers."""
    by_name = {evaluation.name: evaluation for evaluation in evaluations}
    if "after" not in by_name:
        return ""
    after, before = by_name["after"], by_name.get("before")
    cards = []
    for name, measure in after.measures.items():
        if measure.low is None:
            continue
        earlier = before.measures.get(name) if before else None
        values = f"{earlier.text()} &rarr; {measure.text()}" if earlier else measure.text()
        spans = f"{earlier.interval()} &rarr; {measure.interval()}" if earlier else measure.interval()
        cards.append(
            f'<div class="figure"><span>{html.escape(name)}</span><b>{values}</b><span>95 % {spans}</span></div>'
        )
    return f'<div class="headline">{"".join(cards)}</div>' if cards else ""


def _media(run: Path) -> str:
    folders = [(run / "samples", "*.png"), (run / "samples", "*.mp4"), (run / "videos", "*.mp4")]
    found = [path for folder, names in folders for path in sorted(folder.glob(names))]
    pair = sorted((path for path in found if _role(path)), key=lambda path: (path.suffix, -len(_role(path)), path.name))
    rest = [path for path in found if path not in pair]
    if not found:
        return ""
    width = "pair" if len(pair) > 1 else "single"
    shown = f'<div class="{width}">{"".join(map(_figure, pair))}</div>' if pair else ""
    if rest:
        strip = f'<div class="strip">{"".join(map(_figure, rest))}</div>'
        shown += f"<details><summary>{len(rest)} more</summary>{strip}</details>" if pair else strip
    heading = "Before and after" if len({_role(path) for path in pair}) == 2 else "What the policy makes"
    return _section(heading, "The same seeds on both sides.", shown) if len(pair) > 1 else _section(heading, "", shown)


def _role(path: Path) -> str:
    return next((role for role in ("before", "after") if path.stem == role or path.stem.startswith(f"{role}_")), "")


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem.replace("_", " ").capitalize())
    if path.suffix == ".mp4":
        inner = f'<video controls loop muted autoplay playsinline src="data:video/mp4;base64,{data}"></video>'
    else:
        inner = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{name}</figcaption>{inner}</figure>"


def _evaluation_section(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return ""
    columns = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.measures))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["evaluation", "step", *columns, "how"])
    rows = "".join(_evaluation_row(evaluation, columns) for evaluation in evaluations)
    table = f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
    curves = "".join(_evaluation_curve(name, evaluations) for name in columns)
    return _section(
        "Evaluations",
        "Separate episodes or prompts, with 95 % confidence intervals.",
        table + (f'<div class="curves" style="margin-top:16px">{curves}</div>' if curves else ""),
    )


def _evaluation_row(evaluation: Evaluation, columns: Sequence[str]) -> str:
    def cell(measure: Measure | None) -> str:
        if measure is None:
            return "<td></td>"
        return f"<td>{measure.text()}" + (
            f"<br><small>{measure.interval()}</small></td>" if measure.low is not None else "</td>"
        )

    step = "" if evaluation.step is None else str(evaluation.step)
    return (
        f"<tr><td>{html.escape(evaluation.name)}</td><td>{step}</td>"
        + "".join(cell(evaluation.measures.get(name)) for name in columns)
        + f"<td><small>{html.escape(evaluation.how)}</small></td></tr>"
    )


def _evaluation_curve(name: str, evaluations: Sequence[Evaluation]) -> str:
    points = sorted(
        (e.step, m) for e in evaluations if e.step is not None and (m := e.measures.get(name)) and m.low is not None
    )
    if len(points) < 3:
        return ""
    return figures.interval_curve(
        [(float(step), m.value) for step, m in points],
        [(m.low or 0.0, m.high or 0.0) for _, m in points],
        f"{name} (95 %)",
    )


def _rank(name: str) -> int:
    return KEY_METRICS.index(name) if name in KEY_METRICS else len(KEY_METRICS)


def _curves(records: Sequence[Mapping[str, Any]], heading: str, note: str) -> str:
    names = list(dict.fromkeys(name for record in records for name in record if name not in ("phase", "step")))
    names.sort(key=lambda name: (name.startswith("time/"), _rank(name)))
    drawn = []
    for name in names:
        points = [(float(record["step"]), float(record[name])) for record in records if name in record]
        if points:
            drawn.append(figures.curve(points, name))
    if not drawn:
        return ""
    shown = f'<div class="curves">{"".join(drawn[:_MAX_CURVES])}</div>'
    if len(drawn) > _MAX_CURVES:
        more = f'<div class="curves">{"".join(drawn[_MAX_CURVES:])}</div>'
        shown += f"<details><summary>{len(drawn) - _MAX_CURVES} more curves</summary>{more}</details>"
    return _section(heading, note, shown)


def _config_section(run: Path, config: Mapping[str, Any]) -> str:
    text = html.escape((run / "config.yaml").read_text())
    links = " &middot; ".join(
        f'<a href="{name}">{name}</a>'
        for name in ("config.yaml", "metrics.jsonl", "environment.json")
        if (run / name).is_file()
    )
    return _section("What ran", f"The resolved config. In this folder: {links}.", f"<pre>{text}</pre>")


def _environment_section(run: Path) -> str:
    file = run / "environment.json"
    if not file.is_file():
        return ""
    record = json.loads(file.read_text())
    packages = record.pop("packages", {})
    pairs = [
        (
            name.replace("_", " "),
            ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value),
        )
        for name, value in record.items()
    ]
    pairs.append(("packages", ", ".join(f"{name} {number}" for name, number in packages.items())))
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in pairs)
    return _section("Environment", "", f'<div class="scroll"><table>{rows}</table></div>')


def _section(heading: str, note: str, content: str) -> str:
    said = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{heading}</h2>{said}{content}</section>"
