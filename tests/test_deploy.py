"""`deploy` and the digital twin: a real process that things go wrong with, and a command that ends as documented."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from arm_package import write_package

import diffalign_controller
from diffalign.cli.main import main as diffalign
from diffalign_controller.chunks import RecedingHorizon
from diffalign_controller.deploy import Tagged, main
from diffalign_controller.inference import Threaded
from diffalign_controller.limits import limits_of, package_limits, read_limits, workspace_of
from diffalign_controller.log import Log, read
from diffalign_controller.loop import Controller, Exit, Settings
from diffalign_controller.options import Span, words
from diffalign_controller.options import read as read_options
from diffalign_controller.policy import Policy
from diffalign_controller.robot import MonotonicClock
from diffalign_controller.safety import Limits, SafetyFilter
from diffalign_controller.twin import Twin, TwinProcess
from diffalign_controller.twin_server import Faults
from diffalign_controller.watchdog import Watchdog

pytest.importorskip("mujoco")

START = np.array([0.0, 0.5, 0.5])  # of the arm
GOAL = tuple(np.random.default_rng(0).uniform([-1.0, 0.2, 0.2], [1.0, 1.2, 1.2]))  # of seed 0, see arm.py
RATE = 50.0
LIMITS = {"joint_limits": {
    name: {"has_position_limits": True, "min_position": -0.9, "max_position": 1.3, "has_velocity_limits": True,
           "max_velocity": 1.5, "has_acceleration_limits": True, "max_acceleration": 12.0}
    for name in ("shoulder", "elbow", "wrist")}}


@pytest.fixture
def package(tmp_path):
    return write_package(tmp_path / "package", GOAL)


@pytest.fixture
def deployed(tmp_path, capsys):
    """Deploys on the twin's arm; returns the exit code, the summary, the log, and what the twin itself wrote down."""
    def run(folder, *robot, seconds=0.9, limits=LIMITS, options=()):
        (tmp_path / "limits.json").write_text(json.dumps(limits))
        code = main([str(folder), "--robot", "twin", *robot, f"record={tmp_path / 'truth.jsonl'}", "--seconds",
                     str(seconds), "--log", str(tmp_path / "log"), "--limits", str(tmp_path / "limits.json"), "--ramp",
                     "0.1", "--max-hold", "0.3", "--max-age", "0.25", "--json", *options])
        summary = json.loads(capsys.readouterr().out)
        truth = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
        log = list(read(tmp_path / "log"))
        assert code == summary["exit"] == log[-1]["exit"]
        assert log[0]["event"] == "start"
        assert log[-1]["event"] == "end"
        assert sum("tick" in record for record in log) == summary["ticks"]
        assert within(log, truth, limits)
        return code, summary, log, truth
    return run


def within(log, truth, limits) -> bool:
    """Every command and every true position inside its limits, every unbroken run of commands inside its speeds."""
    joints = list(limits["joint_limits"].values())
    bound = {key: np.array([joint[key] for joint in joints]) for key in joints[0] if not key.startswith("has")}
    places = np.array([line["position"] for line in truth])
    assert (places >= bound["min_position"] - 0.02).all()  # what a servo may overshoot by
    assert (places <= bound["max_position"] + 0.02).all()
    ticks = [record for record in log if record.get("command") is not None]
    commands = np.array([record["command"] for record in ticks])
    moments = np.array([record["tick"] for record in ticks])
    assert (commands >= bound["min_position"]).all()
    assert (commands <= bound["max_position"]).all()
    for part in np.split(commands, np.flatnonzero(np.diff(moments) > 5) + 1):
        speed = np.diff(part, axis=0) * RATE
        assert (np.abs(speed) <= bound["max_velocity"] * (1 + 1e-6)).all()
        assert (np.abs(np.diff(speed, axis=0)) * RATE <= bound["max_acceleration"] * (1 + 1e-6)).all()
    return True


def states(log) -> list[str]:
    return [record["to"] for record in log if record.get("event") == "state"]


def test_a_policy_reaches_its_goal_on_the_twin(package, deployed) -> None:
    code, summary, log, truth = deployed(package, "latency_s=0.005", "noise=0.001", "dropout=0.05", seconds=1.6)
    assert code == Exit.DONE == 0
    assert summary["success"] is True
    assert states(log) == ["ramp-in", "running", "safe stop"]
    assert log[0]["options"][:2] == ["latency_s=0.005", "noise=0.001"]
    assert any(record.get("success") for record in log)
    np.testing.assert_allclose(truth[0]["position"], START, atol=1e-3)
    np.testing.assert_allclose(truth[-1]["position"], GOAL, atol=0.1)


def test_places_are_commanded_at_the_servo_rate_and_the_state_is_on_the_screen(package, tmp_path, capsys) -> None:
    words = [str(package), "--robot", "twin", f"record={tmp_path / 'truth.jsonl'}", "--servo-hz", "200", "--status",
             "--scheme", "ensemble", "--execute", "1", "--seconds", "1.5", "--max-age", "1"]
    assert main([*words, "--log", str(tmp_path / "log"), "--json"]) == 0
    printed = capsys.readouterr()
    log = list(read(tmp_path / "log"))
    assert (log[0]["settings"]["rate_hz"], log[0]["settings"]["servo_hz"]) == (50, 200)
    assert log[0]["scheme"] == "ensemble"
    ticks = [record for record in log if "tick" in record]
    assert ticks[-1]["tick"] > 280  # of 1.5 s at 200 Hz, whatever was left out
    truth = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert len(truth) > 150  # the arm's servos are updated as often; at 50 Hz it would have 75 steps and a few
    lines = [line for line in printed.err.splitlines() if line.startswith("tick ")]
    assert 3 <= len(lines) <= 7
    assert all(" Hz  missed " in line and " ms old" in line for line in lines[1:])
    assert any("running" in line for line in lines)
    assert json.loads(printed.out)["meaning"] == "done"


@pytest.mark.parametrize(("fault", "options", "code", "word"), [
    ("stop=0.3:0.1", (), Exit.EMERGENCY_STOP, "emergency stop"),
    ("freeze=0.3:9", ("--max-unchanged", "0.15"), Exit.BLIND, "has not changed"),
    ("silence=0.3:9", (), Exit.BLIND, "s old"),
    ("disconnect=0.3:9", (), Exit.CONNECTION, "connection lost"),
])
def test_what_does_not_come_back_ends_the_process_with_its_code(package, deployed, fault, options, code, word) -> None:
    found, _, log, truth = deployed(package, fault, seconds=9, options=options)
    assert found == code
    assert word in log[-1]["reason"]
    if code != Exit.CONNECTION:
        commands = [record["command"] for record in log if record.get("command")]
        assert commands[-1] == commands[-2] == truth[-1]["command"]  # the stop was commanded to its end


def test_a_connection_that_comes_back_is_gone_on_with(package, deployed) -> None:
    code, summary, log, _ = deployed(package, "disconnect=0.3:0.15", seconds=2.0)
    assert code == Exit.DONE
    assert states(log) == ["ramp-in", "running", "hold", "ramp-in", "running", "safe stop"]
    assert summary["success"] is True


def test_nan_is_not_sent_and_ends_with_its_code(tmp_path, deployed) -> None:
    folder = write_package(tmp_path / "nan", (0.8, 0.5, 0.5), nan_above=0.2)
    code, _, log, truth = deployed(folder, seconds=9, options=("--max-age", "2", "--max-inference", "2"))
    assert code == Exit.BAD_ACTION, log[-1]["reason"]
    assert any(record["wish"] == [None, None, None] for record in log if "wish" in record)
    assert np.isfinite([line["command"] for line in truth]).all()
    assert max(line["position"][0] for line in truth) < 0.5


def test_a_policy_that_wants_out_of_the_limits_stays_inside(tmp_path, deployed) -> None:
    folder = write_package(tmp_path / "wild", (-2.5, 2.5, 2.5), step=0.3)
    code, _, log, truth = deployed(folder, seconds=1.5)
    assert code == Exit.DONE
    wishes = np.array([record["wish"] for record in log if record.get("wish")])
    assert wishes.min() < -1.0  # it did want it
    np.testing.assert_allclose(truth[-1]["position"], [-0.9, 1.3, 1.3], atol=0.05)


def test_a_tool_that_leaves_its_box_ends_with_its_code(package, deployed) -> None:
    limits = {**LIMITS, "workspace": {"min": [-1, -1, -1], "max": [1, 0.32, 1]}}
    code, _, log, _ = deployed(package, seconds=9, limits=limits)
    assert code == Exit.WORKSPACE
    assert "outside its box" in log[-1]["reason"]


def test_a_person_who_takes_over_is_in_the_log(package, deployed) -> None:
    _, _, log, _ = deployed(package, "human=0.3:0.3")
    said = [record["intervention"] for record in log if "tick" in record]
    assert said[0] is None
    assert said[-1] is None
    np.testing.assert_allclose(next(action for action in said if action is not None), START)


def arm(tmp_path, decide, *, during=lambda twin: None, seconds=9.0, execute=4, **ages):
    """A controller in this process with a policy in Python, on the twin in its own."""
    process = TwinProcess("diffalign_controller.arm", ["--rate", str(RATE)])
    twin = Twin(process.port, process)
    log, clock = Log(tmp_path / "log"), MonotonicClock()
    limits = limits_of(LIMITS, np.full(3, -2.6), np.full(3, 2.6), RATE, twin.names)
    settings = Settings(rate_hz=RATE, ramp_s=0.1, watchdog=Watchdog(observation_age_s=0.25, hold_s=0.3, **ages))
    loop = Controller(twin, Threaded(decide), RecedingHorizon(execute), SafetyFilter(limits, 1 / RATE),
                      Tagged(log, twin, print), clock, settings)
    during(process)
    try:
        code = loop.run(seconds)
    finally:
        twin.close()
    return code, list(read(tmp_path / "log"))


def towards_goal(obs):
    shares = 1 - 0.85 ** np.arange(1, 9, dtype=np.float32)[:, None]
    return obs[:3] + shares * (np.array(GOAL, np.float32) - obs[:3])


@pytest.mark.parametrize(("fault", "word"), [("dies", "inference has taken"), ("raises", "out of memory")])
def test_killed_inference_ends_with_its_code(tmp_path, fault, word) -> None:
    begin = time.monotonic()

    def decide(obs):
        if time.monotonic() - begin > 1.0:
            if fault == "dies":
                threading.Event().wait()  # this thread never answers again
            raise MemoryError("out of memory")
        return towards_goal(obs)

    code, log = arm(tmp_path, decide, inference_s=0.15)
    assert code == Exit.LATE
    assert word in log[-1]["reason"]
    assert within(log, [{"position": GOAL}], LIMITS)


def test_a_late_chunk_is_held_for_and_gone_on_with(tmp_path) -> None:
    calls = []

    def decide(obs):
        calls.append(0)
        if len(calls) == 6:
            time.sleep(0.25)
        return towards_goal(obs)

    code, log = arm(tmp_path, decide, seconds=1.3, inference_s=0.15)
    assert code == Exit.DONE
    assert states(log)[-4:] == ["hold", "ramp-in", "running", "safe stop"]
    assert within(log, [{"position": GOAL}], LIMITS)


def test_a_twin_that_is_killed_ends_with_its_code(tmp_path) -> None:
    code, log = arm(tmp_path, towards_goal, during=lambda process: threading.Timer(0.4, process.kill).start())
    assert code == Exit.CONNECTION
    assert states(log)[-2:] == ["safe stop", "fault"]
    assert log[-1]["event"] == "end"


def test_sigterm_brings_the_robot_to_rest_in_a_process_without_torch(package, tmp_path) -> None:
    code = ("import sys; from diffalign_controller.deploy import main; code = main(sys.argv[1:]); "
            "sys.exit(99 if {'torch', 'diffalign'} & set(sys.modules) else code)")
    env = {**os.environ, "PYTHONPATH": str(Path(diffalign_controller.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code, str(package), "--robot", "twin", "--max-age", "2", "--log",
                                str(tmp_path / "log")], env=env, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stderr is not None
    while "running" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "asked to stop" in out
    assert list(read(tmp_path / "log"))[-1]["reason"] == "asked to stop"


def test_diffalign_deploy_hands_its_words_on(package, tmp_path, capsys) -> None:
    assert diffalign(["deploy", "--robot", "twin", str(package), "speed=3", "--log", str(tmp_path / "log")]) == 2
    assert "has no option 'speed'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        diffalign(["deploy", "--help"])
    assert ended.value.code == 0
    assert "usage: diffalign deploy" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_with_2_before_the_robot_moves(package, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "own_robots.py").write_text("def nothing(options): return object()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    narrow = json.loads(json.dumps(LIMITS))
    narrow["joint_limits"]["elbow"]["max_position"] = 0.3
    other = {"joint_limits": {name: {} for name in ("a", "b", "c")}}
    for name, content in (("narrow", narrow), ("other", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    big = write_package(tmp_path / "big", GOAL, obs_dim=12)
    process = TwinProcess("diffalign_controller.arm", [])
    twin = f"--robot twin port={process.port}"
    for line, said in {
        "nowhere --robot twin": "is no controller package",
        f"{package} --robot walker": "'walker' is unknown",
        f"{package} --robot twin latency_s=soon": "latency_s must be float, got 'soon'",
        f"{package} --robot twin dropout=1": "0 <= dropout < 1",
        f"{package} --robot twin freeze=1": "freeze must be start:duration",
        f"{package} --robot twin latency": "write key=value",
        f"{package} --robot twin world=environment": "world must be arm",
        f"{package} --robot twin port=1 seed=3": "give only port=",
        f"{package} --robot twin --rate 0": "--rate must be positive",
        f"{package} --robot twin --servo-hz 20": "servo_hz must be at least rate_hz (50.0), got 20.0",
        f"{package} --robot twin --servo-hz inf": "servo_hz must be at least rate_hz",
        f"{package} --robot twin --servo-hz 300": "the twin did not start",
        f"{package} --robot twin --servo-hz 80 --rest zero": 'say between="hold"',
        f"{package} --robot twin --servo-hz 80 --rest zero --between spread": "must be a multiple of rate_hz",
        f"{package} --robot twin --scheme rtc": "export the run again with --real-time-chunking",
        f"{package} --robot twin --execute 0": "execute must be at least 1",
        f"{package} --robot own_robots:nothing": "without observe, command, emergency_stop_pressed",
        f"{package} --robot own_robots:missing": "has no function 'missing'",
        f"{package} --robot no_module:robot": "no module named 'no_module'",
        f"{big} {twin}": "reads observations of shape (12,)",
        f"{package} {twin} --limits {tmp_path / 'narrow.json'}": "feature 1 starts at 0.5, outside its limits",
        f"{package} {twin} --limits {tmp_path / 'other.json'}": "the limits are for the joints a, b, c",
        f"{package} --robot twin --limits {tmp_path / 'none.json'}": "there is no such file",
    }.items():
        assert main([*line.split(), "--seconds", "0.1", "--log", str(tmp_path / "log")]) == 2, line
        assert said in capsys.readouterr().err, line
    assert not (tmp_path / "log").exists()
    process.close()


def test_a_robot_that_does_not_answer_ends_with_8(package, capsys, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("diffalign_controller.twin._PATIENCE_S", 0.1)
    assert main([str(package), "--robot", "twin", f"port={port}"]) == Exit.CONNECTION
    assert "cannot be reached" in capsys.readouterr().err


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_the_twin_hangs_up_on_what_is_no_command_and_serves_the_next(tmp_path) -> None:
    process = TwinProcess("diffalign_controller.arm", ["--rate", "50"])
    for bad in (b"hello\n", b'{"action": [1, 2]}\n', b'{"action": [NaN, 0, 0]}\n', b"[1]\n"):
        with socket.create_connection(("127.0.0.1", process.port), timeout=5) as client, client.makefile("rb") as lines:
            assert json.loads(lines.readline()) == {"type": "hello", "names": ["shoulder", "elbow", "wrist"],
                                                    "rate_hz": 50.0}
            client.sendall(bad)
            assert sum(1 for _, _ in zip(range(100), lines)) < 100  # states, until it hangs up
    twin = Twin(process.port, process)
    seen = twin.observe()
    np.testing.assert_allclose(seen.position, START, atol=1e-3)
    assert seen.values.shape == (10,)
    twin.command(np.array([0.1, 0.5, 0.5]))
    time.sleep(0.4)
    later = twin.observe()
    assert 0.05 < later.position[0] < 0.15
    assert later.measured_s > seen.measured_s
    twin.close()
    with pytest.raises(ConnectionError, match="closed"):
        twin.observe()


def test_a_client_says_that_the_other_end_is_no_twin(monkeypatch) -> None:
    monkeypatch.setattr("diffalign_controller.twin._PATIENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            for _ in range(9):
                client, _ = server.accept()
                client.sendall(b"SSH-2.0\n")
                client.close()
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionError, match="does not speak the twin's protocol"):
            Twin(server.getsockname()[1])


# --- limits and options ---------------------------------------------------------------------------------------------


def test_limits_are_read_by_joint_name_and_fall_back_on_the_package(tmp_path) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text("""joint_limits:
  b: {has_position_limits: true, min_position: -1, max_position: 2.5, has_effort_limits: true, max_effort: 9}
  a: {has_velocity_limits: true, max_velocity: 0.5, has_jerk_limits: true, max_jerk: 7}
workspace: {min: [0, 0, 0], max: [1, 2, 3]}
""")
    content = read_limits(file)
    found = limits_of(content, np.array([-3.0, -np.inf]), np.array([4.0, np.inf]), 10.0, ("a", "b"))
    # b has no bound of velocity: all of its range in one period, 3.5 * 10; acceleration is no bound at all.
    assert found == Limits((-3.0, -1.0), (4.0, 2.5), velocity=(0.5, 35.0), acceleration=None, jerk=(7.0, 4 * 3500.0))
    assert limits_of(content, np.array([-3.0, -3.0]), np.array([4.0, 4.0]), 10.0, None).low == (-1.0, -3.0)
    assert workspace_of(content) == ((0, 0, 0), (1, 2, 3))
    assert workspace_of({}) is None
    assert package_limits(np.array([-1.0]), np.array([2.0])) == Limits((-1.0,), (2.0,))
    with pytest.raises(ValueError, match="give the robot's own with --limits"):
        package_limits(np.array([-np.inf]), np.array([2.0]))


@pytest.mark.parametrize(("joint", "message"), [
    ("{max_velocty: 1}", "names joint_limits.a.max_velocty"),
    ("{max_velocity: 1}", "has max_velocity but not `has_velocity_limits: true`"),
    ("{has_velocity_limits: true}", "max_velocity must be a number"),
    ("{has_velocity_limits: true, max_velocity: fast}", "got 'fast'"),
    ("{has_velocity_limits: true, max_velocity: 0}", "positive finite"),
    ("{}", "a has no position limits"),
    ("{has_position_limits: true, min_position: 1, max_position: 0}", "low must be below high"),
    ("{}\n  b: {}", "for 2 joints, a command has 1"),
    ("3", "must hold a mapping joint_limits"),
    ("{", "cannot be read"),
])
def test_limits_that_do_not_make_sense_are_refused(tmp_path, joint, message) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text(f"joint_limits:\n  a: {joint}\n")
    bound = np.array([np.inf if message.startswith("a has no") else 3.0])
    with pytest.raises(ValueError, match=message):
        limits_of(read_limits(file), -bound, bound, 50.0, None)
    with pytest.raises(ValueError, match="workspace must be"):
        workspace_of({"workspace": {"min": [0, 0]}})


def test_options_are_typed_by_their_dataclass() -> None:
    found = read_options(Faults, words(["latency_s=0.1", "freeze=0.5:2"]), "the twin")
    assert found == Faults(latency_s=0.1, freeze=Span(0.5, 2.0))
    assert [Span(0.5, 2.0).holds(moment) for moment in (0.49, 0.5, 2.49, 2.5)] == [False, True, True, False]
    with pytest.raises(ValueError, match="given twice"):
        words(["a=1", "a=2"])
    with pytest.raises(ValueError, match=r"no option 'nois'; did you mean noise\?"):
        read_options(Faults, {"nois": "1"}, "the twin")


def test_a_package_drives_its_policy(package) -> None:
    """The hand-made graph is the policy that these tests think it is."""
    obs = np.arange(10, dtype=np.float32) / 10
    np.testing.assert_allclose(Policy(package).decide(obs), towards_goal(obs), rtol=1e-5)
