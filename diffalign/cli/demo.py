"""`diffalign demo`: both main jobs from nothing, small enough for two CPU cores."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import diffalign
from diffalign.cli import jobs, rendering
from diffalign.cli.commands import prepare, run_job, say


@dataclass(frozen=True)
class Stage:
    """One job of a demo: its config, the suffix of its folder, and what the demo changes in the recipe."""

    config: str
    suffix: str
    what: str
    overrides: tuple[str, ...] = ()


DEMOS = {
    "robot": (
        Stage(
            "robot/pick_place_collect.yaml",
            "-collect",
            "noisy demonstrations by Meta-World's scripted expert",
        ),
        Stage("robot/pick_place_bc.yaml", "-bc", "behaviour cloning of a chunked diffusion policy"),
        Stage("robot/pick_place_dppo.yaml", "", "DPPO fine-tuning of the whole denoising chain"),
    ),
    "image": (
        Stage("image/shapes_pretrain.yaml", "-pretrain", "an autoencoder and flow matching on captioned shapes"),
        Stage(
            "image/shapes_flow_grpo.yaml",
            "",
            "Flow-GRPO on a score that reads colors, shapes and relation off the pixels",
            ("iterations=60", "evaluate_every=20"),
        ),
    ),
}


_THREADS = 2  # the models are so small that more threads only wait for each other


def demo(args: argparse.Namespace) -> int:
    """`diffalign demo [robot|image]`: every stage in its own run folder; finished stages are kept."""
    prepare(_THREADS if args.threads is None else args.threads)
    pages = [_run(domain, Path(args.out), args.seed) for domain in ([args.domain] if args.domain else list(DEMOS))]
    say("open in a browser: " + ", ".join(str(page) for page in pages))
    return 0


def _run(domain: str, out: Path, seed: int) -> Path:
    stages, base = DEMOS[domain], None
    films = [] if domain == "image" or rendering.works() else ["evaluation.videos=0"]
    if films:
        say(f"no videos: MuJoCo cannot render here. For videos: {rendering.FIXES['egl']}")
    for number, stage in enumerate(stages, 1):
        folder = out / f"demo-{domain}{stage.suffix}"
        overrides = [f"seed={seed}", *stage.overrides]
        if base:
            overrides += [f"base={base}", *films]
        base = folder
        _, job = jobs.load_job(configs(domain) / stage.config, overrides)
        if _finished(folder, job):
            say(f"{folder}: already done")
            continue
        say(f"demo {domain}, stage {number} of {len(stages)}: {stage.what}")
        run_job(job, folder, resume=True)
    return out / f"demo-{domain}" / "report.html"


def _finished(folder: Path, job: jobs.Job) -> bool:
    from diffalign import config

    jobs.refuse_other_config(folder, config.dump(job))
    return (folder / "finished.json").is_file() and (folder / "report.html").is_file()


def configs(domain: str) -> Path:
    """The recipes: ./configs, or those of the checkout that diffalign is installed from.

    Raises: ValueError where neither exists (a wheel installed away from a checkout).
    """
    candidates = [Path("configs"), Path(diffalign.__file__).resolve().parents[1] / "configs"]
    for folder in candidates:
        if all((folder / stage.config).is_file() for stage in DEMOS[domain]):
            return folder
    raise ValueError(
        f"the demo's recipes were found neither in {candidates[0].resolve()} nor in {candidates[1]}; "
        "run it in a checkout of diffalign, whose configs/ folder holds them"
    )
