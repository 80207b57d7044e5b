"""Any LeRobot robot behind this runtime's protocol.

LeRobot's calls talk to motors and cameras and wait for them, so a thread observes, and the loop takes what it saw last:
a bus that hangs makes an observation old, which the watchdog sees, instead of stopping the loop. Units stay LeRobot's
(degrees or -100 ... 100, gripper 0 ... 100): those that the policy was trained with.

Legend: Do observation features, Da action features.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.robot import Clock, Observation

Array = NDArray[np.floating]
_PATIENCE_S = 0.2  # for the bus, which a read holds for some milliseconds
_RETRY_S = 0.1


class LeRobot(Protocol):
    """What is used of lerobot.robots.Robot."""

    @property
    def observation_features(self) -> dict[str, Any]: ...
    @property
    def action_features(self) -> dict[str, Any]: ...
    @property
    def is_connected(self) -> bool: ...
    def connect(self, calibrate: bool = True) -> None: ...
    def get_observation(self) -> dict[str, Any]: ...
    def send_action(self, action: dict[str, Any]) -> dict[str, Any]: ...
    def disconnect(self) -> None: ...


def connected(kind: str, pairs: Mapping[str, str], clock: Clock) -> LeRobotRobot:
    """The robot of a LeRobot type (`so101_follower`), its config's fields given as text.

    Raises: ValueError for an unknown type or field. ConnectionError if it cannot be reached.
    """
    import draccus
    from lerobot.robots import RobotConfig, make_robot_from_config
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    broken = {} if kind in RobotConfig.get_known_choices() else _import_drivers()
    known = RobotConfig.get_known_choices()
    if kind not in known:
        raise ValueError(f"LeRobot has no robot {kind!r}; known here are {', '.join(sorted(known))}"
                         + "".join(f"; {folder} cannot be imported ({why})" for folder, why in broken.items()))
    try:
        config = draccus.decode(RobotConfig, {"type": kind, **pairs})
    except (draccus.utils.DecodingError, TypeError) as error:
        raise ValueError(f"lerobot:{kind}: {error}") from None
    try:
        robot = make_robot_from_config(config)
    except ImportError as error:  # of the module, or since LeRobot 0.6 its own, which names the extra
        raise ValueError(f"the driver of lerobot:{kind} cannot be imported ({error}); install LeRobot's extra of that "
                         "robot") from None
    return LeRobotRobot(robot, clock)


def _import_drivers() -> dict[str, str]:
    """Import LeRobot's own drivers, which registers their types; returns those that cannot be, and why."""
    import lerobot.robots

    broken = {}
    for folder in pkgutil.iter_modules(lerobot.robots.__path__):
        if folder.ispkg:
            try:
                importlib.import_module(f"lerobot.robots.{folder.name}")
            except ImportError as error:  # the extra of that robot is not installed
                broken[folder.name] = str(error)
    return broken


class LeRobotRobot:
    """A LeRobot robot, connected; its float features are observed and commanded in its own order.

    A command goes to all keys of action_features; the position of a command is what is observed under the same keys.
    """

    def __init__(self, robot: LeRobot, clock: Clock) -> None:
        """Connects without calibrating.

        Raises: ValueError if the robot does not observe what it is commanded. ConnectionError if it cannot be reached.
        """
        self._robot, self._clock = robot, clock
        self._observed = [key for key, kind in robot.observation_features.items() if kind is float]
        self._commanded = list(robot.action_features)
        missing = [key for key in self._commanded if key not in self._observed]
        if missing:
            raise ValueError(f"the robot is commanded {', '.join(missing)} and does not observe it")
        self._bus = threading.Lock()
        self._newest: Observation | None = None
        self._error: Exception | None = None
        self._sent: list[float] | None = None
        self._closing = False
        if not robot.is_connected:
            robot.connect(calibrate=False)
        self._thread = threading.Thread(target=self._run, name="lerobot", daemon=True)
        self._thread.start()

    @property
    def names(self) -> tuple[str, ...]:
        """The motors in the order of a command, without LeRobot's `.pos`."""
        return tuple(key.removesuffix(".pos") for key in self._commanded)

    def observe(self) -> Observation:
        """The newest observation. Raises: ConnectionError while it cannot reach the robot, or what the driver did."""
        if self._error is not None:
            raise self._error
        if self._newest is None:
            raise ConnectionError("no observation yet")
        return self._newest

    def command(self, action: Array) -> None:
        """Send it; the driver may clip it (see `note`). Raises: ConnectionError if the robot cannot be reached."""
        if not self._bus.acquire(timeout=_PATIENCE_S):
            raise ConnectionError(f"the robot's bus has been busy for {_PATIENCE_S} s")
        try:
            sent = self._robot.send_action(dict(zip(self._commanded, map(float, action), strict=True)))
        except OSError as error:
            raise ConnectionError(str(error)) from error
        finally:
            self._bus.release()
        self._sent = [float(sent[key]) for key in self._commanded]

    def emergency_stop_pressed(self) -> bool:
        """False: LeRobot knows no emergency stop; use the power switch, or Ctrl-C for a stop in order."""
        return False

    def note(self) -> dict[str, Any]:
        """sent [Da]: the last command after the driver's own clipping."""
        return {"sent": self._sent}

    def close(self) -> None:
        """End the thread and disconnect, unless the bus hangs."""
        self._closing = True
        self._thread.join(timeout=1)
        if not self._thread.is_alive() and self._robot.is_connected:
            self._robot.disconnect()

    def _run(self) -> None:
        while not self._closing:
            try:
                with self._bus:
                    if not self._robot.is_connected:
                        self._robot.connect(calibrate=False)
                    measured_s = self._clock.now_s()
                    found = self._robot.get_observation()
                values = np.array([float(found[key]) for key in self._observed])
                position = np.array([float(found[key]) for key in self._commanded])
            except OSError as error:  # ConnectionError, a serial port that is gone, LeRobot's DeviceNotConnectedError
                self._newest, self._error = None, ConnectionError(str(error))
                time.sleep(_RETRY_S)
            except Exception as error:  # a defect: the loop must hear of it
                self._error = error
                return
            else:
                self._newest, self._error = Observation(values, measured_s, position), None
                time.sleep(0.001)  # let a command have the bus
