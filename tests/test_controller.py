"""The controller runtime without a policy: chunks, safety filter, watchdog, log and loop."""

from __future__ import annotations

import ast
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import diffalign_controller
from diffalign_controller.chunks import RecedingHorizon, TemporalEnsemble
from diffalign_controller.inference import InLine, Threaded
from diffalign_controller.log import Log, read
from diffalign_controller.loop import Controller, Exit, Settings, State
from diffalign_controller.robot import MonotonicClock, Observation
from diffalign_controller.safety import Limits, SafetyFilter, fastest_speed
from diffalign_controller.stopping import soonest_stop, stop_periods
from diffalign_controller.watchdog import Watchdog

RUNTIME = Path(diffalign_controller.__file__).parent
DT = 0.02
LIMITS = Limits(low=(-1.0, -1.0), high=(1.0, 2.0), velocity=(1.0, 2.0), acceleration=(8.0, 20.0), jerk=(200.0, 900.0))


def test_it_imports_only_numpy_onnxruntime_and_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime", "diffalign_controller"}
    extras = {"limits.py": {"yaml"}, "arm.py": {"mujoco"}, "dds.py": {"cyclonedds"}, "dds_messages.py": {"cyclonedds"},
              "lerobot_robot.py": {"lerobot", "draccus"}}
    for file in RUNTIME.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found = {name.partition(".")[0] for name in names}
            assert found <= allowed | extras.get(file.name, set()), f"{file.name} imports {names}"


# --- chunks ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=6), st.floats(0, 2), st.integers(0, 20))
def test_the_ensemble_is_the_weighted_mean_of_all_chunks_that_reach_a_tick(starts, decay, tick) -> None:
    starts = sorted(dict(starts).items())
    random = np.random.default_rng(0)
    chunks = [(start, random.normal(size=(size, 2)).astype(np.float32)) for start, size in starts]
    scheme = TemporalEnsemble(decay=decay)
    for start, chunk in reversed(chunks):  # late chunks are put in the order of their observations
        scheme.add(start, chunk)
    above, below, i = np.zeros(2), 0.0, 0
    for start, chunk in chunks:
        if start <= tick < start + len(chunk):
            above, below, i = above + np.exp(-decay * i) * chunk[tick - start], below + np.exp(-decay * i), i + 1
    found = scheme.action(tick)
    if i == 0:
        assert found is None
    else:
        np.testing.assert_allclose(found, above / below, rtol=1e-5, atol=1e-6)


def test_a_receding_horizon_plays_the_newest_chunk_at_its_own_ticks() -> None:
    scheme = RecedingHorizon(execute=2)
    assert scheme.wants(0)
    assert scheme.action(0) is None
    scheme.add(3, np.array([[3.0], [4.0], [5.0], [6.0]], np.float32))
    assert [scheme.action(tick) for tick in (2, 7)] == [None, None]
    assert [float(scheme.action(tick)[0]) for tick in (3, 4, 5)] == [3, 4, 5]
    assert [scheme.wants(tick) for tick in (4, 5)] == [False, True]
    scheme.add(5, np.array([[50.0], [60.0]], np.float32))  # arrives at tick 6: its first action's time has passed
    assert float(scheme.action(6)[0]) == 60
    scheme.add(4, np.array([[0.0]] * 9, np.float32))  # an older one does not replace it
    assert float(scheme.action(6)[0]) == 60
    scheme.clear()
    assert scheme.action(6) is None
    with pytest.raises(ValueError, match="execute must be at least 1 tick, got 0"):
        RecedingHorizon(execute=0)


# --- safety ---------------------------------------------------------------------------------------------------------

bounds = st.one_of(st.none(), st.tuples(st.floats(0.5, 10), st.floats(0.5, 10)))
pairs = st.tuples(st.floats(-5, 5), st.floats(-5, 5))
wishes = st.lists(st.one_of(st.none(), st.tuples(st.booleans(), pairs)), min_size=1, max_size=20)


@settings(max_examples=40)
@given(bounds, bounds, bounds, bounds, wishes)
def test_no_command_and_no_difference_of_commands_is_ever_outside_its_limit(velocity, acceleration, jerk, step, plan
                                                                            ) -> None:
    """Whatever is wished and however the bounds compare, and every stop ends at rest.

    A wish is None for a stop, or stands still, or moves at a constant velocity.
    """
    acceleration = acceleration and tuple(10 * a for a in acceleration)
    jerk = jerk and tuple(200 * j for j in jerk)
    limits = Limits((-1.0, -0.5), (0.5, 1.0), velocity, acceleration, jerk, step and tuple(0.1 * s for s in step))
    safety = SafetyFilter(limits, DT)
    safety.reset(np.zeros(2))
    commands = [np.zeros(2)] * 4
    place = np.zeros(2)
    for item in [item for item in plan for _ in range(8)]:
        if item is not None:
            moves, pair = item
            place = commands[-1] + DT * np.array(pair) if moves else np.array(pair)
        commands.append(safety.stop() if item is None else safety.filter(place))
    for _ in range(2000):
        if safety.at_rest:
            break
        commands.append(safety.stop())
    assert safety.at_rest
    path = np.array(commands)
    assert (path >= limits.low).all()
    assert (path <= limits.high).all()
    each = path
    for order, bound in enumerate((velocity, acceleration, jerk), 1):
        each = np.diff(each, axis=0) / DT
        if bound is not None:
            assert (np.abs(each) <= np.array(bound) * (1 + 1e-6)).all(), order
    if limits.step is not None:
        assert (np.abs(np.diff(path, axis=0)) <= np.array(limits.step) * (1 + 1e-6)).all()


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.005, 0.02]), st.booleans())
def test_from_every_command_a_stop_exists_that_keeps_every_limit(seed, dt, with_jerk) -> None:
    """Seven joints that are thrown about: the stop that follows each command is run to its end."""
    random = np.random.default_rng(seed)
    size = 7
    velocity, acceleration = random.uniform(0.5, 3, size), random.uniform(2, 30, size)
    jerk = random.uniform(5, 40, size) * acceleration if with_jerk else None
    low, high = -random.uniform(0.05, 2, size), random.uniform(0.05, 2, size)
    jerks = None if jerk is None else tuple(jerk)
    limits = Limits(tuple(low), tuple(high), tuple(velocity), tuple(acceleration), jerks)
    safety = SafetyFilter(limits, dt)
    safety.reset(np.zeros(size))
    path = [np.zeros(size)] * 4
    for number in range(60):
        if number % 12 == 0:
            speed = random.normal(0, 2, size)
        path.append(safety.filter(path[-1] + dt * speed if number % 24 < 12 else speed))
        if number % 7:
            continue
        stopping, stop = copy.deepcopy(safety), list(path)
        while not stopping.at_rest:
            stop.append(stopping.stop())
            assert len(stop) < 5000
        for order, (lowest, highest) in enumerate([(low, high), (-velocity, velocity), (-acceleration, acceleration),
                                                   *([] if jerk is None else [(-jerk, jerk)])]):
            each = np.diff(np.array(stop), n=order, axis=0) / dt**order
            assert (each >= lowest - 1e-6 * np.abs(lowest)).all(), order
            assert (each <= highest + 1e-6 * np.abs(highest)).all(), order


@settings(max_examples=30)
@given(st.floats(-2, 2), st.floats(-1, 1), st.floats(0.5, 5), st.floats(0.03, 3))
def test_no_plan_within_the_limits_stops_more_than_a_period_sooner(speed, share, most, change) -> None:
    """Against linear programs: is there a stop of that many periods at all?"""
    speed, start = 5 * speed, share * most
    most_, change_ = np.array([most]), np.array([change])
    periods = stop_periods(np.array([10.0]), most_, change_)
    plan = soonest_stop(np.array([speed]), np.array([start]), most_, change_, periods)[:, 0]
    assert plan.shape == (periods,)
    assert plan.sum() == pytest.approx(-speed, abs=1e-9)
    assert np.abs(plan).max() <= most + 1e-9
    assert np.abs(np.diff([start, *plan, 0.0])).max() <= change + 1e-9
    length = int(np.flatnonzero(np.abs(plan) > 1e-9).max(initial=-1)) + 1
    if length >= 2:
        assert not _stop_exists(speed, start, most, change, length - 2)
        assert _stop_exists(speed, start, most, change, length)


def _stop_exists(speed, start, most, change, periods) -> bool:
    """Whether b_1 ... b_P exist with |b| <= most, steps from `start` to 0 at most `change`, and sum -speed."""
    if periods == 0:
        return abs(speed) < 1e-9 and abs(start) <= change
    steps = np.diff(np.eye(periods + 2), axis=0)  # of [start, b_1 ... b_P, 0]
    moved, fixed = steps[:, 1:-1], steps[:, 0] * start
    found = linprog(np.zeros(periods), A_ub=np.concatenate([moved, -moved]),
                    b_ub=np.concatenate([change - fixed, change + fixed]) + 1e-9,
                    A_eq=np.ones((1, periods)), b_eq=[-speed], bounds=(-most, most))
    return bool(found.status == 0)


def test_the_filter_of_seven_joints_is_fast_enough_for_200_hz() -> None:
    """Processor time of this thread, so that a busy machine does not count; 0.15 ms where this was written."""
    size, random = 7, np.random.default_rng(0)
    safety = SafetyFilter(Limits((-2.0,) * size, (2.0,) * size, (2.0,) * size, (10.0,) * size, (500.0,) * size), 0.005)
    safety.reset(np.zeros(size))
    spent = []
    for number in range(400):
        if number % 40 == 0:
            wish = random.normal(0, 2, size)
        start = time.thread_time()
        safety.filter(wish)
        spent.append(time.thread_time() - start)
    assert np.median(spent) < 0.001


def test_wishes_that_move_within_the_limits_come_back_unchanged() -> None:
    safety = SafetyFilter(LIMITS, DT)
    times = DT * np.arange(200)
    path = np.stack([0.3 * np.sin(times * 2) ** 3, 0.5 * np.cos(times) - 0.5 + 0.2], 1)  # starts at rest
    safety.reset(path[0])
    np.testing.assert_allclose([safety.filter(place) for place in path[1:]], path[1:], atol=1e-9)


def test_a_command_reaches_a_wish_that_stands_still_and_rests_there() -> None:
    safety = SafetyFilter(LIMITS, DT)
    safety.reset(np.zeros(2))
    path = np.array([safety.filter(np.array([0.9, -0.7])) for _ in range(150)])
    np.testing.assert_allclose(path[-1], [0.9, -0.7], atol=1e-9)
    assert safety.at_rest
    assert (path <= [0.9 + 1e-9, 0.01]).all()  # and does not overshoot
    assert 0.9 / 1.0 / DT < int(np.argmax(path[:, 0] > 0.899)) < 1.6 * 0.9 / 1.0 / DT  # hardly slower than its velocity


def test_the_filter_brakes_before_a_limit_that_it_could_not_stop_at() -> None:
    """From v = 0.8 a stop at a = 1 takes 0.32: a wish that runs through the limit is left that far before it."""
    safety = SafetyFilter(Limits((0.0,), (4.0,), velocity=(1.0,), acceleration=(1.0,)), DT)
    safety.reset(np.zeros(1))
    wishes = 0.8 * DT * np.arange(1, 350)
    path = np.array([safety.filter(wish[None]) for wish in wishes])[:, 0]
    speed = np.diff(path) / DT
    assert np.abs(path - wishes)[180:200].max() < 1e-9  # it follows exactly, at full speed
    assert path[1:][speed > 0.79].max() == pytest.approx(4 - 0.8**2 / 2, abs=0.05)
    assert np.abs(np.diff(speed) / DT).max() <= 1 + 1e-6
    assert path[-1] == pytest.approx(4, abs=0.01)


@given(st.floats(1e-4, 10), st.floats(0.1, 100), st.sampled_from([0.005, 0.02, 0.1]))
def test_the_fastest_speed_is_the_one_whose_stop_covers_the_distance(distance, deceleration, dt) -> None:
    """Sum over the periods until rest: this one at the speed, every later one at one period's deceleration less."""
    speed = float(fastest_speed(np.array(distance), np.array(deceleration), dt))
    covered = dt * sum(np.arange(speed, 0, -deceleration * dt))
    assert covered == pytest.approx(distance, rel=1e-6)


def test_what_is_no_number_or_starts_outside_is_refused() -> None:
    safety = SafetyFilter(LIMITS, DT)
    with pytest.raises(ValueError, match="call reset"):
        safety.filter(np.zeros(2))
    with pytest.raises(ValueError, match=r"feature 1 starts at 2\.5, outside its limits -1 to 2"):
        safety.reset(np.array([0.0, 2.5]))
    safety.reset(np.zeros(2))
    with pytest.raises(ValueError, match="feature 0 of the action is not finite"):
        safety.filter(np.array([np.nan, 0.0]))
    assert np.array_equal(safety.position, np.zeros(2))
    with pytest.raises(ValueError, match="low and high must be finite"):
        Limits((-np.inf,), (1.0,))
    with pytest.raises(ValueError, match="velocity must hold 1 positive finite numbers"):
        Limits((0.0,), (1.0,), velocity=(0.0,))


# --- watchdog and log -----------------------------------------------------------------------------------------------


def test_the_watchdog_counts_each_age_against_its_own_bound() -> None:
    dog = Watchdog(observation_age_s=0.1, unchanged_s=1.0, inference_s=0.3, hold_s=2.0)
    assert dog.blind(age_s=0.1, unchanged_s=1.0) is None
    assert "is 0.101 s old" in str(dog.blind(age_s=0.101, unchanged_s=0))
    assert "has not changed for 1.100 s" in str(dog.blind(age_s=0, unchanged_s=1.1))
    assert dog.late(pending_s=None) is None
    assert dog.late(pending_s=0.3) is None
    assert "inference has taken 0.310 s" in str(dog.late(pending_s=0.31))
    assert not dog.expired(held_s=2.0)
    assert dog.expired(held_s=2.01)
    assert Watchdog().blind(age_s=0, unchanged_s=1e9) is None
    with pytest.raises(ValueError, match="hold_s must be positive"):
        Watchdog(hold_s=0)


def test_a_log_is_bounded_and_keeps_the_newest_records(tmp_path) -> None:
    log = Log(tmp_path, file_bytes=1000, files=3)
    for number in range(500):
        log.write({"number": number, "obs": np.array([1.5, np.nan])})
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    assert all(file.stat().st_size <= 1000 for file in files)
    kept = list(read(tmp_path))
    assert [record["number"] for record in kept] == list(range(500 - len(kept), 500))
    assert kept[-1]["obs"] == [1.5, None]
    again = Log(tmp_path, file_bytes=1000, files=3)  # a new process goes on
    again.write({"number": 500})
    assert [record["number"] for record in read(tmp_path)][-2:] == [499, 500]


def test_a_log_survives_a_kill(tmp_path) -> None:
    code = """import sys; from pathlib import Path; from diffalign_controller.log import Log
log, number = Log(Path(sys.argv[1])), 0
while True:
    log.write({"number": number}); number += 1
    print(number, flush=True)
"""
    env = {**os.environ, "PYTHONPATH": str(RUNTIME.parent)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 300:
        pass
    process.send_signal(signal.SIGKILL)
    said = [int(line) for line in process.stdout.read().splitlines() if line.isdigit()] or [300]
    process.wait()
    process.stdout.close()
    numbers = [record["number"] for record in read(tmp_path)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= max(300, said[-1] - 1)
    with next(tmp_path.iterdir()).open("ab") as file:
        file.write(b'{"number": 12')  # what a kill inside a write leaves
    assert [record["number"] for record in read(tmp_path)] == numbers


# --- loop -----------------------------------------------------------------------------------------------------------


class SteppedClock:
    """Time that passes only where the loop sleeps, or where a robot or a policy takes its time."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def now_s(self) -> float:
        return self.time_s

    def sleep_until(self, moment_s: float) -> None:
        self.time_s = max(self.time_s, moment_s)


class PointRobot:
    """A robot that is where it was commanded a period ago, in a world where things go wrong at set times."""

    def __init__(self, clock, faults=None) -> None:
        self.clock, self.faults, self.start_s = clock, faults or {}, clock.now_s()
        self.position, self.commands, self.times, self.measured = np.zeros(2), [], [], None

    def during(self, name) -> bool:
        first, last = self.faults.get(name, (np.inf, np.inf))
        return first <= self.clock.now_s() - self.start_s < last

    def observe(self) -> Observation:
        if self.during("unplugged"):
            raise ConnectionError("cable")
        if self.measured is None or not self.during("frozen"):
            self.measured = Observation(self.position.copy(), self.clock.now_s(), self.position.copy(),
                                        np.array([*self.position, 0.0]))
        return self.measured

    def command(self, action) -> None:
        if self.during("unplugged"):
            raise ConnectionError("cable")
        self.position = np.array(action)
        self.commands.append(self.position)
        self.times.append(self.clock.now_s())

    def emergency_stop_pressed(self) -> bool:
        return self.during("pressed")


class List(list):
    """A log in memory."""

    def write(self, record) -> None:
        self.append(record)


def towards(goal, chunk=8):
    """A policy: steps of 0.01 a tick from the observation towards the goal."""
    def decide(obs):
        reach = 0.01 * np.arange(1, chunk + 1, dtype=np.float32)[:, None]
        return obs + np.clip(np.asarray(goal, np.float32) - obs, -reach, reach)
    return decide


def controller(robot, clock, decide, *, log=None, inference=None, **changes):
    plan = Settings(**{"rate_hz": 1 / DT, "ramp_s": 0.2, "watchdog": Watchdog(hold_s=0.5), **changes})
    return Controller(robot, inference or InLine(decide), RecedingHorizon(execute=4), SafetyFilter(LIMITS, DT),
                      List() if log is None else log, clock, plan)


def states(log) -> list[str]:
    return [record["to"] for record in log if record.get("event") == "state"]


def within_limits(robot) -> bool:
    """Of every unbroken run of commands: a robot that cannot be reached stops by itself."""
    gaps = np.flatnonzero(np.diff(robot.times) > 5 * DT) + 1
    return all(_within_limits(part) for part in np.split(np.array(robot.commands), gaps))


def _within_limits(commands) -> bool:
    path = np.array([commands[0], commands[0], *commands])
    moves = np.abs(np.diff(path, axis=0)) / DT <= np.array(LIMITS.velocity) * (1 + 1e-6)
    gains = np.abs(np.diff(path, 2, axis=0)) / DT**2 <= np.array(LIMITS.acceleration) * (1 + 1e-6)
    return bool(moves.all() and gains.all() and (path >= LIMITS.low).all() and (path <= LIMITS.high).all())


def drill(faults=None, decide=None, seconds=4.0, **changes):
    clock, log = SteppedClock(), List()
    robot = PointRobot(clock, faults)
    loop = controller(robot, clock, decide or towards([0.5, -0.5]), log=log, **changes)
    code = loop.run(seconds)
    assert within_limits(robot)
    assert log[-1]["event"] == "end"
    assert log[-1]["exit"] == code
    return code, robot, log, loop


def test_a_quiet_run_reaches_its_goal_and_comes_to_rest() -> None:
    code, robot, log, loop = drill()
    assert code == Exit.DONE == 0
    assert states(log) == ["ramp-in", "running", "safe stop"]
    np.testing.assert_allclose(robot.position, [0.5, -0.5], atol=1e-4)
    np.testing.assert_array_equal(robot.commands[-1], robot.commands[-2])
    assert loop.timing.missed == 0
    assert 200 <= loop.timing.ticks <= 220
    np.testing.assert_allclose(loop.timing.periods_s, DT, atol=1e-9)


@pytest.mark.parametrize(("faults", "code", "word"), [
    ({"pressed": (1.0, 1.1)}, Exit.EMERGENCY_STOP, "emergency stop"),
    ({"frozen": (1.0, 9.0)}, Exit.BLIND, "s old"),
    ({"unplugged": (1.0, 9.0)}, Exit.CONNECTION, "cable"),
])
def test_what_does_not_come_back_stops_the_robot_with_its_code(faults, code, word) -> None:
    found, robot, log, _ = drill(faults)
    assert found == code
    assert word in log[-1]["reason"]
    if "unplugged" in faults:
        assert states(log)[-2:] == ["safe stop", "fault"]
    else:
        assert states(log)[-1] == "safe stop"
        np.testing.assert_array_equal(robot.commands[-1], robot.commands[-2])
        stopping = len(robot.commands) * DT - 1.0
        assert stopping < (0.3 if "pressed" in faults else 1.0)


@pytest.mark.parametrize("faults", [{"frozen": (1.0, 1.3)}, {"unplugged": (1.0, 1.3)}], ids=["frozen", "unplugged"])
def test_what_comes_back_is_held_for_and_ramped_in(faults) -> None:
    code, robot, log, _ = drill(faults)
    assert code == Exit.DONE
    assert states(log) == ["ramp-in", "running", "hold", "ramp-in", "running", "safe stop"]
    np.testing.assert_allclose(robot.position, [0.5, -0.5], atol=1e-4)


def test_a_robot_that_was_moved_while_it_was_unplugged_is_not_thrown_back() -> None:
    clock, log = SteppedClock(), List()
    robot = PointRobot(clock, {"unplugged": (1.0, 1.3)})
    observe = robot.observe

    def pushed():
        if robot.during("unplugged"):
            robot.position = np.array([-0.4, 0.4])
        return observe()

    robot.observe = pushed
    loop = controller(robot, clock, towards([0.5, -0.5]), log=log)
    assert loop.run(4.0) == Exit.DONE
    after = int(np.flatnonzero(np.diff(robot.times) > 5 * DT)[0]) + 1
    np.testing.assert_allclose(robot.commands[after], [-0.4, 0.4], atol=0.05)
    assert within_limits(robot)


def test_a_robot_that_comes_back_outside_its_limits_is_not_commanded() -> None:
    clock, log = SteppedClock(), List()
    robot = PointRobot(clock, {"unplugged": (1.0, 1.3)})
    observe = robot.observe

    def pushed():
        if robot.during("unplugged"):
            robot.position = np.array([-1.4, 0.4])
        return observe()

    robot.observe = pushed
    assert controller(robot, clock, towards([0.5, -0.5]), log=log).run(4.0) == Exit.CONNECTION
    assert robot.times[-1] - robot.start_s < 1.0
    assert "feature 0 starts at -1.4, outside its limits" in log[-1]["reason"]


def test_what_goes_wrong_at_the_end_is_in_the_exit_code() -> None:
    held, _, log, _ = drill({"frozen": (1.0, 9.0)}, seconds=1.3)
    assert held == Exit.BLIND
    assert "time is up in a hold" in log[-1]["reason"]
    lost, _, _, loop = drill({"unplugged": (0.51, 9.0)}, seconds=0.5)  # while it comes to rest
    assert lost == Exit.CONNECTION
    assert loop.state is State.FAULT
    pressed, _, _, _ = drill({"pressed": (0.51, 9.0)}, seconds=0.5)
    assert pressed == Exit.EMERGENCY_STOP


def test_a_crash_is_in_the_log() -> None:
    clock, log = SteppedClock(), List()
    robot = PointRobot(clock)
    loop = controller(robot, clock, towards([0.5, -0.5]), log=log)
    robot.command = lambda action: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.run(1.0)
    assert log[-1] == {"event": "crash", "state": "ramp-in", "reason": "ZeroDivisionError: division by zero"}


def test_nan_is_never_sent_and_stops_the_robot() -> None:
    def decide(obs):
        chunk = towards([0.5, -0.5])(obs)
        return chunk * np.nan if abs(obs[0]) > 0.2 else chunk

    code, robot, log, _ = drill(decide=decide)
    assert code == Exit.BAD_ACTION
    assert np.isfinite(robot.commands).all()
    assert abs(robot.position[0]) < 0.3
    assert "NaN" in log[-1]["reason"]


def test_a_policy_that_fails_stops_the_robot() -> None:
    def decide(obs):
        if obs[0] > 0.2:
            raise RuntimeError("out of memory")
        return towards([0.5, -0.5])(obs)

    code, _, log, _ = drill(decide=decide)
    assert code == Exit.LATE
    assert "out of memory" in log[-1]["reason"]


def test_wild_actions_stay_within_the_limits_and_the_tool_in_its_box() -> None:
    random = np.random.default_rng(0)
    code, robot, _, _ = drill(decide=lambda obs: random.normal(0, 9, (8, 2)).astype(np.float32))
    assert code == Exit.DONE
    code, robot, log, _ = drill(workspace=((-1.0, -0.2, -1.0), (1.0, 1.0, 1.0)))
    assert code == Exit.WORKSPACE
    assert -0.25 < robot.position[1] < -0.2
    assert "outside its box" in log[-1]["reason"]


def test_velocities_are_brought_to_zero_and_not_held() -> None:
    steady = np.full((8, 2), 0.4, np.float32)
    code, robot, log, _ = drill({"frozen": (1.0, 1.6)}, decide=lambda obs: steady, rest="zero")
    assert code == Exit.DONE
    held = [record["command"] for record in log if record.get("state") == "hold"]
    assert len(held) > 3
    assert np.abs(held[-1]).max() < 0.05
    np.testing.assert_allclose(robot.commands[-1], 0, atol=1e-9)


def test_a_late_chunk_loses_the_actions_whose_time_has_passed_and_missed_deadlines_are_counted() -> None:
    clock = SteppedClock()

    def slow(obs):
        clock.time_s += 3.5 * DT
        return np.arange(8, dtype=np.float32)[:, None] * [0.01, 0.0] + obs

    log = List()
    loop = controller(PointRobot(clock), clock, slow, log=log, ramp_s=0.0)
    assert loop.run(1.0) == Exit.DONE
    ticks = [record["tick"] for record in log if "tick" in record]
    assert ticks[:5] == [0, 4, 8, 12, 16]  # no burst of commands to catch up
    assert loop.timing.missed > 10
    assert loop.timing.ticks < 20


def test_a_dead_inference_thread_is_noticed() -> None:
    def hangs(obs):
        if obs[0] > 0.05:
            time.sleep(30)
        return towards([0.5, -0.5], chunk=40)(obs)

    clock, log = MonotonicClock(), List()
    robot = PointRobot(clock)
    dog = Watchdog(observation_age_s=5, inference_s=0.15, hold_s=0.2)
    loop = controller(robot, clock, hangs, log=log, inference=Threaded(hangs), watchdog=dog)
    assert loop.run(20.0) == Exit.LATE
    assert "inference has taken" in log[-1]["reason"]
    assert within_limits(robot)


class Silent(InLine):
    """Decides until `until_s` and never answers again."""

    def __init__(self, decide, clock, until_s):
        super().__init__(decide)
        self.clock, self.until_s = clock, until_s

    def answer(self):
        return super().answer() if self.clock.now_s() < self.until_s else None


def test_a_hold_whose_cause_shows_later_names_the_cause() -> None:
    """The chunk (eight actions, 0.16 s) ends before the pending decision is called late (0.3 s)."""
    clock, log = SteppedClock(), List()
    robot = PointRobot(clock)
    silent = Silent(towards([0.5, -0.5]), clock, clock.now_s() + 1.0)
    loop = controller(robot, clock, None, log=log, inference=silent, watchdog=Watchdog(inference_s=0.3, hold_s=0.5))
    assert loop.run(4.0) == Exit.LATE
    first = next(record for record in log if record.get("to") == "hold")
    assert "no chunk reaches" in first["reason"]
    assert "inference has taken" in log[-1]["reason"]
    assert within_limits(robot)


def test_a_loop_in_real_time_keeps_its_rate_beside_a_thread(tmp_path) -> None:
    clock = MonotonicClock()
    robot, log = PointRobot(clock), Log(tmp_path)
    decide = towards([0.2, 0.2])
    inference = Threaded(lambda obs: (time.sleep(0.03), decide(obs))[1])
    dog = Watchdog(observation_age_s=5, hold_s=5)
    loop = controller(robot, clock, None, log=log, inference=inference, watchdog=dog)
    start = time.monotonic()
    assert loop.run(1.2) == Exit.DONE
    assert 1.2 <= time.monotonic() - start < 3
    inference.close()
    assert np.median(loop.timing.periods_s) == pytest.approx(DT, rel=0.2)
    assert any(record.get("state") == "running" for record in read(tmp_path))
    assert json.dumps(next(read(tmp_path)))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="need rate_hz > 0"):
        Settings(rate_hz=0)
    with pytest.raises(ValueError, match="first corner must be below"):
        Settings(rate_hz=10, workspace=((0.0, 0.0, 0.0), (1.0, 0.0, 1.0)))
    clock = SteppedClock()
    with pytest.raises(ValueError, match="made for 50 Hz, the loop for 10"):
        controller(PointRobot(clock), clock, None, rate_hz=10.0)
    outside = PointRobot(clock)
    outside.position = np.array([5.0, 0.0])
    loop = controller(outside, clock, towards([0.0, 0.0]))
    with pytest.raises(ValueError, match="feature 0 starts at 5"):
        loop.run(1.0)
    assert loop.state is State.IDLE
