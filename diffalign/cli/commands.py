"""train, collect, evaluate, sample, export and report."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.cli import jobs, launch, rendering
from diffalign.cli.errors import USER_ERRORS
from diffalign.cli.progress import ConsoleProgress

if TYPE_CHECKING:
    from diffalign.train.run import Run
    from diffalign_robot.export import ExportableJob


_JOBS_OF = {"collect": ("robot_collect",), "compose": ("robot_compose", "image_compose", "image_superpose")}


def train(args: argparse.Namespace) -> int:
    """`diffalign train CONFIG a.b=c ... --run DIR --resume`."""
    prepare(args.threads)
    file = Path(args.config)
    job_type, job = jobs.load_job(file, args.overrides)
    only = _JOBS_OF.get(args.name, (job_type,))
    if job_type not in only:
        raise ValueError(f"{file} is a {job_type} job; `{args.name}` runs {' and '.join(only)} jobs. "
                         f"Use `diffalign train {file}`")
    path = Path(args.run) if args.run else Path("runs") / file.stem.replace("_", "-")
    loggers = {name: mode for name, mode in (("tensorboard", args.tensorboard), ("wandb", args.wandb)) if mode}
    with launch.processes(job_type, shards=isinstance(job, jobs.Shards) and job.shards):
        page = run_job(job, path, resume=args.resume, loggers=loggers)
        if page is not None:
            say(f"run folder {path}, report {page}")
    return 0


def run_job(job: jobs.Job, path: Path, *, resume: bool, loggers: Mapping[str, str] | None = None) -> Path | None:
    """Train a job in its folder with console progress, then write the report; returns the report's path.

    Of several processes the first one shows, logs and reports; the others return None.
    """
    from diffalign import config
    from diffalign.cli import report
    from diffalign.cli.writers import open_writers
    from diffalign.train import distributed
    from diffalign.train.run import Run

    config_yaml = config.dump(job)
    if resume:
        jobs.refuse_other_config(path, config_yaml)
    progress = ConsoleProgress(path.name)
    started, existed, resumed = time.time(), path.exists(), (path / "metrics.jsonl").exists()
    run = Run.create(path, config_yaml, resume=resume, listener=progress)
    if not distributed.leads():
        job.train(run)
        return None
    run.say = progress.say
    try:
        run.writers = open_writers(loggers or {}, path)
        with progress:
            job.train(run)
    except USER_ERRORS:
        if not existed and not (path / "metrics.jsonl").exists():
            shutil.rmtree(path)  # nothing ran (a missing base, for instance): the same command must work once mended
        raise
    run.write_json("finished.json", {"seconds": round(time.time() - started, 1), "resumed": resumed})
    return report.write(path)


def evaluate(args: argparse.Namespace) -> int:
    """`diffalign evaluate RUN`: one JSON object, or the same as lines."""
    prepare(args.threads)
    run, job = jobs.open_run(Path(args.run))
    if args.controller is None:
        result = job.evaluate(run, seed=args.seed, episodes=args.episodes, sampler=args.sampler)
    else:
        from diffalign_robot.rehearsal import rehearse

        result = rehearse(run, _exportable(job, run), Path(args.controller), seed=args.seed, episodes=args.episodes,
                          sampler=args.sampler)
    print(json.dumps(result) if args.json else readable(result))
    return 0


def sample(args: argparse.Namespace) -> int:
    """`diffalign sample RUN`: grids or videos of the trained policy."""
    prepare(args.threads)
    run, job = jobs.open_run(Path(args.run))
    out = Path(args.out) if args.out else run.folder("drawn")
    out.mkdir(parents=True, exist_ok=True)
    for path in job.sample(run, out, seed=args.seed, count=args.count):
        print(path)
    return 0


def export(args: argparse.Namespace) -> int:
    """`diffalign export RUN --to DIR`: a controller package with its parity and latency report.

    `--to FORMAT:DIR` writes the policy in the format of the program that it was imported from.
    """
    prepare(args.threads)
    run, job = jobs.open_run(Path(args.run))
    from diffalign_robot.evaluate import evaluation_policy
    from diffalign_robot.export import Packing, export_run
    from diffalign_robot.native import formats, saving

    native = formats.place(args.to)
    if native is not None:
        exportable = _exportable(job, run)
        policy = evaluation_policy(exportable.trained_policy(run), args.sampler or exportable.evaluation.sampler)
        result = saving.write(native[0], policy, run.path, native[1])
        print(json.dumps(result) if args.json else readable(result))
        return 0
    packing = Packing(args.precision, args.archive, args.real_time_chunking, args.tolerance)
    result = export_run(run, _exportable(job, run), Path(args.to), packing, sampler=args.sampler)
    archive = {f"{name} (policy.pt2)": value for name, value in result.get("archive_parity", {}).items()}
    shown = {"package": args.to, "precision": result["precision"], **result["parity"], **archive, **result["latency"]}
    print(json.dumps(result) if args.json else readable(shown))
    return 0


def _exportable(job: jobs.PolicyJob, run: Run) -> ExportableJob:
    from diffalign_robot.export import ExportableJob

    if not isinstance(job, ExportableJob):
        raise ValueError(f"{run.path} is no robot run; a controller is of a run with a robot policy")
    return job


def report(args: argparse.Namespace) -> int:
    """`diffalign report RUN`: rebuild report.html, for instance of a run that is still going."""
    from diffalign.cli import report as page

    print(page.write(Path(args.run)))
    return 0


def prepare(threads: int | None) -> None:
    """Thread count, and a MuJoCo renderer that works without a display (before anything imports mujoco)."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        import torch

        torch.set_num_threads(threads)
    rendering.choose()


def readable(result: dict[str, Any]) -> str:
    """An evaluation as aligned lines for people."""
    flat: list[tuple[str, str]] = []
    for name, value in result.items():
        if isinstance(value, dict):
            flat += [(f"{name}.{inner}", _one(item)) for inner, item in value.items()]
        else:
            flat.append((name, _one(value)))
    width = max(len(name) for name, _ in flat)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in flat)


def _one(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(_one(item) for item in value) + "]"
    if isinstance(value, dict) and {"mean", "interval"} <= value.keys():
        return f"{_one(value['mean'])}  95% {_one(value['interval'])}"
    return str(value)


def say(text: str) -> None:
    """One line on stderr; stdout is for results."""
    print(text, file=sys.stderr)
