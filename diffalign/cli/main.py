"""`diffalign`: one command for both domains. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from diffalign.cli.errors import USER_ERRORS, paragraph

_EXAMPLES = """\
examples:
  diffalign demo                                          both main jobs, with reports (about 20 minutes on two cores)
  diffalign train configs/robot/pick_place_collect.yaml   one recipe, into runs/pick-place-collect
  diffalign train configs/image/shapes_flow_grpo.yaml learning_rate=1e-4 --run runs/faster
  diffalign evaluate runs/pick-place-dppo --episodes 100 --json
  diffalign list                                          what can be written into a config
  diffalign doctor                                        what of this machine and installation is usable
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a check of `doctor` failed, 2 an error that the user can fix, 130 interrupted,
    141 the reader of a pipe left."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if COMMANDS[args.name].forwards:
        args.words, rest = rest, []
    loose = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(loose) < len(rest) or (loose and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if loose:
        args.overrides = [*args.overrides, *loose]
    try:
        return int(args.command(args))
    except BrokenPipeError:  # the reader of a pipe, `head` for example, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        keep = {
            "train": "; --resume goes on from the newest checkpoint",
            "demo": "; the same command goes on from here",
        }
        print(f"interrupted{keep.get(args.name, '')}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        text = paragraph(error)
        if text is None or args.traceback:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2


@dataclass(frozen=True)
class Command:
    """A subcommand: where it is implemented, what --help says, its own arguments, and which shared ones it takes.

    forwards: whether all words but --traceback go on to the implementation unread, --help among them.
    """

    module: str
    function: str
    help: str
    example: str
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    json: bool = False
    threads: bool = False
    forwards: bool = False

    def __call__(self, args: argparse.Namespace) -> int:
        """Run it; the implementation is imported now."""
        return int(getattr(import_module(f"diffalign.cli.{self.module}"), self.function)(args))


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", nargs="?", choices=["robot", "image"], help="only this one (default: both)")
    parser.add_argument("--out", default="runs", help="folder of the run folders demo-* (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every stage (default: %(default)s)")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a value of the recipe at its dotted path")
    parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/<name of the recipe>)")
    resume = "go on from the newest checkpoint of the run folder, to the same numbers as without a break"
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--tensorboard", action="store_const", const="on", help="also write RUN/tensorboard")
    wandb = "also log to W&B, offline unless told otherwise"
    parser.add_argument("--wandb", nargs="?", const="offline", choices=["offline", "online"], help=wandb)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes or prompts (default: %(default)s)")
    parser.add_argument("--episodes", type=int, metavar="N", help="episodes, or prompts (default: the recipe's)")
    sampler = "how actions or images are drawn from the policy (default: the recipe's)"
    parser.add_argument("--sampler", choices=["stochastic", "zero_noise", "ode"], help=sampler)
    controller = "play this package of `diffalign export` in the simulator, beside the run's policy on the same noise"
    parser.add_argument("--controller", metavar="DIR", help=controller)


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: RUN/drawn)")
    parser.add_argument("--count", type=int, default=16, help="images or episodes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder with a robot policy")
    to = ("folder of the package, must be empty or not exist; lerobot:DIR, dppo:DIR or robomimic:FILE writes "
          "an imported policy back in the format it came in")
    parser.add_argument("--to", metavar="DIR", required=True, help=to)
    sampler = "how actions are drawn from the policy (default: as the recipe evaluates)"
    parser.add_argument("--sampler", choices=["stochastic", "zero_noise", "ode"], help=sampler)
    precision = "of the networks' products and weights; fp16 and int8 report their difference (default: %(default)s)"
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32", help=precision)
    tolerance = "largest difference of fp16 or int8 to the policy, in robot units (default: any; fp32: always 1e-4)"
    parser.add_argument("--tolerance", type=float, metavar="X", help=tolerance)
    archive = "also write policy.pt2, the same in float32 by torch.export"
    parser.add_argument("--archive", action="store_true", help=archive)
    chunking = "two more inputs, the previous chunk and its weights, towards which the chain is pulled (--sampler ode)"
    parser.add_argument("--real-time-chunking", action="store_true", help=chunking)


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["convert", "check"], help="write it in another format, or look at it")
    known = "a run folder, robomimic .hdf5, LeRobotDataset v3 folder, Minari folder or Diffusion Policy .zarr"
    parser.add_argument("source", metavar="SRC", help=known)
    parser.add_argument("--to", metavar="FORMAT:PATH", help="convert: run:, robomimic: or lerobot: and a path")
    parts = "name the observation's parts anew, e.g. state=4,environment_state=35 (lerobot's policies want both)"
    parser.add_argument("--parts", metavar="A=N,B=M", help=parts)
    parser.add_argument("--keys", metavar="A,B", help="only these parts of the observation, in this order")
    parser.add_argument("--rate-hz", type=float, metavar="N", help="control steps a second, where SRC does not say")
    parser.add_argument("--out", metavar="FILE", help="check: the report (default: <name of SRC>-check.html)")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")


COMMANDS = {
    "demo": Command(
        "demo", "demo", "both main jobs from nothing, each ending in a report with before and after",
        "diffalign demo robot --out runs --seed 0", _demo_arguments, threads=True),
    "train": Command(
        "commands", "train", "run a recipe: collect, pre-train, clone or align",
        "diffalign train configs/robot/pick_place_dppo.yaml seed=1 --run runs/pick-place-1",
        _train_arguments, threads=True),
    "collect": Command(
        "commands", "train", "record demonstrations (a robot_collect recipe)",
        "diffalign collect configs/robot/pick_place_collect.yaml seed=1 --run runs/pick-place-collect-1",
        _train_arguments, threads=True),
    "compose": Command(
        "commands", "train",
        "compose models: convex weights by search, or AND / OR (robot_compose, image_compose, image_superpose)",
        "diffalign compose configs/robot/pick_place_compose.yaml --run runs/pick-place-compose",
        _train_arguments, threads=True),
    "evaluate": Command(
        "commands", "evaluate", "evaluate the trained policy of a run, with 95 % intervals",
        "diffalign evaluate runs/demo-robot --seed 1 --episodes 100 --json",
        _evaluate_arguments, json=True, threads=True),
    "sample": Command(
        "commands", "sample", "draw pictures or videos from the trained policy of a run",
        "diffalign sample runs/demo-image --out pictures --count 64", _sample_arguments, threads=True),
    "export": Command(
        "commands", "export", "write a robot policy as ONNX with manifest, parity and latency report",
        "diffalign export runs/demo-robot --to controllers/pick-place", _export_arguments, json=True, threads=True),
    "deploy": Command(
        "controller", "deploy", "run an exported policy on a robot, or on its digital twin",
        "diffalign deploy controllers/pick-place --robot twin --seconds 5", forwards=True),
    "data": Command(
        "data", "data", "convert recorded robot episodes between formats, or check them",
        "diffalign data convert runs/pick-place-collect --to lerobot:data/pick-place", _data_arguments, json=True),
    "report": Command(
        "commands", "report", "rebuild report.html of a run folder, finished or not",
        "diffalign report runs/demo-robot", _report_arguments),
    "list": Command(
        "inventory", "show", "what a config can name: algorithms, kernels, rewards, environments, policies ...",
        "diffalign list --json", json=True),
    "doctor": Command(
        "doctor", "doctor", "versions, devices, renderer, and which extras are usable or why not",
        "diffalign doctor --json", json=True),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; parsed arguments hold `name` and `command`."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Align diffusion and flow models, of images and of robots, by policy optimization."
    parser = argparse.ArgumentParser(prog="diffalign", description=about, epilog=_EXAMPLES, formatter_class=raw)
    sub = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.help.replace("%", "%%")
        about = f"{command.help[0].upper()}{command.help[1:]}."
        own = sub.add_parser(
            name, help=text, description=about, epilog=f"example:\n  {command.example}", formatter_class=raw,
            add_help=not command.forwards,
        )
        own.set_defaults(command=command)
        command.add(own)
        if command.json:
            own.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        if command.threads:
            own.add_argument(
                "--threads", type=int, metavar="N", help="CPU threads of torch (default: its own choice; demo: 2)"
            )
        own.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


if __name__ == "__main__":
    sys.exit(main())
