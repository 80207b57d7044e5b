"""`diffalign`: one command for both domains. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

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
    """The exit code: 0 done, 1 a check of `doctor` failed, 2 an error that the user can fix, 130 interrupted."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    loose = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(loose) < len(rest) or (loose and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if loose:
        args.overrides = [*args.overrides, *loose]
    try:
        return int(args.command(args))
    except KeyboardInterrupt:
        keep = {
            "train": "; --resume goes on from the newest checkpoint",
            "demo": "; the same command goes on from here",
        }
        print(f"diffalign {args.name}: interrupted{keep.get(args.name, '')}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        text = paragraph(error)
        if text is None or args.traceback:
            raise
        print(f"diffalign {args.name}: {text}", file=sys.stderr)
        return 2


def _lazy(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        return int(getattr(import_module(f"diffalign.cli.{module}"), function)(args))

    return run


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; every subparser sets `command` and `name`."""
    parser = argparse.ArgumentParser(
        prog="diffalign",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Align diffusion and flow models, of images and of robots, by policy optimization.",
    )
    parser.set_defaults(overrides=[])
    sub = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _add_demo(sub)
    _add_train(
        sub,
        "train",
        "run a recipe: collect, pre-train, clone or align",
        "diffalign train configs/robot/pick_place_dppo.yaml algorithm.learning_rate=1e-4 --run runs/slow",
    )
    _add_train(
        sub,
        "collect",
        "record demonstrations (a robot_collect recipe)",
        "diffalign collect configs/robot/pick_place_collect.yaml seed=1 --run runs/pick-place-collect-1",
    )
    _add_evaluate(sub)
    _add_sample(sub)
    _add_report(sub)
    _add(
        sub,
        "list",
        "inventory",
        "show",
        "what a config can name: algorithms, kernels, advantages, rewards, environments ...",
        "diffalign list --json",
        json=True,
    )
    _add(
        sub,
        "doctor",
        "doctor",
        "doctor",
        "versions, devices, renderer, and which extras are usable or why not",
        "diffalign doctor --json",
        json=True,
    )
    return parser


if TYPE_CHECKING:
    _Sub = argparse._SubParsersAction[argparse.ArgumentParser]


def _add(
    sub: _Sub,
    name: str,
    module: str,
    function: str,
    help: str,
    example: str,
    *,
    json: bool = False,
    threads: bool = False,
) -> argparse.ArgumentParser:
    parser = sub.add_parser(
        name,
        help=help.replace("%", "%%"),
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_lazy(module, function))
    if json:
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    if threads:
        parser.add_argument(
            "--threads", type=int, metavar="N", help="CPU threads for torch (default: torch's own choice)"
        )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def _add_demo(sub: _Sub) -> None:
    parser = _add(
        sub,
        "demo",
        "demo",
        "demo",
        "both main jobs from nothing, each ending in a report with before and after",
        "diffalign demo robot --out runs --seed 0",
        threads=True,
    )
    parser.add_argument("domain", nargs="?", choices=["robot", "image"], help="only this one (default: both)")
    parser.add_argument(
        "--out",
        default="runs",
        help="folder of the run folders demo-robot*, demo-image* (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every stage (default: %(default)s)")


def _add_train(sub: _Sub, name: str, help: str, example: str) -> None:
    parser = _add(sub, name, "commands", "train", help, example, threads=True)
    parser.add_argument("config", metavar="CONFIG", help="a YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a value of the recipe at its dotted path")
    parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/<name of the recipe>)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in the run folder, to the same numbers as without a break",
    )


def _add_evaluate(sub: _Sub) -> None:
    parser = _add(
        sub,
        "evaluate",
        "commands",
        "evaluate",
        "evaluate the trained policy of a run, with 95 % intervals",
        "diffalign evaluate runs/demo-robot --seed 1 --episodes 100 --json",
        json=True,
        threads=True,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes or prompts (default: %(default)s)")
    parser.add_argument(
        "--episodes", type=int, metavar="N", help="episodes, or images per evaluation (default: the recipe's)"
    )
    parser.add_argument(
        "--sampler",
        choices=["stochastic", "zero_noise", "ode"],
        help="how actions or images are drawn from the policy (default: the recipe's)",
    )


def _add_sample(sub: _Sub) -> None:
    parser = _add(
        sub,
        "sample",
        "commands",
        "sample",
        "draw pictures or videos from the trained policy of a run",
        "diffalign sample runs/demo-image --out pictures --count 64",
        threads=True,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: RUN/drawn)")
    parser.add_argument("--count", type=int, default=16, help="images or episodes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")


def _add_report(sub: _Sub) -> None:
    parser = _add(
        sub,
        "report",
        "commands",
        "report",
        "rebuild report.html of a run folder, finished or not",
        "diffalign report runs/demo-robot",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")


if __name__ == "__main__":
    sys.exit(main())
