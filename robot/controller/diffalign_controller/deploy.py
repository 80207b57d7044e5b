"""`diffalign-controller DIR --robot ...`: an exported policy on a robot, until the time is up or something stops it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np

from diffalign_controller import limits as limit_files
from diffalign_controller import options
from diffalign_controller.inference import Inference, InLine, Threaded
from diffalign_controller.log import Log
from diffalign_controller.loop import Controller, Exit, Recorder, Settings
from diffalign_controller.policy import Policy
from diffalign_controller.robot import Clock, MonotonicClock, Observation, Robot
from diffalign_controller.robots import Closes, Named, Notes, Reports, of_environment, open_robot
from diffalign_controller.safety import Limits, SafetyFilter
from diffalign_controller.schemes import SchemeName, scheme_of
from diffalign_controller.screen import Screen
from diffalign_controller.watchdog import Watchdog

_EXAMPLE = """\
example:
  {prog} controllers/pick-place --robot twin --seconds 5 --log runs/twin-log
  {prog} controllers/arm --robot lerobot:so101_follower port=/dev/ttyACM0 id=left --limits arm.yaml
  {prog} controllers/arm --robot dds joints=shoulder,elbow,wrist --limits joint_limits.yaml --rate 50

exit codes:
  0 done or asked to stop, 1 crash, 2 wrong use, 3 emergency stop, 4 stale or frozen observation, 5 no chunk or a failed
  policy, 6 NaN or infinity, 7 tool outside its box, 8 robot not reached
"""


def main(argv: Sequence[str] | None = None, *, prog: str = "diffalign-controller") -> int:
    """The exit code of a deployment (loop.Exit), 2 for what the user can fix."""
    args = parser(prog).parse_intermixed_args(argv)
    with ExitStack() as stack:
        try:
            deployment = prepared(args, stack)
        except ConnectionError as error:
            print(f"error: the robot cannot be reached: {error}", file=sys.stderr)
            return int(Exit.CONNECTION)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return int(deployment.run())


def parser(prog: str) -> argparse.ArgumentParser:
    """The arguments of a deployment."""
    found = argparse.ArgumentParser(prog=prog, epilog=_EXAMPLE.format(prog=prog),
                                    description="Run an exported policy on a robot, within its limits.",
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("package", metavar="DIR", type=Path, help="a package that `diffalign export` wrote")
    add("options", nargs="*", metavar="key=value", help="options of the robot, see docs/robots.md")
    add("--robot", required=True, metavar="NAME", help="twin, lerobot:TYPE, dds, or module:function")
    add("--rate", type=float, metavar="HZ", help="control rate (default: the package's)")
    add("--servo-hz", type=float, metavar="HZ", help="rate of commands, at least the control rate (default: that "
        "one)")
    add("--between", choices=["linear", "hold", "spread"], help="what is commanded between two actions: "
        "linear for places, hold for velocities, spread for changes (default: hold for an environment's twin, linear "
        "for places)")
    add("--seconds", type=float, help="how long (default: until Ctrl-C or SIGTERM, which bring the robot to rest)")
    add("--log", type=Path, metavar="DIR", help="folder of the log (default: logs/<name of the package>)")
    add("--limits", type=Path, metavar="FILE", help="joint limits as in ROS 2's joint_limits.yaml, or the same as JSON "
        "(default: the package's action limits)")
    add("--rest", choices=["last", "zero"], help="what brings the robot to rest: the last command, where commands are "
        "places, or zero, where they are velocities or changes (default: zero for an environment's twin, else last)")
    add("--scheme", choices=get_args(SchemeName), default="receding", help="how chunks are played: the newest one, the "
        "weighted mean of all, the newest blended into the one before, or real-time chunking, for packages with its "
        "inputs (default: %(default)s)")
    add("--execute", type=int, metavar="N", help="actions of a chunk before the next is asked for (default: half)")
    add("--inference", choices=["thread", "inline"], default="thread", help="where decisions are made "
        "(default: %(default)s); inline waits for each, for policies that need a fraction of a period")
    add("--ramp", type=float, default=1.0, metavar="S", help="seconds over which actions are blended in (default: "
        "%(default)s)")
    add("--max-age", type=float, default=0.1, metavar="S", help="of an observation (default: %(default)s)")
    add("--max-unchanged", type=float, metavar="S", help="of an observation's values (default: for ever)")
    add("--max-inference", type=float, default=0.5, metavar="S", help="of a decision (default: %(default)s)")
    add("--max-hold", type=float, default=2.0, metavar="S", help="of a hold before the stop (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the policy's noise (default: %(default)s)")
    add("--status", action="store_true", help="a line on stderr, renewed four times a second: tick, state, rate, "
        "missed commands, age of the chunk, time of work and decisions")
    add("--json", action="store_true", help="print the summary as one JSON object")
    return found


@dataclasses.dataclass
class Deployment:
    """A controller on a robot that answers, ready to run."""

    controller: Controller
    robot: Robot
    screen: Screen
    log: Path
    seconds: float
    as_json: bool

    def run(self) -> Exit:
        """Control, with Ctrl-C and SIGTERM bringing the robot to rest, and say how it went on stdout."""
        with _asked_by_signals(self.controller):
            try:
                code = self.controller.run(self.seconds)
            finally:
                self.screen.close()
        timing, periods = self.controller.timing, np.array(self.controller.timing.periods_s or [math.nan]) * 1000
        summary = {"exit": int(code), "meaning": code.name.lower(), "reason": self.controller.reason,
                   "ticks": timing.ticks, "missed": timing.missed, "period_ms_p50": round(float(np.median(periods)), 3),
                   "period_ms_p99": round(float(np.quantile(periods, 0.99)), 3), "log": str(self.log)}
        summary |= self.robot.report() if isinstance(self.robot, Reports) else {}
        lines = [f"{name:<14} {value}" for name, value in summary.items()]
        print(json.dumps(summary) if self.as_json else "\n".join(lines))
        return code


class Tagged:
    """A log whose ticks also hold what the robot notes, and whose changes of state are said as lines of text."""

    def __init__(self, log: Recorder, robot: Robot, say: Callable[[str], None]) -> None:
        self._log, self._robot, self._say, self._start_s = log, robot, say, time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        """Pass it on."""
        if "tick" in record and isinstance(self._robot, Notes):
            record = {**record, **self._robot.note()}
        if record.get("event") in ("state", "crash"):
            self._say(f"{time.monotonic() - self._start_s:8.2f} s  {record.get('to', 'crash'):<9}  {record['reason']}")
        self._log.write(record)


def prepared(args: argparse.Namespace, stack: ExitStack) -> Deployment:
    """Everything checked before the first command; the stack closes it.

    Raises: ValueError or OSError for what the user can fix. ConnectionError if the robot does not answer.
    """
    policy, clock = Policy(args.package, seed=args.seed), MonotonicClock()
    manifest = policy.manifest
    rate_hz = manifest["control_rate_hz"] if args.rate is None else args.rate
    if rate_hz is None:
        raise ValueError("the package does not know its control rate; give the training environment's with --rate HZ")
    if not 0 < rate_hz < math.inf:
        raise ValueError(f"--rate must be positive, got {rate_hz}")
    content = None if args.limits is None else limit_files.read_limits(args.limits)
    pairs = options.words(args.options)
    settings = _settings(args, policy, rate_hz, of_environment(args.robot, pairs, manifest),
                         None if content is None else limit_files.workspace_of(content))
    scheme = scheme_of(args.scheme, policy, args.execute)
    robot = open_robot(args.robot, pairs, manifest, rate_hz, settings.command_hz, clock)
    if isinstance(robot, Closes):
        stack.callback(robot.close)
    seen = _first_observation(robot, clock)
    _require_fit(policy, seen)
    names = robot.names if isinstance(robot, Named) else None
    limits = limit_files.package_limits(policy.low, policy.high) if content is None \
        else limit_files.limits_of(content, policy.low, policy.high, settings.command_hz, names)
    safety = SafetyFilter(limits, 1 / settings.command_hz)
    safety.reset(np.zeros_like(seen.position) if settings.rest == "zero" else seen.position)
    inference = _inference(args.inference, policy, stack)
    folder = args.log or Path("logs") / args.package.resolve().name
    log, screen = Log(folder), Screen(sys.stderr)
    stack.callback(log.close)
    log.write(_header(args, manifest, limits, settings))
    controller = Controller(robot, inference, scheme, safety, Tagged(log, robot, screen.say), clock, settings,
                            screen.show if args.status else None)
    return Deployment(controller, robot, screen, folder, math.inf if args.seconds is None else args.seconds, args.json)


def _settings(args: argparse.Namespace, policy: Policy, rate_hz: float, environment: bool,
              workspace: limit_files.Box | None) -> Settings:
    """environment: the robot is an environment's twin, which acts once a control period on its newest command."""
    if environment and args.between == "spread" and args.servo_hz not in (None, rate_hz):
        raise ValueError("an environment's twin acts once a control period, on its newest command: --between spread "
                         f"would move it {rate_hz / args.servo_hz:g} times as far as the policy wants; use hold")
    return Settings(
        rate_hz=rate_hz, history=policy.history, servo_hz=args.servo_hz, ramp_s=args.ramp, workspace=workspace,
        between=args.between or ("hold" if environment else None),
        rest=args.rest or ("zero" if environment else "last"),
        watchdog=Watchdog(observation_age_s=args.max_age, unchanged_s=args.max_unchanged,
                          inference_s=args.max_inference, hold_s=args.max_hold))


def _first_observation(robot: Robot, clock: Clock, *, patience_s: float = 5.0) -> Observation:
    """The first that comes. Raises: ConnectionError if none comes in that time."""
    deadline = clock.now_s() + patience_s
    while True:
        try:
            return robot.observe()
        except ConnectionError:
            if clock.now_s() > deadline:
                raise
        clock.sleep_until(clock.now_s() + 0.01)


def _require_fit(policy: Policy, seen: Observation) -> None:
    found = seen.values.shape, seen.position.shape
    wanted = (policy.obs_dim // policy.history,), (policy.action_dim,)
    if found != wanted:
        raise ValueError(f"the policy reads observations of shape {wanted[0]} and commands {wanted[1]}, the robot has "
                         f"{found[0]} and {found[1]}; choose the robot or the package that fits")


def _inference(where: str, policy: Policy, stack: ExitStack) -> Inference:
    if where == "inline":
        return InLine(policy.decide)
    threaded = Threaded(policy.decide)
    stack.callback(threaded.close)
    return threaded


def _header(args: argparse.Namespace, manifest: dict[str, Any], limits: Limits, settings: Settings) -> dict[str, Any]:
    return {"event": "start", "wall_time_s": time.time(), "package": args.package.resolve().name,
            "sha256": manifest["sha256"], "environment": manifest.get("environment"), "robot": args.robot,
            "options": args.options, "seed": args.seed, "limits": dataclasses.asdict(limits),
            "settings": dataclasses.asdict(settings), "scheme": args.scheme}


@contextmanager
def _asked_by_signals(controller: Controller) -> Iterator[None]:
    """Ctrl-C and SIGTERM bring the robot to rest; only where this is the main thread, which alone hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: controller.stop()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
