"""Logs of `diffalign deploy` as demonstrations: what a robot lived through, for the jobs that learn from it.

Legend: T steps of an episode, Do observation features, Da action features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign_controller.log import read
from diffalign_robot.demos import Demonstrations
from diffalign_robot.envs import Array

_ACTING = ("ramp-in", "running")


class Recorded(NamedTuple):
    """An unbroken stretch of a log: obs [T, Do], the action that followed each [T, Da], who acted [T], its success."""

    obs: Array
    action: Array
    intervention: Array
    success: bool


@spec
class RobotRecordings:
    """Log folders of `diffalign deploy` as demonstrations.safetensors in the run folder.

    keep: everything, or only the stretches in which a person acted. success: of an episode as the robot noted it in the
    log, or one label for all, where nobody but you knows. An episode ends where the robot held, where ticks are
    missing, and at the first noted success, after which nothing of that run is kept.
    """

    type: Literal["robot_recordings"] = "robot_recordings"
    logs: tuple[str, ...]
    keep: Literal["all", "interventions"] = "all"
    success: Literal["noted", "yes", "no"] = "noted"
    shortest: int = 2

    def __post_init__(self) -> None:
        if not self.logs:
            raise ValueError("logs must name at least one log folder of `diffalign deploy`, got none")
        if self.shortest < 1:
            raise ValueError(f"shortest must be at least 1 step, got {self.shortest}")

    def train(self, run: Run) -> None:
        """Convert and save. Raises: ValueError if a folder holds no log, or the logs no episode that is to be kept."""
        found: list[Recorded] = []
        for name in self.logs:
            if not Path(name).is_dir():
                raise ValueError(f"logs: {name} does not exist; `diffalign deploy DIR --robot NAME --log {name}` "
                                 "writes one")
            found += episodes(read(Path(name)))
        if self.keep == "interventions":
            found = [part for episode in found for part in interventions(episode)]
        found = [episode for episode in found if len(episode.obs) >= self.shortest]
        if not found:
            what = "episode" if self.keep == "all" else "intervention"
            raise ValueError(f"{', '.join(self.logs)} hold no {what} of at least {self.shortest} steps")
        if self.success != "noted":
            found = [episode._replace(success=self.success == "yes") for episode in found]
        for number, episode in enumerate(found, 1):
            run.log(number, {"success": float(episode.success), "length": float(len(episode.obs)),
                             "intervention_fraction": float(episode.intervention.mean())})
        joined(found).save(run.path, {"logs": [Path(name).name for name in self.logs], "episodes": len(found),
                                      "success_rate": sum(episode.success for episode in found) / len(found)})


def episodes(log: Iterable[Mapping[str, Any]]) -> Iterator[Recorded]:
    """The episodes of a log, see RobotRecordings; the last tick of each has no successor and is left out.

    What was executed after a tick is the person's action if the next tick tells of one, else what the driver says it
    sent, else the command.

    Raises: ValueError for a log at a servo rate.
    """
    ticks: list[Mapping[str, Any]] = []
    succeeded = False
    for record in log:
        if record.get("event") == "start":  # another run
            _require_one_rate(record.get("settings", {}))
            yield from _episode(ticks)
            ticks, succeeded = [], False
        if "tick" not in record or succeeded:
            continue
        acting = record["state"] in _ACTING and record.get("command") is not None and record["obs"] is not None
        if ticks and (not acting or record["tick"] != ticks[-1]["tick"] + 1):
            yield from _episode(ticks)
            ticks = []
        if acting:
            ticks.append(record)
            if record.get("success"):
                yield from _episode(ticks)
                ticks, succeeded = [], True
    yield from _episode(ticks)


def interventions(episode: Recorded) -> Iterator[Recorded]:
    """The stretches of an episode in which a person acted; the last of them may end in its success."""
    edges = np.flatnonzero(np.diff(episode.intervention, prepend=0, append=0))
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        part = slice(start, stop)
        ends = stop == len(episode.obs)
        yield Recorded(episode.obs[part], episode.action[part], episode.intervention[part], episode.success and ends)


def joined(found: list[Recorded]) -> Demonstrations:
    """Demonstrations of these episodes."""
    tagged = np.concatenate([episode.intervention for episode in found])
    return Demonstrations(torch.from_numpy(np.concatenate([episode.obs for episode in found])),
                          torch.from_numpy(np.concatenate([episode.action for episode in found])),
                          torch.tensor([len(episode.obs) for episode in found]),
                          torch.tensor([int(episode.success) for episode in found]),
                          torch.from_numpy(tagged.astype(np.int64)))


def _require_one_rate(settings: Mapping[str, Any]) -> None:
    servo_hz = settings.get("servo_hz")
    if servo_hz is not None and servo_hz != settings["rate_hz"]:
        raise ValueError(f"a log at a servo rate of {servo_hz:g} Hz holds commands between the actions of a policy of "
                         f"{settings['rate_hz']:g} Hz, from which its actions cannot be learned; record without "
                         "--servo-hz")


def _episode(ticks: list[Mapping[str, Any]]) -> Iterator[Recorded]:
    if len(ticks) < 2:
        return
    taken = [_executed(tick, following) for tick, following in pairwise(ticks)]
    yield Recorded(np.array([tick["obs"] for tick in ticks[:-1]], np.float32),
                   np.array([action for action, _ in taken], np.float32),
                   np.array([person for _, person in taken], np.float32), bool(ticks[-1].get("success")))


def _executed(tick: Mapping[str, Any], following: Mapping[str, Any]) -> tuple[list[float], bool]:
    person = following.get("intervention")
    if person is not None:
        return person, True
    return tick.get("sent") or tick["command"], False
