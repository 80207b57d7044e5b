"""The control loop: observe, decide, filter, command, log, at a fixed rate, and never anything else.

    idle -> ramp-in -> running <-> hold -> safe stop | fault

idle: the first chunk is awaited. ramp-in: the first actions are blended in from where the robot is. hold: something is
missing (a fresh observation, a chunk, a finite action); the robot is brought to rest within its limits, and goes on
through ramp-in once it is back. safe stop: it does not come back, or somebody pressed the emergency stop; the robot is
brought to rest and the loop ends. fault: the robot cannot be reached any more; the loop ends without it.

Legend: Da action features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.chunks import Between, Scheme
from diffalign_controller.history import History
from diffalign_controller.inference import Inference
from diffalign_controller.robot import Clock, Observation, Robot
from diffalign_controller.safety import SafetyFilter
from diffalign_controller.settings import Exit, Settings, State
from diffalign_controller.timing import Timing, status_line

__all__ = ["Controller", "Exit", "Recorder", "Settings", "State", "Timing"]
Array = NDArray[np.floating]
_STATUS_S = 0.25


class Recorder(Protocol):
    """Where records of ticks go (log.Log)."""

    def write(self, record: dict[str, Any]) -> None: ...


class Controller:
    """Runs a policy on a robot; `run` returns the exit code, `state` and `reason` say where it is and why.

    status: is given a line on how it goes a few times a second, None for none; it must return at once.
    """

    def __init__(self, robot: Robot, inference: Inference, scheme: Scheme, safety: SafetyFilter, log: Recorder,
                 clock: Clock, settings: Settings, status: Callable[[str], None] | None = None) -> None:
        if not abs(safety.dt * settings.command_hz - 1) < 1e-6:
            raise ValueError(f"the safety filter is made for {1 / safety.dt:.6g} Hz, the loop for "
                             f"{settings.command_hz:.6g}; its limits are per second, so both must have the same rate")
        self.robot, self.inference, self.scheme, self.safety = robot, inference, scheme, safety
        self.log, self.clock, self.settings, self.status = log, clock, settings, status
        self._history = History(settings.history)
        linear = settings.rest == "last" if settings.between is None else settings.between == "linear"
        self._between: Between = "linear" if linear else "hold"
        self.state, self.reason, self.timing, self.holds = State.IDLE, "", Timing(), 0
        self._exit = Exit.DONE
        self._since_s = 0.0  # when the state began
        self._asked_s: float | None = None  # when the pending decision was asked for
        self._chunk_s: float | None = None  # when what the newest chunk was decided on was measured
        self._delay = 0.0  # expected of a decision, in control periods
        self._said = (0, 0.0)  # the ticks and the time of the last status line
        self._stop_asked = self._was_lost = self._symptom = False
        self._seen: Observation | None = None
        self._changed_s = 0.0
        self._begin: Array = np.zeros(0)
        self._start_s = 0.0

    def run(self, seconds: float) -> Exit:
        """Control for that long, then bring the robot to rest. Raises: ValueError if it starts outside its limits."""
        try:
            self._start()
            self._loop(seconds)
        except ConnectionError as error:
            self._enter(State.FAULT, f"connection lost: {error}", Exit.CONNECTION)
        except BaseException as error:
            self.log.write({"event": "crash", "state": self.state.value, "reason": f"{type(error).__name__}: {error}"})
            raise
        self.log.write({"event": "end", "exit": int(self._exit), "state": self.state.value, "reason": self.reason,
                        "ticks": self.timing.ticks, "missed": self.timing.missed, "holds": self.holds,
                        "milliseconds": self.timing.milliseconds()})
        return self._exit

    def _loop(self, seconds: float) -> None:
        period = 1 / self.settings.command_hz
        start = before = self._start_s = self.clock.now_s()
        self._said = (0, start)
        tick = 0
        while self.state is not State.FAULT and not (self.state is State.SAFE_STOP and self._rests):
            if self.state is not State.SAFE_STOP and (self._stop_asked or tick * period >= seconds):
                why = "asked to stop" if self._stop_asked else "time is up"
                held = self.state is State.HOLD
                self._enter(State.SAFE_STOP, f"{why} in a hold: {self.reason}" if held else why,
                            self._exit if held else Exit.DONE)
            self._tick(tick)
            done = self.clock.now_s()
            self.timing.works_s.append(done - before)
            late = done - (start + (tick + 1) * period)
            self.timing.missed += late > 0
            self.timing.ticks += 1
            self._tell(done)
            tick += 1 + max(0, math.ceil(late / period))  # ticks that have passed are left out, not caught up with
            self.clock.sleep_until(start + tick * period)
            now = self.clock.now_s()
            self.timing.periods_s.append(now - before)
            self.timing.wakes_s.append(now - (start + tick * period))
            before = now

    def _tell(self, now: float) -> None:
        """The status line, when it is time for one."""
        ticks, seconds = self.timing.ticks - self._said[0], now - self._said[1]
        if self.status is not None and seconds >= _STATUS_S:
            age = None if self._chunk_s is None else now - self._chunk_s
            self.status(status_line(self.state.value, self.reason, self.timing, ticks, seconds, age))
            self._said = (self.timing.ticks, now)

    def stop(self) -> None:
        """Bring the robot to rest and end `run`; may be called from a signal handler or another thread."""
        self._stop_asked = True

    @property
    def _rests(self) -> bool:
        near = np.abs(self.safety.position) < 1e-9 * (self.safety.high - self.safety.low)
        return self.safety.at_rest and (self.settings.rest == "last" or bool(near.all()))

    def _start(self) -> None:
        seen = self.robot.observe()
        self.safety.reset(np.zeros_like(seen.position) if self.settings.rest == "zero" else seen.position)
        self._seen, self._changed_s = seen, self.clock.now_s()
        self._history.clear()
        self._since_s = self._start_s = self._changed_s

    def _tick(self, tick: int) -> None:
        now = self.clock.now_s()
        time = tick * self.settings.rate_hz / self.settings.command_hz  # in control periods
        record: dict[str, Any] = {"tick": tick, "time_s": now}
        try:
            if self._exit is not Exit.EMERGENCY_STOP and self.robot.emergency_stop_pressed():
                self._enter(State.SAFE_STOP, "emergency stop pressed", Exit.EMERGENCY_STOP)
            lost = self._observe(now)
            self._think(time, now, lost)
            wish = self.scheme.action(time, self._between)
            wish = None if wish is None else self.settings.share * wish
            command = self._command(wish, now, lost)
            record |= {"state": self.state.value, "reason": self.reason, "wish": wish, "command": command,
                       "obs": None if self._seen is None else self._seen.values}
            self.robot.command(command)
        except ConnectionError as error:
            self._was_lost = True
            self._miss(f"connection lost: {error}", Exit.CONNECTION, now)
            if self.state is State.SAFE_STOP:  # it cannot be brought to rest from here
                self._enter(State.FAULT, f"connection lost ({error}) after: {self.reason}",
                            Exit(self._exit or Exit.CONNECTION))
            record |= {"state": self.state.value, "reason": self.reason}
        self.log.write(record)

    def _observe(self, now: float) -> str | None:
        """Look, and say why what was seen cannot be used."""
        seen = self.robot.observe()
        if self._was_lost:
            self._history.clear()  # what was seen before says nothing about now
            if self.settings.rest == "last":
                self._find_again(seen)
        self._was_lost = False
        if self._seen is None or not np.array_equal(seen.values, self._seen.values):
            self._changed_s = now
        self._seen = seen
        self._history.add((seen.measured_s - self._start_s) * self.settings.rate_hz, seen.values)
        box = self.settings.workspace
        if box is not None and seen.tool is not None and self.state is not State.SAFE_STOP \
                and not ((seen.tool >= box[0]) & (seen.tool <= box[1])).all():
            self._enter(State.SAFE_STOP, f"the tool is at {seen.tool.tolist()}, outside its box {box}", Exit.WORKSPACE)
        if not np.isfinite(seen.values).all():
            return "observation is not finite"
        return self.settings.watchdog.blind(age_s=now - seen.measured_s, unchanged_s=now - self._changed_s)

    def _find_again(self, seen: Observation) -> None:
        try:
            self.safety.reset(seen.position)  # it may have been moved meanwhile
        except ValueError as error:
            raise ConnectionError(f"it is back where it must not be commanded: {error}") from None

    def _think(self, time: float, now: float, lost: str | None) -> None:
        """Take what was decided and ask for what is wanted."""
        self._take(time)
        wanted = lost is None and self.state is not State.SAFE_STOP and self._asked_s is None
        if wanted and self.scheme.wants(time, self._delay):
            assert self._seen is not None
            seen = min(time, (self._seen.measured_s - self._start_s) * self.settings.rate_hz)
            self._asked_s = now
            self.inference.ask(seen, self._history.stacked(), self.scheme.plan(seen, time + self._delay))
            self._take(time)

    def _take(self, time: float) -> None:
        answer = self.inference.answer()
        if answer is None:
            return
        assert self._asked_s is not None
        now = self.clock.now_s()
        self.timing.decisions_s.append(answer.took_s)
        self.timing.delays_s.append(now - self._asked_s)
        self._delay = self.timing.delay_s(self.settings.delay_quantile) * self.settings.rate_hz
        self._asked_s = None
        if answer.error is not None:
            self._miss(f"the policy failed: {answer.error}", Exit.LATE, now)
        elif answer.chunk is not None:
            self.scheme.add(answer.time, answer.chunk, time)
            self._chunk_s = self._start_s + answer.time / self.settings.rate_hz

    def _command(self, wish: Array | None, now: float, lost: str | None) -> Array:
        """What is sent: the wish through ramp and filter, or the way to rest."""
        if self.state is State.SAFE_STOP:
            return self._to_rest()
        pending = None if self._asked_s is None else now - self._asked_s
        late = self.settings.watchdog.late(pending_s=pending)
        if lost is not None:
            self._miss(lost, Exit.BLIND, now)
        elif wish is None and late is None and self.state is State.IDLE and not self.timing.delays_s:
            pass  # the first chunk is on its way
        elif wish is None or late is not None:
            if late is None:
                self._miss(*self._out_of_time(now), now, symptom=True)
            else:
                self._miss(late, Exit.LATE, now)
        elif not np.isfinite(wish).all():
            self._forget()
            self._miss("the policy asked for NaN or infinity", Exit.BAD_ACTION, now)
        else:
            if self.state in (State.IDLE, State.HOLD):
                self._begin = self.safety.position.copy()
                self._enter(State.RAMP_IN, f"back after: {self.reason}" if self.reason else "started", Exit.DONE)
            return self.safety.filter(self._ramped(wish, now))
        return self._to_rest()

    def _out_of_time(self, now: float) -> tuple[str, Exit]:
        """Why no chunk reaches this tick: of the observation's age and the decision's delay the longer is blamed."""
        delay, age = self._delay / self.settings.rate_hz, 0.0 if self._seen is None else now - self._seen.measured_s
        if age > delay:
            return f"no chunk reaches this tick, the observation is {age:.3f} s old", Exit.BLIND
        return f"no chunk reaches this tick, decisions take {delay:.3f} s", Exit.LATE

    def _ramped(self, wish: Array, now: float) -> Array:
        share = 1.0 if self.settings.ramp_s == 0 else (now - self._since_s) / self.settings.ramp_s
        if self.state is State.RAMP_IN and share >= 1:
            self._enter(State.RUNNING, self.reason, Exit.DONE)
        return wish if self.state is State.RUNNING else self._begin + share * (wish - self._begin)

    def _to_rest(self) -> Array:
        if self.settings.rest == "zero":
            return self.safety.filter(np.zeros_like(self.safety.position))
        return self.safety.stop()

    def _miss(self, reason: str, code: Exit, now: float, *, symptom: bool = False) -> None:
        """Hold, or stop for good when the hold has lasted too long; a cause replaces the symptom before it."""
        if self.state in (State.SAFE_STOP, State.FAULT):
            return
        if self.state is not State.HOLD:
            self._forget()
            self.holds += 1
            self._enter(State.HOLD, reason, code)
            self._symptom = symptom
        elif self._symptom and not symptom:
            self.reason, self._exit, self._symptom = reason, code, False
        if self.state is State.HOLD and self.settings.watchdog.expired(held_s=now - self._since_s):
            self._enter(State.SAFE_STOP, f"held for too long: {self.reason}", self._exit)

    def _forget(self) -> None:
        self.scheme.clear()
        self._chunk_s = None

    def _enter(self, state: State, reason: str, code: Exit) -> None:
        self.log.write({"event": "state", "from": self.state.value, "to": state.value, "reason": reason,
                        "time_s": self.clock.now_s()})
        self.state, self.reason, self._exit, self._since_s = state, reason, code, self.clock.now_s()
