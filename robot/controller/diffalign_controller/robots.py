"""From `--robot NAME key=value ...` to a robot.

    twin               a simulation in its own process: the environment the policy was trained in, else a planar arm
    lerobot:TYPE       any robot that LeRobot has a driver or a plug-in for
    dds                a ROS 2 robot, over DDS, without ROS
    module:function    your own: the function takes the options as a dict of strings and returns a robot
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from diffalign_controller import options
from diffalign_controller.functions import function_at
from diffalign_controller.robot import Clock, Robot
from diffalign_controller.twin import Twin, TwinProcess
from diffalign_controller.twin_server import Faults


@runtime_checkable
class Closes(Protocol):
    """A robot that must be let go."""

    def close(self) -> None: ...


@runtime_checkable
class Named(Protocol):
    """A robot that knows the names of its command's features, None where it does not."""

    @property
    def names(self) -> tuple[str, ...] | None: ...


@runtime_checkable
class Notes(Protocol):
    """A robot that has more to say of a tick than its observation: `success`, `intervention`, `sent` ..."""

    def note(self) -> dict[str, Any]: ...


@runtime_checkable
class Reports(Protocol):
    """A robot that can say at the end how it went."""

    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TwinOptions:
    """Of the twin beside its faults.

    world: `environment` is the one that the policy was trained in, `arm` the planar arm. port: of a twin that runs
    already, None starts one. record: a file for the commands and true positions.
    """

    world: str = ""
    port: int | None = None
    seed: int = 0
    record: str = ""


def open_robot(name: str, pairs: Mapping[str, str], manifest: Mapping[str, Any], rate_hz: float, command_hz: float,
               clock: Clock) -> Robot:
    """The robot of a name with its options; the caller closes it.

    rate_hz: of the policy's actions, and of an environment's control steps. command_hz: of commands.

    Raises: ValueError for an unknown name or option, or what is missing on this machine. ConnectionError if the robot
    cannot be reached.
    """
    kind, colon, rest = name.partition(":")
    if name == "twin":
        return _twin(pairs, manifest, rate_hz, command_hz)
    if kind == "lerobot" and rest:
        return _optional("diffalign_controller.lerobot_robot", "lerobot", "lerobot").connected(rest, pairs, clock)  # type: ignore[no-any-return]
    if name == "dds":
        return _optional("diffalign_controller.dds", "cyclonedds", "dds").connected(pairs, command_hz, clock)  # type: ignore[no-any-return]
    if colon and rest.isidentifier():
        return _own(name, pairs)
    raise ValueError(f"--robot {name!r} is unknown; it must be twin, lerobot:TYPE, dds, or module:function")


def of_environment(name: str, pairs: Mapping[str, str], manifest: Mapping[str, Any]) -> bool:
    """Whether the robot is the twin of the environment that the policy was trained in."""
    return name == "twin" and pairs.get("world") != "arm" and bool(manifest.get("environment"))


def _twin(pairs: Mapping[str, str], manifest: Mapping[str, Any], rate_hz: float, command_hz: float) -> Twin:
    own = {field.name for field in fields(TwinOptions)}
    said = options.read(TwinOptions, {key: text for key, text in pairs.items() if key in own}, "the twin")
    faults = {key: text for key, text in pairs.items() if key not in own}
    options.read(Faults, faults, f"the twin ({', '.join(sorted(own))} and its faults)")  # refused before it starts
    if said.port is not None:
        if set(pairs) != {"port"}:
            raise ValueError("a twin that runs already has its options; give only port=...")
        return Twin(said.port)
    environment = manifest.get("environment")
    world = said.world or ("environment" if environment else "arm")
    if world not in ("environment", "arm") or (world == "environment" and not environment):
        raise ValueError(f"world must be arm, or environment where the package names one, got {world!r}")
    hz = rate_hz if world == "environment" else command_hz
    words = ["--seed", str(said.seed), "--rate", repr(hz), *(f"{key}={text}" for key, text in faults.items())]
    words += ["--record", said.record] if said.record else []
    if world == "environment":
        process = TwinProcess("diffalign_robot.twin", ["--environment", json.dumps(environment), *words])
    else:
        process = TwinProcess("diffalign_controller.arm", words)
    try:
        return Twin(process.port, process)
    except ConnectionError:
        process.close()
        raise


def _optional(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ValueError(f"this robot needs {package}, which is not installed; "
                         f"`pip install './robot/controller[{extra}]'`") from None


def _own(place: str, pairs: Mapping[str, str]) -> Robot:
    factory: Callable[[dict[str, str]], Robot] = function_at(place, "--robot")
    robot = factory(dict(pairs))
    missing = [name for name in ("observe", "command", "emergency_stop_pressed")
               if not callable(getattr(robot, name, None))]
    if missing:
        raise ValueError(f"--robot {place} returned a {type(robot).__name__} without {', '.join(missing)}; "
                         "see diffalign_controller.robot.Robot")
    return robot
