"""The ROS 2 messages that a controller needs, as DDS types: the names and the layout that ROS 2's middleware uses.

A ROS 2 topic `joint_states` is the DDS topic `rt/joint_states`; a message `sensor_msgs/msg/JointState` is the DDS type
`sensor_msgs::msg::dds_::JointState_`, final, in plain CDR. (No `from __future__ import annotations` here: Cyclone reads
the annotations as they are.)
"""

from dataclasses import dataclass, field

from cyclonedds.idl import IdlStruct
from cyclonedds.idl.annotations import final
from cyclonedds.idl.types import float64, int32, sequence, uint32


@final
@dataclass
class Time(IdlStruct, typename="builtin_interfaces::msg::dds_::Time_"):  # type: ignore[call-arg, misc]
    """builtin_interfaces/Time."""

    sec: int32 = 0
    nanosec: uint32 = 0


@final
@dataclass
class Duration(IdlStruct, typename="builtin_interfaces::msg::dds_::Duration_"):  # type: ignore[call-arg, misc]
    """builtin_interfaces/Duration."""

    sec: int32 = 0
    nanosec: uint32 = 0


@final
@dataclass
class Header(IdlStruct, typename="std_msgs::msg::dds_::Header_"):  # type: ignore[call-arg, misc]
    """std_msgs/Header."""

    stamp: Time = field(default_factory=Time)
    frame_id: str = ""


@final
@dataclass
class Bool(IdlStruct, typename="std_msgs::msg::dds_::Bool_"):  # type: ignore[call-arg, misc]
    """std_msgs/Bool."""

    data: bool = False


@final
@dataclass
class JointState(IdlStruct, typename="sensor_msgs::msg::dds_::JointState_"):  # type: ignore[call-arg, misc]
    """sensor_msgs/JointState: radians or metres, and their rates; a list is empty where nothing is known."""

    header: Header = field(default_factory=Header)
    name: sequence[str] = field(default_factory=list)
    position: sequence[float64] = field(default_factory=list)
    velocity: sequence[float64] = field(default_factory=list)
    effort: sequence[float64] = field(default_factory=list)


@final
@dataclass
class JointTrajectoryPoint(IdlStruct, typename="trajectory_msgs::msg::dds_::JointTrajectoryPoint_"):  # type: ignore[call-arg, misc]
    """trajectory_msgs/JointTrajectoryPoint: where to be, time_from_start after the message."""

    positions: sequence[float64] = field(default_factory=list)
    velocities: sequence[float64] = field(default_factory=list)
    accelerations: sequence[float64] = field(default_factory=list)
    effort: sequence[float64] = field(default_factory=list)
    time_from_start: Duration = field(default_factory=Duration)


@final
@dataclass
class JointTrajectory(IdlStruct, typename="trajectory_msgs::msg::dds_::JointTrajectory_"):  # type: ignore[call-arg, misc]
    """trajectory_msgs/JointTrajectory."""

    header: Header = field(default_factory=Header)
    joint_names: sequence[str] = field(default_factory=list)
    points: sequence[JointTrajectoryPoint] = field(default_factory=list)
