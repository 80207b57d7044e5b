"""LeRobot's robots and robots over DDS, behind the controller's protocol."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from arm_package import write_package

import diffalign_controller
from diffalign_controller.deploy import main
from diffalign_controller.log import read
from diffalign_controller.loop import Exit
from diffalign_controller.robot import MonotonicClock, Robot

lerobot = pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="needs lerobot")
dds = pytest.mark.skipif(importlib.util.find_spec("cyclonedds") is None, reason="needs cyclonedds")
CLOCK = MonotonicClock()


def eventually(condition, seconds=5.0):
    """What `condition` returns once it is true and raises no ConnectionError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except ConnectionError:
            pass
        time.sleep(0.01)
    return pytest.fail("it did not come true in time")


def failure(function) -> str:
    """What ConnectionError it raises, "" for none."""
    try:
        function()
    except ConnectionError as error:
        return str(error)
    return ""


# --- LeRobot --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A class of LeRobot robots: three motors that go where they are sent, clipped to 5 degrees, and a camera."""
    from lerobot.robots import Robot as LeRobot

    folder = tmp_path_factory.mktemp("calibration")
    motors = ("shoulder", "elbow", "gripper")

    class Simulated(LeRobot):
        config_class = None
        name = "simulated"

        def __init__(self):
            super().__init__(SimpleNamespace(id="one", calibration_dir=folder))
            self.places = dict.fromkeys(motors, 0.0)
            self.connected, self.cable, self.hangs_s, self.calls = False, True, 0.0, []

        @property
        def observation_features(self):
            return {**{f"{motor}.pos": float for motor in motors}, "gripper.current": float, "top": (4, 4, 3)}

        @property
        def action_features(self):
            return {f"{motor}.pos": float for motor in motors}

        @property
        def is_connected(self):
            return self.connected

        def connect(self, calibrate=True):
            self.calls.append(f"connect {calibrate}")
            self.touch()
            self.connected = True

        is_calibrated = True

        def calibrate(self):
            self.calls.append("calibrate")

        def configure(self):
            pass

        def touch(self):
            if not self.cable:
                self.connected = False
                raise ConnectionError("no status packet")

        def get_observation(self):
            time.sleep(self.hangs_s)
            self.touch()
            return {**{f"{motor}.pos": place for motor, place in self.places.items()}, "gripper.current": 0.7,
                    "top": np.zeros((4, 4, 3), np.uint8)}

        def send_action(self, action):
            self.touch()
            for motor in motors:
                step = float(np.clip(action[f"{motor}.pos"] - self.places[motor], -5, 5))
                self.places[motor] += step
            return {f"{motor}.pos": place for motor, place in self.places.items()}

        def disconnect(self):
            self.calls.append("disconnect")
            self.connected = False

    return Simulated


@lerobot
def test_a_lerobot_robot_is_observed_and_commanded_by_its_own_keys(simulated) -> None:
    from diffalign_controller.lerobot_robot import LeRobotRobot

    driver = simulated()
    robot = LeRobotRobot(driver, CLOCK)
    as_protocol: Robot = robot
    assert robot.names == ("shoulder", "elbow", "gripper")
    seen = eventually(as_protocol.observe)
    np.testing.assert_allclose(seen.values, [0, 0, 0, 0.7])  # the picture is left out
    assert abs(seen.measured_s - CLOCK.now_s()) < 1
    robot.command(np.array([2.0, -3.0, 50.0]))
    assert robot.note() == {"sent": [2.0, -3.0, 5.0]}  # the driver clipped it
    eventually(lambda: np.array_equal(robot.observe().position, [2, -3, 5]))
    assert robot.emergency_stop_pressed() is False
    robot.close()
    assert driver.calls == ["connect False", "disconnect"]


@lerobot
def test_a_lerobot_cable_that_is_lost_and_put_back(simulated) -> None:
    from diffalign_controller.lerobot_robot import LeRobotRobot

    driver = simulated()
    robot = LeRobotRobot(driver, CLOCK)
    eventually(robot.observe)
    driver.cable = False
    eventually(lambda: "no status packet" in failure(robot.observe))
    with pytest.raises(ConnectionError):
        robot.command(np.zeros(3))
    driver.cable = True
    assert eventually(robot.observe).position.shape == (3,)
    robot.close()


@lerobot
def test_a_lerobot_bus_that_hangs_makes_observations_old_and_commands_fail(simulated) -> None:
    from diffalign_controller.lerobot_robot import LeRobotRobot

    driver = simulated()
    robot = LeRobotRobot(driver, CLOCK)
    eventually(robot.observe)
    driver.hangs_s = 0.8
    time.sleep(0.1)
    with pytest.raises(ConnectionError, match=r"busy for 0\.2 s"):
        robot.command(np.zeros(3))
    assert CLOCK.now_s() - robot.observe().measured_s > 0.2  # and that returned at once
    driver.hangs_s = 0.0
    eventually(lambda: CLOCK.now_s() - robot.observe().measured_s < 0.1)
    robot.close()


@lerobot
def test_a_defect_of_a_lerobot_driver_is_raised_and_an_unobserved_motor_refused(simulated) -> None:
    from diffalign_controller.lerobot_robot import LeRobotRobot

    class Broken(simulated):
        def get_observation(self):
            return {"shoulder.pos": 0.0}

    class Deaf(simulated):
        @property
        def observation_features(self):
            return {"shoulder.pos": float, "elbow.pos": float}

    robot = LeRobotRobot(Broken(), CLOCK)
    with pytest.raises(KeyError, match=r"elbow\.pos"):
        eventually(robot.observe)
    robot.close()
    with pytest.raises(ValueError, match=r"commanded gripper\.pos and does not observe it"):
        LeRobotRobot(Deaf(), CLOCK)


@lerobot
def test_lerobot_types_and_fields_that_do_not_exist_are_refused(tmp_path, capsys) -> None:
    package = write_package(tmp_path / "package", (0.0, 0.0, 0.0))
    for words, said in {"lerobot:so909 port=x": "has no robot 'so909'; known here are",
                        "lerobot:so101_follower prt=x": "`prt`",
                        "lerobot:so101_follower port=x use_degrees=maybe": "use_degrees"}.items():
        assert main([str(package), "--robot", *words.split(), "--log", str(tmp_path / "log")]) == 2
        assert said in capsys.readouterr().err


@lerobot
@pytest.mark.skipif(importlib.util.find_spec("dynamixel_sdk") is not None, reason="the driver is installed")
def test_a_lerobot_driver_that_is_not_installed_is_refused(tmp_path, capsys) -> None:
    package = write_package(tmp_path / "package", (0.0, 0.0, 0.0))
    words = ["--robot", "lerobot:koch_follower", "port=x", "id=one", "--log", str(tmp_path / "log")]
    assert main([str(package), *words]) == 2
    said = capsys.readouterr().err
    assert "dynamixel" in said
    assert "install LeRobot's extra of that robot" in said


# --- DDS ------------------------------------------------------------------------------------------------------------

ARM = """
import sys, time
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from diffalign_controller.dds import READER, WRITER, participant, stamp, topic
from diffalign_controller.dds_messages import Bool, Header, JointState, JointTrajectory
own, here = participant(int(sys.argv[1]), "lo")
states = DataWriter(here, topic(here, "joint_states", JointState), WRITER)
stops = DataWriter(here, topic(here, "emergency_stop", Bool), WRITER)
commands = DataReader(here, topic(here, "joint_trajectory_controller/joint_trajectory", JointTrajectory), READER)
places, heard, stop_after = {"elbow": 0.5, "shoulder": 0.0, "wrist": 0.5}, 0, int(sys.argv[2])
print("ready", flush=True)
while True:
    for command in commands.take(10):
        point = command.points[0]
        assert point.time_from_start.nanosec == 20_000_000, point
        places.update(zip(command.joint_names, point.positions))
        heard += 1
    if heard > stop_after:
        stops.write(Bool(True))
    print(heard, places, flush=True)
    states.write(JointState(Header(stamp()), list(places), list(places.values()), [0.0] * 3, []))
    time.sleep(0.01)
"""


@pytest.fixture
def arm():
    """Starts a joint controller in another process: what ROS 2's would do, without ROS."""
    started = []

    def start(domain, stop_after=10**6):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(diffalign_controller.__file__).parents[1]),
                                                            *filter(None, sys.path)])}
        process = subprocess.Popen([sys.executable, "-c", ARM, str(domain), str(stop_after)], stdout=subprocess.PIPE,
                                   text=True, env=env)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@dds
def test_joint_states_and_commands_go_round_between_two_processes(tmp_path, arm, capsys) -> None:
    domain = 20 + os.getpid() % 180
    arm(domain, stop_after=60)
    goal = (0.4, 0.8, 0.2)
    package = write_package(tmp_path / "package", goal, obs_dim=3)
    code = main([str(package), "--robot", "dds", "joints=shoulder,elbow,wrist", f"domain={domain}", "interface=lo",
                 "--seconds", "20", "--ramp", "0.1", "--max-age", "1", "--json", "--log", str(tmp_path / "log")])
    assert code == Exit.EMERGENCY_STOP  # which the other process published after 60 commands
    assert json.loads(capsys.readouterr().out)["meaning"] == "emergency_stop"
    ticks = [record for record in read(tmp_path / "log") if "tick" in record]
    assert len(ticks) >= 60
    np.testing.assert_allclose(ticks[0]["obs"], [0.0, 0.5, 0.5])  # by name: the message's order is another
    np.testing.assert_allclose(ticks[-1]["obs"], goal, atol=0.05)


@dds
def test_a_dds_robot_that_dies_is_stale_and_one_that_is_not_there_cannot_be_reached(arm) -> None:
    from diffalign_controller.dds import connected

    domain = 20 + (os.getpid() + 1) % 180
    robot = connected({"joints": "wrist,elbow", "domain": str(domain), "interface": "lo",
                       "observe": "position+velocity"}, 50.0, CLOCK)
    with pytest.raises(ConnectionError, match="nobody publishes the topic joint_states"):
        robot.observe()
    with pytest.raises(ConnectionError, match="nobody listens"):
        robot.command(np.zeros(2))
    process = arm(domain)
    seen = eventually(robot.observe, 20)
    np.testing.assert_allclose(seen.values, [0.5, 0.5, 0.0, 0.0])
    process.kill()
    process.wait()
    robot.observe()  # what was still on its way
    time.sleep(0.3)
    assert CLOCK.now_s() - robot.observe().measured_s > 0.2
    robot.close()


@dds
def test_dds_options_and_joints_that_do_not_fit_are_refused(arm) -> None:
    from diffalign_controller.dds import connected, duration

    with pytest.raises(ValueError, match="needs the option joints="):
        connected({}, 50.0, CLOCK)
    with pytest.raises(ValueError, match=r"observe must be position or position\+velocity"):
        connected({"joints": "a", "observe": "torque"}, 50.0, CLOCK)
    with pytest.raises(ValueError, match="interface must be lo"):
        connected({"joints": "a", "interface": "wifi"}, 50.0, CLOCK)
    with pytest.raises(ValueError, match="at least 0"):
        duration(-1)
    domain = 20 + (os.getpid() + 2) % 180
    arm(domain)
    robot = connected({"joints": "elbow,knee", "domain": str(domain), "interface": "lo"}, 50.0, CLOCK)
    with pytest.raises(ValueError, match="but elbow, knee are needed"):
        eventually(robot.observe, 20)
    robot.close()


@dds
def test_messages_are_the_bytes_that_ros_2_sends() -> None:
    """Plain little-endian CDR written out by hand: strings with their 0 byte, numbers aligned to their size."""
    from diffalign_controller.dds_messages import (
        Duration,
        Header,
        JointState,
        JointTrajectory,
        JointTrajectoryPoint,
        Time,
    )

    message = JointState(Header(Time(3, 7), "base"), ["j1"], [0.25, -1.5], [], [2.0])
    body = struct.pack("<iI", 3, 7) + struct.pack("<I", 5) + b"base\0" + b"\0" * 3
    body += struct.pack("<I", 1) + struct.pack("<I", 3) + b"j1\0" + b"\0"
    assert len(body) % 4 == 0
    body += struct.pack("<I", 2)
    body += b"\0" * (-len(body) % 8) + struct.pack("<dd", 0.25, -1.5)
    body += struct.pack("<I", 0) + struct.pack("<I", 1) + b"\0" * (-(len(body) + 8) % 8) + struct.pack("<d", 2.0)
    found = message.serialize(use_version_2=False)
    assert found[:2] == b"\0\1"  # CDR, little endian
    assert found[4 : 4 + len(body)] == body
    point = JointTrajectoryPoint([1.0], [], [], [], Duration(0, 20_000_000))
    again = JointTrajectory.deserialize(JointTrajectory(Header(), ["j1"], [point]).serialize())
    assert again.points == [point]
    names = [kind.__idl__.idl_transformed_typename.replace(".", "::") for kind in (JointState, JointTrajectory, Header)]
    assert names == ["sensor_msgs::msg::dds_::JointState_", "trajectory_msgs::msg::dds_::JointTrajectory_",
                     "std_msgs::msg::dds_::Header_"]
