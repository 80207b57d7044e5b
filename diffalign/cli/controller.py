"""`diffalign deploy`: the command of the controller runtime, a package of its own that works without this one."""

from __future__ import annotations

import argparse


def deploy(args: argparse.Namespace) -> int:
    """Hand all words on to the runtime; returns its exit code. Raises: ValueError if it is not installed."""
    try:
        from diffalign_controller.deploy import main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("diffalign_controller", "onnxruntime"):
            raise
        raise ValueError(f"deploying needs the controller runtime ({error.name} is not installed); install it with "
                         "`pip install ./robot/controller`") from None
    return main(args.words, prog="diffalign deploy")
