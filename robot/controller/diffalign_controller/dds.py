"""A ROS 2 robot over DDS, without ROS: joint states in, joint trajectories of one point out.

Legend: J joints of a command; a policy observes their J positions, and their J velocities where it was trained so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cyclonedds.core import Policy, Qos
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from numpy.typing import NDArray

from diffalign_controller.dds_messages import (
    Bool,
    Duration,
    Header,
    JointState,
    JointTrajectory,
    JointTrajectoryPoint,
    Time,
)
from diffalign_controller.options import read
from diffalign_controller.robot import Clock, Observation

Array = NDArray[np.floating]
_LOOPBACK = """<CycloneDDS><Domain><General><AllowMulticast>false</AllowMulticast>
<Interfaces><NetworkInterface name="lo"/></Interfaces></General><Discovery><ParticipantIndex>auto</ParticipantIndex>
<Peers><Peer address="127.0.0.1"/></Peers></Discovery></Domain></CycloneDDS>"""
_NEWEST = Policy.History.KeepLast(1)
_PLAIN_CDR = Policy.DataRepresentation(use_cdrv0_representation=True)
# As ROS 2's: a best-effort reader hears every writer, a reliable writer is heard by every reader.
READER = Qos(Policy.Reliability.BestEffort, _NEWEST, _PLAIN_CDR)
WRITER = Qos(Policy.Reliability.Reliable(100_000_000), _NEWEST, _PLAIN_CDR)


@dataclass(frozen=True)
class DdsOptions:
    """joints: their names in the order of a command.

    observe: `position`, or `position+velocity`. domain: ROS_DOMAIN_ID. interface: `lo` stays on this machine, "" is
    Cyclone's choice or that of CYCLONEDDS_URI. states, commands, stop: ROS topic names, of sensor_msgs/JointState,
    trajectory_msgs/JointTrajectory and std_msgs/Bool.

    Raises: ValueError for another `observe` or `interface`.
    """

    joints: tuple[str, ...]
    observe: str = "position"
    domain: int = 0
    interface: str = ""
    states: str = "joint_states"
    commands: str = "joint_trajectory_controller/joint_trajectory"
    stop: str = "emergency_stop"

    def __post_init__(self) -> None:
        if self.observe not in ("position", "position+velocity"):
            raise ValueError(f"observe must be position or position+velocity, got {self.observe!r}")
        if self.interface not in ("", "lo"):
            raise ValueError(f"interface must be lo or not given, got {self.interface!r}; CYCLONEDDS_URI sets others")


def connected(pairs: Mapping[str, str], rate_hz: float, clock: Clock) -> DdsRobot:
    """The robot of `key=value` options. Raises: ValueError as DdsOptions."""
    return DdsRobot(read(DdsOptions, pairs, "a robot over DDS"), rate_hz, clock)


def participant(domain: int, interface: str) -> tuple[Domain | None, DomainParticipant]:
    """A participant, and the domain on the loopback interface if asked for, to be kept as long."""
    own = Domain(domain, _LOOPBACK) if interface == "lo" else None
    return own, DomainParticipant(domain)


def topic(where: DomainParticipant, name: str, kind: type) -> Topic[Any]:
    """The DDS topic of a ROS topic name."""
    return Topic(where, f"rt/{name}", kind)


class DdsRobot:
    """Observes the newest joint state; a state whose stamp stands still is as old as its first arrival."""

    def __init__(self, options: DdsOptions, rate_hz: float, clock: Clock) -> None:
        self._options, self._clock, self._period_s = options, clock, 1 / rate_hz
        self._domain, self._participant = participant(options.domain, options.interface)
        self._states = DataReader(self._participant, topic(self._participant, options.states, JointState), READER)
        self._stops = DataReader(self._participant, topic(self._participant, options.stop, Bool), READER)
        self._commands = DataWriter(self._participant, topic(self._participant, options.commands, JointTrajectory),
                                    WRITER)
        self._newest: JointState | None = None
        self._arrived_s = 0.0
        self._stop = False

    @property
    def names(self) -> tuple[str, ...]:
        """The joints in the order of a command."""
        return self._options.joints

    def observe(self) -> Observation:
        """Positions [J], or positions and velocities [2 J]. Raises: ConnectionError while nobody publishes a state."""
        for state in self._states.take(10):
            if self._newest is None or state.header.stamp != self._newest.header.stamp:
                self._arrived_s = self._clock.now_s()
            self._newest = state
        if not self._states.get_matched_publications():
            self._newest = None
            raise ConnectionError(f"nobody publishes the topic {self._options.states}")
        if self._newest is None:
            raise ConnectionError(f"no message on the topic {self._options.states} yet")
        position = self._ordered(self._newest, "position")
        both = self._options.observe == "position+velocity"
        values = np.concatenate([position, self._ordered(self._newest, "velocity")]) if both else position
        return Observation(values, self._arrived_s, position)

    def command(self, action: Array) -> None:
        """A trajectory [J] that is there one period from now. Raises: ConnectionError while nobody listens."""
        if not self._commands.get_matched_subscriptions():
            raise ConnectionError(f"nobody listens to the topic {self._options.commands}")
        point = JointTrajectoryPoint(positions=action.tolist(), time_from_start=duration(self._period_s))
        # A stamp of zero means at once.
        self._commands.write(JointTrajectory(Header(), list(self._options.joints), [point]))

    def emergency_stop_pressed(self) -> bool:
        """Whether `true` was ever published on the stop topic."""
        self._stop = self._stop or any(message.data for message in self._stops.take(10))
        return self._stop

    def close(self) -> None:
        """Leave the domain."""
        del self._states, self._stops, self._commands, self._participant, self._domain

    def _ordered(self, state: JointState, field: str) -> Array:
        values: list[float] = getattr(state, field)
        missing = [joint for joint in self._options.joints if joint not in state.name]
        if missing or len(values) != len(state.name):
            raise ValueError(f"the topic {self._options.states} tells the {field} of {len(values)} of the joints "
                             f"{', '.join(state.name)}, but {', '.join(self._options.joints)} are needed")
        return np.array([values[state.name.index(joint)] for joint in self._options.joints])


def duration(seconds: float) -> Duration:
    """A ROS duration. Raises: ValueError for a negative one."""
    if not seconds >= 0:
        raise ValueError(f"a duration must be at least 0, got {seconds} s")
    whole = math.floor(seconds)
    return Duration(whole, round((seconds - whole) * 1e9))


def stamp() -> Time:
    """The time of day, as ROS stamps its messages."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return Time(seconds, nanoseconds)
