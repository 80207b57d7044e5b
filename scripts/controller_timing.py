"""How well this machine runs an exported policy: decision, tick, jitter and missed deadlines of the real loop.

    python scripts/controller_timing.py controllers/pick-place                     # 60 s at 50 Hz, 60 s at 200 Hz
    python scripts/controller_timing.py controllers/pick-place --rate-hz 80 --servo-hz 80 400 --seconds 10 --json

The robot is a row of numbers; the package, the thread of decisions, the safety filter and the log are the real ones.
Rows: decision, what the policy took; delay, until the loop had it; tick, the loop's own work; wake, how late it woke;
period, from tick to tick. A command left out is one whose period had passed before the one before it was done.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from diffalign_controller.rehearsal import rehearse, table
from diffalign_controller.schemes import SchemeName
from diffalign_controller.screen import Screen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a package that `diffalign export` wrote")
    parser.add_argument("--rate-hz", type=float, default=50.0, help="of the policy's actions (50)")
    parser.add_argument("--servo-hz", type=float, nargs="+", default=[50.0, 200.0], help="of commands (50 200)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run (60)")
    parser.add_argument("--scheme", choices=get_args(SchemeName), default="receding")
    parser.add_argument("--in-line", action="store_true", help="decide in the loop instead of in a thread")
    parser.add_argument("--status", action="store_true", help="a line on standard error that is renewed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    screen = Screen(sys.stderr) if args.status else None
    try:
        runs = [rehearse(args.folder, rate_hz=args.rate_hz, servo_hz=servo_hz, seconds=args.seconds, scheme=args.scheme,
                         in_line=args.in_line, status=screen and screen.show) for servo_hz in args.servo_hz]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if screen is not None:
            screen.close()
    print(json.dumps(runs, indent=2) if args.json else table(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
