"""The run folder, and the intervals that evaluations report."""

from __future__ import annotations

import json
import math
import socket
import time

import pytest
import torch
from scipy import stats
from test_on_policy import setup

from diffalign.cli.writers import open_writers
from diffalign.diffusion import FlowSDE
from diffalign.train.run import Run
from diffalign.train.statistics import mean_interval, wilson

CONFIG = "type: robot_bc\nseed: 0\n"


def steps(run):
    return [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_a_new_folder(tmp_path):
    run = Run.create(tmp_path / "a" / "b", CONFIG, resume=False)
    assert (run.path / "config.yaml").read_text() == CONFIG
    environment = json.loads((run.path / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["cpu_cores"] >= 1
    assert not (run.path / "metrics.jsonl").exists()


def test_metrics_lines_listener_and_writers(tmp_path):
    heard, written = [], []
    run = Run.create(tmp_path / "run", CONFIG, resume=False, listener=lambda *a: heard.append(a),
                     writers=(lambda *a: written.append(a),))
    run.total = 9
    run.log(1, {"loss": 0.5})
    run.log(1, {"success_rate": 1.0}, phase="eval")
    text = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in text] == [{"phase": "train", "step": 1, "loss": 0.5},
                                                   {"phase": "eval", "step": 1, "success_rate": 1.0}]
    assert heard == [(1, {"loss": 0.5}, "train", 9), (1, {"success_rate": 1.0}, "eval", 9)]
    assert written[1] == (1, {"success_rate": 1.0}, "eval")


def test_evaluations_are_stamped_with_the_cpu_seconds_of_all_sessions(tmp_path):
    """A session goes on from the last whole stamp; what it spends is measured against the process's own clock."""
    run = Run.create(tmp_path / "run", CONFIG, resume=False)
    run.log(1, {"loss": 0.5})
    assert not (run.path / "costs.jsonl").exists()
    file, start = run.path / "costs.jsonl", time.process_time()
    while time.process_time() - start < 0.5:
        pass
    run.log(1, {"success_rate": 1.0}, phase="eval")
    first = json.loads(file.read_text())
    assert first["step"] == 1
    assert 0.4 <= first["cpu_s"] <= 0.6 + time.process_time() - start
    file.write_text(json.dumps({"step": 1, "cpu_s": 100.0}) + '\n{"step": 2, "cp')
    again = Run.create(run.path, CONFIG, resume=True)
    again.log(3, {"success_rate": 1.0}, phase="eval")
    stamps = [json.loads(line) for line in file.read_text().splitlines()]
    assert [stamp["step"] for stamp in stamps] == [1, 3]
    assert 100 <= stamps[-1]["cpu_s"] < 100.4


def test_resume_needs_the_same_config(tmp_path):
    path = tmp_path / "run"
    Run.create(path, CONFIG, resume=False)
    with pytest.raises(ValueError, match="already holds a run; add --resume to go on with it"):
        Run.create(path, CONFIG, resume=False)
    Run.create(path, CONFIG, resume=True)
    with pytest.raises(ValueError, match=r"started with another config \('seed: 0' is now 'seed: 1'\)"):
        Run.create(path, CONFIG.replace("0", "1"), resume=True)


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another --run"):
        Run.create(tmp_path, CONFIG, resume=False)


@pytest.mark.parametrize("leftover", [{".config.yaml.partial": "type: ro"}, {"config.yaml": CONFIG},
                                      {"config.yaml": CONFIG, ".environment.json.partial": "{"}], ids=list)
def test_a_folder_killed_while_it_was_made_can_be_used(tmp_path, leftover):
    """SIGKILL at any moment of `create` must not make the same command fail for ever."""
    for name, text in leftover.items():
        (tmp_path / name).write_text(text)
    run = Run.create(tmp_path, CONFIG, resume=True)
    assert (run.path / "config.yaml").read_text() == CONFIG
    assert "torch" in json.loads((run.path / "environment.json").read_text())["packages"]


def test_restore_cuts_the_metrics_after_the_checkpoint(tmp_path):
    """Lines of later steps go, and so does the line that a kill cut short; all phases of earlier steps stay."""
    run = Run.create(tmp_path / "run", CONFIG, resume=False)
    _, state = setup(FlowSDE())
    for step in (1, 2, 3, 4):
        run.log(step, {"loss": 1.0 / step})
        if step == 2:
            run.log(step, {"success_rate": 0.5}, phase="eval")
            state.step = step
            run.save(state)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "step": 1, "lo')
    _, fresh = setup(FlowSDE(), seed=3)
    assert run.restore(fresh)
    assert fresh.step == 2
    assert steps(run) == [1, 2, 2]
    run.log(3, {"loss": 0.1})
    assert steps(run) == [1, 2, 2, 3]


def test_restore_without_a_checkpoint_starts_over(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, resume=False)
    _, state = setup(FlowSDE())
    assert not run.restore(state)
    run.log(1, {"loss": 1.0})
    assert not run.restore(state)
    assert not (run.path / "metrics.jsonl").exists()


def test_saving_keeps_two_and_json_is_replaced(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, resume=False)
    _, state = setup(FlowSDE())
    for state.step in (1, 2, 3):
        run.save(state)
    assert sorted(p.name for p in run.folder("checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    run.write_json("evaluations/before.json", {"success_rate": 0.1})
    target = run.write_json("evaluations/before.json", {"success_rate": 0.2})
    assert json.loads(target.read_text()) == {"success_rate": 0.2}
    assert [p.name for p in target.parent.iterdir()] == ["before.json"]


def test_writers(tmp_path):
    pytest.importorskip("tensorboard")
    (writer,) = open_writers({"tensorboard": ""}, tmp_path)
    writer(1, {"loss": 0.5}, "train")
    assert list((tmp_path / "tensorboard").iterdir())
    with pytest.raises(ValueError, match="unknown logger 'csv'; choose from tensorboard, wandb"):
        open_writers({"csv": ""}, tmp_path)
    with pytest.raises(ValueError, match="mode must be 'online' or 'offline', got 'sometimes'"):
        open_writers({"wandb": "sometimes"}, tmp_path)


def test_tests_cannot_use_the_network():
    with pytest.raises(OSError, match=r"must not use the network, got a connection to 192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (1, 7), (33, 100), (88, 100), (50, 50), (1, 1)])
def test_wilson_equals_scipy(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 10, 31, 32, 60, 500])
def test_mean_interval_equals_scipy(n):
    """Student's t, also beyond the table (n - 1 > 30)."""
    values = [math.sin(7 * i) + 0.1 * i for i in range(n)]
    mean, low, high = mean_interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean == pytest.approx(sum(values) / n)
    assert (high - low) == pytest.approx(expected.high - expected.low, rel=3e-4)
    assert (low + high) / 2 == pytest.approx(mean)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: wilson(5, 4), "need 0 <= successes <= trials and trials > 0, got 5 of 4"),
    (lambda: wilson(0, 0), "got 0 of 0"),
    (lambda: wilson(-1, 3), "got -1 of 3"), (lambda: mean_interval([1.0]), "at least two values, got 1")])
def test_interval_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
