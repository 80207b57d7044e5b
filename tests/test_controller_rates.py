"""The controller at two rates: actions between actions, blended chunks, measured delays, the status line."""

from __future__ import annotations

import io
import re
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_controller import LIMITS, List, PointRobot, SteppedClock, states, towards

from diffalign_controller.chunks import OverlapBlend, RecedingHorizon, TemporalEnsemble, played, soft_mask
from diffalign_controller.inference import Decided, InLine, Plan, Threaded
from diffalign_controller.loop import Controller, Exit, Settings
from diffalign_controller.robot import Observation
from diffalign_controller.safety import Limits, SafetyFilter
from diffalign_controller.screen import Screen
from diffalign_controller.timing import Timing, quantiles_ms
from diffalign_controller.watchdog import Watchdog

RATE, SERVO = 50.0, 200.0
LINE = np.array([[0.0, 1.0], [2.0, 1.0], [3.0, 5.0]], np.float32)


# --- between actions and between chunks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("age", "held", "linear"), [
    (-0.01, None, None), (0, [0, 1], [0, 1]), (0.25, [0, 1], [0.5, 1]), (1 - 1e-9, [2, 1], [2, 1]),
    (1.5, [2, 1], [2.5, 3]), (2.9, [3, 5], [3, 5]), (3, None, None),
])
def test_an_action_is_held_or_on_the_line_to_the_next(age, held, linear) -> None:
    for between, wanted in (("hold", held), ("linear", linear)):
        found = played(LINE, age, between)
        assert found is None if wanted is None else found == pytest.approx(wanted)


def test_every_scheme_plays_between_actions() -> None:
    for scheme in (RecedingHorizon(execute=2), TemporalEnsemble(execute=2), OverlapBlend(execute=2)):
        scheme.add(0.5, LINE)
        assert scheme.action(1.75, "hold") == pytest.approx([2, 1])
        assert scheme.action(1.75, "linear") == pytest.approx([2.25, 2])
        assert scheme.action(0.4, "linear") is None
        assert scheme.action(3.5, "linear") is None


def rtc_weights(size, d, s, kind):
    """Real-time chunking's mask as its authors give it, for whole numbers."""
    weights = []
    for i in range(size):
        c = (size - s - i) / (size - s - d + 1)
        soft = c if kind == "linear" else c * (np.exp(c) - 1) / (np.e - 1)
        weights.append(1.0 if i < d else soft if i < size - s else 0.0)
    return weights


@pytest.mark.parametrize("kind", ["exp", "linear"])
@pytest.mark.parametrize(("size", "d", "s"), [(8, 1, 3), (16, 4, 8), (6, 2, 3)])
def test_the_soft_mask_is_real_time_chunkings(kind, size, d, s) -> None:
    """Its d is one more than the periods that have passed at arrival, its H - s the end of the old chunk."""
    found = [soft_mask(i, d - 1, size - s, kind) for i in range(size)]
    assert found == pytest.approx(rtc_weights(size, d, s, kind))


def test_overlapping_chunks_are_blended_each_into_the_plan_before_it() -> None:
    random = np.random.default_rng(0)
    a, b, c = (random.normal(size=(6, 2)).astype(np.float32) for _ in range(3))
    scheme = OverlapBlend(execute=3)
    scheme.add(0, a, 0)
    scheme.add(3, b, 4)
    scheme.add(2, 100 * c, 4)  # an older one does not replace it
    scheme.add(6, c, 6)
    for time in (6.0, 6.5, 7.25, 8.5, 9.5, 11.0):
        ab = b[int(time - 3)] if time < 9 else None  # of a, which ends at 6, nothing is left
        w = soft_mask(time - 6, 0, 3, "exp")
        wanted = c[int(time - 6)] if ab is None else w * ab + (1 - w) * c[int(time - 6)]
        np.testing.assert_allclose(scheme.action(time), wanted, rtol=1e-5)
    assert scheme.action(12.0) is None
    scheme.clear()
    scheme.add(0, a, 0)
    scheme.add(3, b, 4)
    w = soft_mask(1.5, 1, 3, "exp")
    np.testing.assert_allclose(scheme.action(4.5), w * a[4] + (1 - w) * b[1], rtol=1e-5)


@given(st.floats(0, 4), st.integers(5, 12), st.floats(0.1, 4))
def test_the_plan_does_not_jump_where_a_chunk_arrives_or_the_old_one_ends(delay, size, seen) -> None:
    random = np.random.default_rng(0)
    old, new = (random.normal(size=(size, 1)).astype(np.float32) for _ in range(2))
    arrived = seen + delay
    if arrived > size - 0.5:
        return
    scheme = OverlapBlend(execute=1)
    scheme.add(0.0, old, 0.0)
    before = scheme.action(arrived, "linear")
    scheme.add(seen, new, arrived)
    assert scheme.action(arrived, "linear") == pytest.approx(before, abs=1e-4)
    ends = [float(scheme.action(size + change, "linear")[0]) for change in (-1e-3, 1e-3)]
    assert ends[0] == pytest.approx(ends[1], abs=0.05)
    jumping = RecedingHorizon(execute=1)
    jumping.add(0.0, old)
    jumping.add(seen, new)
    assert jumping.action(arrived, "linear") == pytest.approx(played(new, delay, "linear"))


@pytest.mark.parametrize("scheme", [RecedingHorizon(execute=6), TemporalEnsemble(execute=6), OverlapBlend(execute=6)])
def test_a_chunk_is_asked_for_before_the_last_one_ends(scheme) -> None:
    assert scheme.wants(3)
    scheme.add(3, np.zeros((8, 1), np.float32))
    assert [scheme.wants(time) for time in (8.75, 9)] == [False, True]
    assert [scheme.wants(time, 3.5) for time in (7.25, 7.5)] == [False, True]
    assert scheme.wants(3, 8)


# --- the loop -------------------------------------------------------------------------------------------------------


class Delayed:
    """Inference that takes a set time of a stepped clock."""

    def __init__(self, decide, clock, delay_s) -> None:
        self._decide, self._clock, self._delay_s, self._pending = decide, clock, delay_s, None

    def ask(self, time, obs, plan) -> None:
        assert self._pending is None
        chunk = self._decide(obs) if plan is None else self._decide(obs, plan)
        self._pending = self._clock.now_s() + self._delay_s, Decided(time, chunk, None, self._delay_s)

    def answer(self):
        if self._pending is None or self._clock.now_s() < self._pending[0] - 1e-9:
            return None
        answer, self._pending = self._pending[1], None
        return answer


def run(decide, *, seconds=2.0, servo_hz=SERVO, inference=None, scheme=None, delay_s=None, robot=None, status=None,
        limits=LIMITS, **changes):
    clock, log = SteppedClock(), List()
    robot = (robot or PointRobot)(clock)
    dog = Watchdog(hold_s=0.5, inference_s=1)
    plan = Settings(**{"rate_hz": RATE, "servo_hz": servo_hz, "ramp_s": 0.0, "watchdog": dog, **changes})
    inference = InLine(decide) if delay_s is None else Delayed(decide, clock, delay_s)
    loop = Controller(robot, inference, scheme or RecedingHorizon(execute=4), SafetyFilter(limits, 1 / plan.command_hz),
                      log, clock, plan, status)
    return loop.run(seconds), robot, log, loop


def clocked(obs):
    """A policy that reads the time, and whose actions are a sine of the times that they are for."""
    times = obs[0] + np.arange(8) / RATE
    return np.stack([0.3 * np.sin(2 * times) ** 3, np.zeros(8)], 1).astype(np.float32)


class ClockRobot(PointRobot):
    """Observes nothing but the time, as it was `lag_s` ago."""

    lag_s = 0.0

    def observe(self) -> Observation:
        time = self.clock.now_s() - self.start_s - self.lag_s
        return Observation(np.array([time, 0.0]), self.clock.now_s() - self.lag_s, self.position.copy())


class LaggingRobot(ClockRobot):
    lag_s = 0.05


@pytest.mark.parametrize("robot", [ClockRobot, LaggingRobot])
@pytest.mark.parametrize("delay_s", [None, 0.03])
def test_places_are_commanded_at_the_servo_rate_on_the_line_and_in_time(robot, delay_s) -> None:
    """Whenever the policy saw and decided, a command is what was meant for its moment."""
    wide = Limits(LIMITS.low, LIMITS.high)
    code, robot, _, loop = run(clocked, robot=robot, delay_s=delay_s, limits=wide)
    assert code == Exit.DONE
    assert loop.holds == 0
    commands = np.array(robot.commands)
    times = np.array(robot.times) - robot.start_s
    assert np.diff(times) == pytest.approx(1 / SERVO)
    inside = (times > 0.3) & (times < 1.9)
    meant = 0.3 * np.sin(2 * times) ** 3
    assert np.abs(commands[:, 0] - meant)[inside].max() < 3e-4  # the chord of a sine over 20 ms; a step is up to 1e-2


def test_velocities_are_held_and_changes_are_spread() -> None:
    steady = np.full((8, 2), 0.4, np.float32)
    for between, wanted in (("hold", 0.4), ("spread", 0.1)):
        _, robot, _, _ = run(lambda obs: steady, rest="zero", between=between)
        assert robot.commands[300] == pytest.approx([wanted] * 2)
    with pytest.raises(ValueError, match="would otherwise move the robot 4 times as far"):
        Settings(rate_hz=RATE, servo_hz=SERVO, rest="zero")
    assert Settings(rate_hz=RATE, servo_hz=RATE, rest="zero").share == 1
    with pytest.raises(ValueError, match=r"servo_hz must be at least rate_hz \(50\.0\), got 20"):
        Settings(rate_hz=RATE, servo_hz=20)
    with pytest.raises(ValueError, match="servo_hz must be at least"):
        Settings(rate_hz=RATE, servo_hz=np.inf)
    with pytest.raises(ValueError, match=r"must be a multiple of rate_hz \(50\.0\), got 80"):
        Settings(rate_hz=RATE, servo_hz=80, rest="zero", between="spread")
    assert Settings(rate_hz=RATE, servo_hz=80).command_hz == 80  # places and velocities may change at any time
    with pytest.raises(ValueError, match="delay_quantile must be above 0"):
        Settings(rate_hz=RATE, delay_quantile=0)
    clock = SteppedClock()
    with pytest.raises(ValueError, match="made for 50 Hz, the loop for 200"):
        Controller(PointRobot(clock), InLine(towards([0, 0])), RecedingHorizon(1), SafetyFilter(LIMITS, 1 / RATE),
                   List(), clock, Settings(rate_hz=RATE, servo_hz=SERVO))


def test_a_slow_policy_is_asked_early_enough(monkeypatch) -> None:
    """A chunk of 8 of which 6 are executed, decided in 3.5 periods: without foresight 1.5 of 8 periods are empty."""
    decide, plan = towards([0.5, -0.5]), {"delay_s": 3.5 / RATE}
    code, _, log, loop = run(decide, scheme=RecedingHorizon(execute=6), **plan)
    assert code == Exit.DONE
    assert loop.holds == 0
    assert states(log) == ["ramp-in", "running", "safe stop"]
    assert loop.timing.delay_s(1.0) == pytest.approx(3.5 / RATE)
    assert log[-1]["milliseconds"]["delay"] == pytest.approx({"p50": 70, "p99": 70, "max": 70})
    assert log[-1]["holds"] == 0
    monkeypatch.setattr(Timing, "delay_s", lambda self, quantile: 0.0)
    _, _, log, loop = run(decide, scheme=RecedingHorizon(execute=6), **plan)
    assert loop.holds > 5


def test_a_policy_slower_than_its_chunk_moves_nothing_and_the_reason_says_why() -> None:
    code, robot, log, _ = run(towards([0.5, -0.5]), delay_s=9 / RATE)
    assert code == Exit.LATE
    assert not np.array(robot.commands).any()  # no action was ever in time
    assert "no chunk reaches this tick, decisions take 0.180 s" in log[-1]["reason"]


def test_observations_older_than_a_chunk_are_to_blame_and_not_the_policy() -> None:
    class Late(LaggingRobot):
        lag_s = 9 / RATE

    dog = Watchdog(observation_age_s=1, hold_s=0.5)
    code, robot, log, _ = run(clocked, robot=Late, delay_s=1 / RATE, watchdog=dog)
    assert code == Exit.BLIND
    assert not np.array(robot.commands).any()
    assert "no chunk reaches this tick, the observation is 0.180 s old" in log[-1]["reason"]


def test_the_expected_delay_is_a_quantile_of_the_last_fifty_without_the_cold_start() -> None:
    timing = Timing()
    assert timing.delay_s(1.0) == 0
    timing.delays_s.append(9.0)
    assert timing.delay_s(1.0) == 9
    timing.delays_s.append(0.25)
    assert timing.delay_s(1.0) == 0.25
    timing.delays_s.pop()
    timing.delays_s.extend([0.5] + [0.01 * number for number in range(1, 51)])
    assert timing.delay_s(1.0) == pytest.approx(0.5)
    assert timing.delay_s(0.5) == pytest.approx(0.25)
    timing.delays_s.pop()
    timing.delays_s.extend([0.2, 0.2])
    assert timing.delay_s(1.0) == pytest.approx(0.49)
    found = quantiles_ms(number / 1000 for number in range(1, 201))
    assert found == pytest.approx({"p50": 100, "p99": 198, "max": 200})


def test_the_status_line_is_given_four_times_a_second() -> None:
    lines: list[str] = []
    run(clocked, robot=LaggingRobot, seconds=3.6, status=lines.append)
    assert len(lines) == 14
    for number, line in enumerate(lines, 1):
        found = re.match(r"tick +(\d+)  running +20[04]\.0 Hz  missed 0  chunk +(\d+) ms old  work .* ms", line)
        assert found, line
        assert abs(int(found[1]) - 50 * number) <= 1
        assert 50 <= int(found[2]) <= 85  # seen 50 ms late, and renewed four actions of 20 ms after that
    run(towards([0.5, -0.5]), seconds=1.0)  # on request only
    run(lambda obs: np.full((8, 2), np.nan), seconds=0.3, status=lines.append)
    assert re.search(r"hold .* chunk +- ms", lines[-1])


# --- real-time chunking ---------------------------------------------------------------------------------------------


def test_the_plan_that_a_policy_is_told_is_what_will_be_played() -> None:
    random = np.random.default_rng(0)
    chunk = random.normal(size=(8, 2)).astype(np.float32)
    scheme = RecedingHorizon(execute=3, mask="exp")
    assert scheme.plan(0, 2) is None  # nothing is planned
    scheme.add(2, chunk)
    previous, weight = scheme.plan(5, 6)  # three of eight are over; the next is expected one period later
    np.testing.assert_array_equal(previous[:5], chunk[3:])
    np.testing.assert_array_equal(previous[5:], [chunk[7]] * 3)
    assert weight == pytest.approx(rtc_weights(8, 2, 3, "exp"))
    assert (previous.dtype, weight.dtype) == (np.float32, np.float32)
    previous, weight = scheme.plan(4.25, 5)
    meant = [scheme.action(4.25 + i, "linear") for i in range(5)]
    np.testing.assert_allclose(previous[:5], meant, atol=1e-6)
    assert weight == pytest.approx([soft_mask(i, 0.75, 5.75, "exp") for i in range(8)])
    scheme.clear()
    assert scheme.plan(5, 6) is None
    for untold in (RecedingHorizon(execute=3), TemporalEnsemble(execute=3), OverlapBlend(execute=3)):
        untold.add(2, chunk)
        assert untold.plan(5, 6) is None


def jumps(scheme) -> list[float]:
    """How far the plan jumps where a chunk arrives; filled while the scheme is used."""
    found, add = [], scheme.add

    def watched(time, chunk, arrived):
        before = scheme.action(arrived)
        add(time, chunk, arrived)
        if before is not None:
            found.append(float(np.abs(scheme.action(arrived) - before).max()))

    scheme.add = watched
    return found


@pytest.mark.parametrize("servo_hz", [RATE, SERVO])
def test_a_policy_that_heeds_the_plan_goes_on_from_it(servo_hz) -> None:
    """Asked anew, it goes to the other side each time: without the plan the actions jump where a chunk arrives."""
    told = []

    def decide(obs, plan=None):
        told.append(plan)
        goal = np.full((8, 2), 0.5 if len(told) % 2 else -0.5, np.float32)
        return goal if plan is None else plan.weight[:, None] * plan.previous + (1 - plan.weight[:, None]) * goal

    wide = Limits(LIMITS.low, LIMITS.high)
    for scheme in (RecedingHorizon(execute=4, mask="exp"), RecedingHorizon(execute=4)):
        told.clear()
        found = jumps(scheme)
        code, _, _, _ = run(decide, scheme=scheme, delay_s=0.03, servo_hz=servo_hz, limits=wide, seconds=1.0)
        assert code == Exit.DONE
        assert told[0] is None
        assert all((plan is None) == (scheme.mask is None) for plan in told[1:])
        assert len(found) >= 9
        assert found == pytest.approx([0.0 if scheme.mask else 1.0] * len(found), abs=1e-6)


@pytest.mark.parametrize("kind", [InLine, Threaded])
def test_a_policy_in_line_and_in_a_thread_is_told_the_plan(kind) -> None:
    plan = Plan(np.full((3, 2), 2.0, np.float32), np.array([1.0, 0.5, 0], np.float32))
    inference = kind(lambda obs, plan=None: obs if plan is None else obs + plan.weight @ plan.previous)
    for told, wanted in ((None, 1.0), (plan, 4.0)):
        inference.ask(0.0, np.ones(2, np.float32), told)
        while (answer := inference.answer()) is None:
            pass
        assert answer.chunk == pytest.approx([wanted] * 2)
    if kind is Threaded:
        inference.close()


# --- the screen -----------------------------------------------------------------------------------------------------


class Stream(io.StringIO):
    """A stream that is a terminal, or a file; `stuck` until it is let go."""

    def __init__(self, terminal, free=None) -> None:
        super().__init__()
        self.terminal, self.free = terminal, free

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text) -> int:
        if self.free is not None:
            self.free.wait()
        return super().write(text)


@pytest.mark.parametrize(("terminal", "wanted"), [
    (True, "started\none\r\x1b[Ktwo\r\x1b[Khold\nthree\n"), (False, "started\none\ntwo\nhold\nthree\n")])
def test_a_renewed_line_stands_below_those_that_stay(terminal, wanted) -> None:
    stream = Stream(terminal)
    screen = Screen(stream)
    screen.say("started")
    screen.show("one")
    screen.show("two")
    screen.say("hold")
    screen.show("three")
    screen.close()
    assert stream.getvalue() == wanted


def test_a_terminal_that_takes_nothing_does_not_stop_the_loop() -> None:
    free = threading.Event()
    stream = Stream(True, free)
    screen = Screen(stream)
    loop = threading.Thread(target=lambda: [screen.show("x" * 500 + str(number)) for number in range(1000)])
    loop.start()
    loop.join(timeout=5)
    waits = loop.is_alive()
    free.set()
    assert not waits
    screen.close()
    assert 2 <= stream.getvalue().count("\r") <= 110  # what was waiting
    assert "x" * 500 not in stream.getvalue()  # a line that would wrap could not be replaced
