"""What a robot lived through comes back as demonstrations, with the steps that a person took marked."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from arm_package import write_package
from test_robot_jobs import open_run

from diffalign_controller.deploy import main
from diffalign_controller.log import Log, read
from diffalign_robot.demos import Demonstrations
from diffalign_robot.recordings import RobotRecordings, episodes


def tick(number, obs, *, state="running", **more):
    return {"tick": number, "state": state, "obs": [float(obs)], "command": [obs + 0.5], **more}


LOG = [{"event": "start"}, tick(0, 0, state="idle"), tick(1, 1, state="ramp-in"), tick(2, 2), tick(3, 3),
       tick(4, 4, intervention=[9.0]), tick(5, 5, intervention=[8.0]), tick(6, 6), tick(7, 7, success=True), tick(8, 8),
       tick(9, 9), {"event": "end"}, {"event": "start"}, tick(18, 18), tick(19, 19), tick(21, 21), tick(22, 22),
       tick(23, 23, state="hold"), tick(24, 24), {"event": "end"}, {"event": "start"}, tick(25, 25), tick(26, 26)]


def test_a_log_is_cut_into_episodes_and_each_action_is_what_was_executed_after_its_observation() -> None:
    found = list(episodes(LOG))
    assert [episode.obs[:, 0].tolist() for episode in found] == [[1, 2, 3, 4, 5, 6], [18], [21], [25]]
    assert found[0].action[:, 0].tolist() == [1.5, 2.5, 9.0, 8.0, 5.5, 6.5]  # told by the tick after
    assert found[0].intervention.tolist() == [0, 0, 1, 1, 0, 0]
    assert [episode.success for episode in found] == [True, False, False, False]
    assert next(episodes([tick(0, 0, sent=[7.0]), tick(1, 1)])).action.tolist() == [[7.0]]  # as the driver clipped it


def recorded(tmp_path, log, **changes) -> Demonstrations:
    writer = Log(tmp_path / "log")
    for record in log:
        writer.write(record)
    writer.close()
    job = RobotRecordings(logs=(str(tmp_path / "log"),), **changes)
    job.train(open_run(tmp_path / "run", job))
    return Demonstrations.load(tmp_path / "run")


def test_recordings_are_saved_as_demonstrations(tmp_path) -> None:
    data = recorded(tmp_path, LOG)
    assert data.lengths.tolist() == [6]  # the others are shorter than two steps
    assert data.success.tolist() == [1]
    assert data.intervention is not None
    assert data.intervention.tolist() == [0, 0, 1, 1, 0, 0]
    assert torch.equal(data.successful().intervention, data.intervention)
    said = json.loads((tmp_path / "run" / "demonstrations.json").read_text())
    assert said == {"logs": ["log"], "episodes": 1, "success_rate": 1.0}


def test_only_interventions_and_a_label_of_your_own(tmp_path) -> None:
    data = recorded(tmp_path, LOG, keep="interventions", success="yes")
    assert data.obs[:, 0].tolist() == [3, 4]
    assert data.action[:, 0].tolist() == [9, 8]
    assert data.success.tolist() == [1]


def test_an_intervention_in_the_middle_of_a_success_is_none_itself(tmp_path) -> None:
    assert recorded(tmp_path, LOG, keep="interventions").success.tolist() == [0]


def test_logs_without_anything_to_keep_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="must name at least one"):
        RobotRecordings(logs=())
    with pytest.raises(ValueError, match="at least 1 step"):
        RobotRecordings(logs=("a",), shortest=0)
    job = RobotRecordings(logs=(str(tmp_path / "nowhere"),))
    with pytest.raises(ValueError, match="does not exist; `diffalign deploy"):
        job.train(open_run(tmp_path / "other", job))
    with pytest.raises(ValueError, match="hold no intervention of at least 2 steps"):
        recorded(tmp_path, LOG[:4], keep="interventions")


@pytest.mark.slow
def test_a_person_who_drives_the_twin_of_pick_place_is_recorded(tmp_path, capsys) -> None:
    """The expert acts in the person's place, in real time, while the policy does nothing; the log becomes a success."""
    pytest.importorskip("metaworld")
    package = write_package(tmp_path / "package", (0.0,) * 4, step=0.0, obs_dim=39, reach=1.0)
    manifest = json.loads((package / "manifest.json").read_text())
    manifest |= {"environment": {"type": "metaworld", "task": "pick-place-v3"}, "control_rate_hz": 80.0}
    (package / "manifest.json").write_text(json.dumps(manifest))
    begin = time.monotonic()
    code = main([str(package), "--robot", "twin", "human=0:99", "seed=3", "--seconds", "2.5", "--json", "--max-age",
                 "9", "--max-hold", "9", "--log", str(tmp_path / "log"), "--inference", "inline", "--ramp", "0"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["success"] is True
    assert time.monotonic() - begin > 2.5
    ticks = [record for record in read(tmp_path / "log") if "tick" in record]
    assert np.array(ticks[0]["obs"]).shape == (39,)
    job = RobotRecordings(logs=(str(tmp_path / "log"),), keep="all")
    job.train(open_run(tmp_path / "run", job))
    data = Demonstrations.load(tmp_path / "run")
    assert data.action.shape[1] == 4
    assert data.intervention is not None
    assert data.intervention.float().mean() > 0.8
    assert data.action.abs().max() > 0.5
