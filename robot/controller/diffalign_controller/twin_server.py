"""A simulated robot that runs in real time in its own process and talks over a socket, with faults on demand.

The protocol is lines of JSON over TCP on the loopback address, one object a line:

    robot -> controller   {"type": "hello", "names": [...] | null, "rate_hz": ...}      once, when a connection is made
                          {"type": "state", "measured_s": ..., "values": [Do], "position": [Da], "tool": [3] | null,
                           "stop": bool, "success": bool, "intervention": [Da] | null}  once a control period
    controller -> robot   {"type": "command", "action": [Da]}

measured_s is the machine's monotonic clock, which all its processes share. Nothing is executed from what is read. The
robot keeps its last command while nobody is connected, as servos do. Faults are timed from the first command.

Legend: Do observation features, Da action features.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.options import Span, read, words

Array = NDArray[np.floating]


class Sensed(NamedTuple):
    """What a world shows: values [Do], position [Da], tool [3] in metres or None, whether its task is done."""

    values: Array
    position: Array
    tool: Array | None
    success: bool


class World(Protocol):
    """A simulation of a robot."""

    @property
    def names(self) -> Sequence[str] | None:
        """Of a command's features, where they have any."""
        ...

    @property
    def rate_hz(self) -> float:
        """Control steps a second of real time."""
        ...

    @property
    def rest(self) -> Array:
        """The command [Da] before the first."""
        ...

    def step(self, command: Array) -> None:
        """One control period under a command [Da]."""
        ...

    def sense(self) -> Sensed:
        """The state now."""
        ...

    def human(self) -> Array:
        """What a person would do now, [Da]. Raises: ValueError where nobody knows."""
        ...


@dataclass(frozen=True)
class Faults:
    """What goes wrong; spans are in seconds from the first command.

    latency_s: of every message, each way. noise: standard deviation that is added to every observed value. dropout:
    the share of messages that get lost, each way. freeze: states keep their values and get new times, as of a camera
    that hangs. silence: no states. disconnect: nobody can connect. stop: the emergency stop is pressed. human: a person
    takes over, and the controller's commands count for nothing.

    Raises: ValueError for a negative number, or a share of 1 or more.
    """

    latency_s: float = 0.0
    noise: float = 0.0
    dropout: float = 0.0
    freeze: Span | None = None
    silence: Span | None = None
    disconnect: Span | None = None
    stop: Span | None = None
    human: Span | None = None

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.noise >= 0 and 0 <= self.dropout < 1):
            raise ValueError("the twin needs latency_s >= 0, noise >= 0 and 0 <= dropout < 1, got "
                             f"{self.latency_s}, {self.noise} and {self.dropout}")


class Server:
    """Steps a world on the monotonic clock and serves one controller at a time."""

    def __init__(self, world: World, faults: Faults, record: Path | None, seed: int) -> None:
        self.world, self.faults = world, faults
        self._random = np.random.default_rng(seed)
        self._record = None if record is None else record.open("w")
        self._begin_s: float | None = None
        self._command, self._shown = world.rest, world.sense()
        self._due_commands: deque[tuple[float, Array]] = deque()
        self._due_states: deque[tuple[float, dict[str, Any]]] = deque()
        self._address = ("127.0.0.1", 0)
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        self._unread = b""
        self._listen()
        self._address = ("127.0.0.1", self.port)

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    def run(self, *, until_stdin_closes: bool) -> None:
        """Serve, for ever or until the process that started this one is gone."""
        stdin = [sys.stdin] if until_stdin_closes else []
        next_s = time.monotonic()
        while True:
            sockets = [found for found in (self._listener, self._client) if found is not None]
            ready, _, _ = select.select([*sockets, *stdin], [], [], max(0.0, next_s - time.monotonic()))
            if stdin and sys.stdin in ready and not sys.stdin.readline():
                return
            if self._listener in ready:
                self._accept()
            if self._client in ready:
                self._receive()
            now = time.monotonic()
            if now >= next_s:
                self._tick(now)
                next_s = max(next_s + 1 / self.world.rate_hz, now)  # a late simulation is slow, it does not race

    def _tick(self, now: float) -> None:
        elapsed = -1.0 if self._begin_s is None else now - self._begin_s
        faults = self.faults
        self._connectable(faults.disconnect is None or not faults.disconnect.holds(elapsed))
        while self._due_commands and self._due_commands[0][0] <= now:
            self._command = self._due_commands.popleft()[1]
        human = self.world.human() if faults.human is not None and faults.human.holds(elapsed) else None
        self.world.step(self._command if human is None else human)
        sensed = self.world.sense()
        if self._record is not None:
            self._record.write(json.dumps({"time_s": now, "command": self._command.tolist(),
                                           "position": sensed.position.tolist()}) + "\n")
            self._record.flush()
        if not (faults.freeze is not None and faults.freeze.holds(elapsed)):
            noise = faults.noise * self._random.standard_normal(sensed.values.shape)
            self._shown = sensed._replace(values=sensed.values + noise)
        if not (faults.silence is not None and faults.silence.holds(elapsed)) and not self._lost():
            shown = self._shown
            self._due_states.append((now + faults.latency_s, {
                "type": "state", "measured_s": now, "values": shown.values.tolist(),
                "position": shown.position.tolist(), "tool": None if shown.tool is None else shown.tool.tolist(),
                "stop": faults.stop is not None and faults.stop.holds(elapsed), "success": sensed.success,
                "intervention": None if human is None else human.tolist()}))
        while self._due_states and self._due_states[0][0] <= now:
            self._send(self._due_states.popleft()[1])

    def _lost(self) -> bool:
        return bool(self._random.random() < self.faults.dropout)

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(self._address)
        self._listener.listen(1)

    def _connectable(self, wanted: bool) -> None:
        if wanted and self._listener is None:
            self._listen()
        elif not wanted and self._listener is not None:
            self._listener.close()
            self._listener = None
            self._hang_up()

    def _accept(self) -> None:
        assert self._listener is not None
        self._hang_up()
        self._client, _ = self._listener.accept()
        self._client.settimeout(0.1)  # of a controller that does not read: the simulation must go on
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        names = self.world.names
        self._send({"type": "hello", "names": None if names is None else list(names), "rate_hz": self.world.rate_hz})

    def _receive(self) -> None:
        assert self._client is not None
        try:
            found = self._client.recv(65536)
        except (ConnectionError, TimeoutError):
            found = b""
        if not found:
            self._hang_up()
            return
        *lines, self._unread = (self._unread + found).split(b"\n")
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        now = time.monotonic()
        try:
            action = np.array(json.loads(line)["action"], np.float64)
        except (ValueError, KeyError, TypeError):
            action = np.array(np.nan)
        if action.shape != self.world.rest.shape or not np.isfinite(action).all():
            self._hang_up()  # it does not speak the protocol
            return
        self._begin_s = now if self._begin_s is None else self._begin_s
        if not self._lost():
            self._due_commands.append((now + self.faults.latency_s, action))

    def _send(self, message: dict[str, Any]) -> None:
        if self._client is None:
            return
        try:
            self._client.sendall((json.dumps(message) + "\n").encode())
        except (ConnectionError, TimeoutError):
            self._hang_up()

    def _hang_up(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client, self._unread = None, b""
        self._due_commands.clear()
        self._due_states.clear()


def parser(about: str) -> argparse.ArgumentParser:
    """The arguments that every twin process takes."""
    found = argparse.ArgumentParser(description=about)
    found.add_argument("--seed", type=int, default=0, help="of the episode and of the faults (default: %(default)s)")
    found.add_argument("--record", type=Path, help="file for a line of JSON a step: command and true position")
    found.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started this one")
    found.add_argument("faults", nargs="*", metavar="key=value", help="latency_s, noise, freeze=start:duration ...")
    return found


def serve(world: World, args: argparse.Namespace) -> None:
    """Run a world as the arguments say; the first line of output is {"port": ...}."""
    faults = read(Faults, words(args.faults), "the twin")
    if faults.human is not None:
        world.human()  # loads what it needs, or refuses, before time runs
    server = Server(world, faults, args.record, args.seed)
    sys.stdout.write(json.dumps({"port": server.port}) + "\n")
    sys.stdout.flush()
    server.run(until_stdin_closes=args.until_stdin_closes)
