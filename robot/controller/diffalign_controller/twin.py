"""A robot at the other end of a socket: the client of twin_server.py, and the process that it may start.

Legend: Da action features.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.robot import Observation

Array = NDArray[np.floating]
_RETRY_S = 0.05
_PATIENCE_S = 5.0  # for the first state


class TwinProcess:
    """A twin server in a process of its own, which ends with this one."""

    def __init__(self, module: str, words: Sequence[str]) -> None:
        """Raises: ValueError if it does not start; what it said stands on stderr."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # our imports
        self._process = subprocess.Popen([sys.executable, "-m", module, "--until-stdin-closes", *words],
                                         env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            code = self._process.returncode
            raise ValueError(f"the twin did not start (`python -m {module}` ended with {code}); its message is above")
        self.port = int(json.loads(line)["port"])

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it end, and wait for that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Twin:
    """The robot at a loopback port. A thread keeps its newest state, and connects again when the connection is lost."""

    def __init__(self, port: int, process: TwinProcess | None = None) -> None:
        """process: ended with `close`. Raises: ConnectionError if no state comes within five seconds."""
        self.names: tuple[str, ...] | None = None
        self._port, self._process = port, process
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._state: dict[str, Any] | None = None
        self._seen: dict[str, Any] | None = None  # by observe()
        self._why = "not connected yet"
        self._success = self._closing = False
        self._thread = threading.Thread(target=self._run, name="twin", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _PATIENCE_S
        while self._state is None:
            if time.monotonic() > deadline:
                raise ConnectionError(f"port {port}: {self._why}")
            time.sleep(0.005)

    def observe(self) -> Observation:
        """The newest state. Raises: ConnectionError while there is no connection."""
        state = self._seen = self._newest()
        tool = state["tool"]
        return Observation(np.array(state["values"]), state["measured_s"], np.array(state["position"]),
                           None if tool is None else np.array(tool))

    def command(self, action: Array) -> None:
        """Send it. Raises: ConnectionError if that is not possible."""
        line = json.dumps({"type": "command", "action": action.tolist()}) + "\n"
        with self._lock:
            if self._socket is None:
                raise ConnectionError(self._why)
            try:
                self._socket.sendall(line.encode())
            except OSError as error:
                raise ConnectionError(str(error)) from None

    def emergency_stop_pressed(self) -> bool:
        """What the newest state says."""
        return bool(self._newest()["stop"])

    def note(self) -> dict[str, Any]:
        """success, and intervention [Da]: what a person made it do in the period before that observation, or None."""
        return {} if self._seen is None else {name: self._seen[name] for name in ("success", "intervention")}

    def report(self) -> dict[str, Any]:
        """Whether its task was ever done."""
        return {"success": self._success}

    def close(self) -> None:
        """Hang up, and end the process if it was started here."""
        self._closing = True
        self._hang_up("closed")
        if self._process is not None:
            self._process.close()
        self._thread.join()

    def _newest(self) -> dict[str, Any]:
        state = self._state
        if state is None:
            raise ConnectionError(self._why)
        return state

    def _run(self) -> None:
        while not self._closing:
            try:
                connection = socket.create_connection(("127.0.0.1", self._port), timeout=1)
            except OSError as error:
                self._why = str(error)
                time.sleep(_RETRY_S)
                continue
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._socket = connection
            why = self._read(connection)
            self._hang_up("closed" if self._closing else why)

    def _read(self, connection: socket.socket) -> str:
        """Take messages until there are no more; returns why."""
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message["type"] == "state":
                        self._state, self._success = message, self._success or message["success"]
                    elif message["type"] == "hello":
                        self.names = None if message["names"] is None else tuple(message["names"])
        except (ValueError, KeyError, TypeError) as error:
            return f"it does not speak the twin's protocol ({error!r})"
        except OSError as error:
            return str(error)
        return "the twin hung up"

    def _hang_up(self, why: str) -> None:
        with self._lock:
            self._why, self._state = why, None  # what it said before says nothing about where it is after
            if self._socket is not None:
                with suppress(OSError):  # the other end was faster
                    self._socket.shutdown(socket.SHUT_RDWR)
                self._socket.close()
                self._socket = None
