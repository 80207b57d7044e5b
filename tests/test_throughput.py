"""scripts/throughput.py: real iterations of a toy recipe beside a program that prints its own."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from toy_env import POINT

from diffalign import config
from diffalign.algorithms import DPPO
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.supervised import Pretraining
from diffalign_robot.choices import ChunkMLP, Gymnasium
from diffalign_robot.demos import Demonstrations
from diffalign_robot.evaluation import Evaluation
from diffalign_robot.jobs import RobotAlign, RobotBC

FILE = Path(__file__).parents[1] / "scripts/throughput.py"
SPEC = importlib.util.spec_from_file_location("throughput", FILE)
throughput = importlib.util.module_from_spec(SPEC)
sys.modules["throughput"] = throughput
SPEC.loader.exec_module(throughput)

PRINTS = """
import json, os
print("starting")
for rollout in (1.0, 3.0, 1.5):
    print(json.dumps({"env_steps": 8, "rollout_s": rollout, "update_s": int(os.environ["OMP_NUM_THREADS"]) / 2}))
"""


@pytest.fixture
def other(tmp_path):
    """A program that says 8 / 1.5, 8 / 3.5 and 8 / 2 steps a second with one thread."""
    (tmp_path / "other.py").write_text(PRINTS)
    return f"{sys.executable} {tmp_path / 'other.py'}"


@pytest.fixture
def recipe(tmp_path):
    """A recipe of three environments that can never succeed: 5 steps of 3 environments an iteration."""
    environment = Gymnasium(id=POINT, horizon=5)
    data = Demonstrations(torch.randn(20, 2), torch.zeros(20, 2), torch.tensor([20]), torch.tensor([1]))
    data.save(tmp_path / "demos", {})
    quick = Evaluation(episodes=2, videos=0)
    clone = RobotBC(base=str(tmp_path / "demos"), environment=environment, network=ChunkMLP(width=8, blocks=1), chunk=2,
                    denoising_steps=2, num_envs=2, workers=1, evaluation=quick,
                    pretraining=Pretraining(steps=1, batch_size=4))
    clone.train(Run.create(tmp_path / "bc", config.dump(clone), resume=False))
    job = RobotAlign(base=str(tmp_path / "bc"), environment=environment, num_envs=3, workers=1,
                     algorithm=DPPO(optimization=Optimization(epochs=1, minibatches=1)))
    (tmp_path / "recipe.yaml").write_text(config.dump(job))
    return str(tmp_path / "recipe.yaml")


def test_a_recipe_beside_another_program(recipe, other, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    words = [recipe, "reward_scale=0.5", "--iterations", "2", "--rounds", "1", "--beside", other, "--json"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words])
    assert throughput.main() == 0
    result = json.loads(capsys.readouterr().out)
    ours, beside = result["ours"], result["beside"]
    assert ours["iterations"] == 2  # three were run, the first is a warm-up
    assert 0 < ours["env_steps"] <= 15
    assert ours["rollout_s"] > 0
    assert ours["update_s"] > 0
    assert beside == {"env_steps_per_s": 4.0, "env_steps": 8, "rollout_s": 1.5, "update_s": 0.5, "iterations": 3}
    assert result["ratio"] == pytest.approx(ours["env_steps_per_s"] / 4)
    assert result["ratio_by_round"] == pytest.approx([result["ratio"]])


def test_the_ratio_is_of_medians_over_all_rounds():
    def rounds(*speeds):
        return [[throughput.Iteration(speed, 0.5, 0.5) for speed in round_] for round_ in speeds]

    result = throughput.summary(rounds([10, 20, 90], [30, 40, 50]), rounds([5, 5], [10, 20]), [1.0, 2.04])
    assert result["ratio"] == pytest.approx(35 / 7.5)
    assert result["ratio_by_round"] == pytest.approx([20 / 5, 40 / 15])
    assert result["load_average"] == [1.0, 2.0]
    assert "ratio 4.67 (by round: 4.00, 2.67)" in throughput.table(result)
    assert "ratio" not in throughput.summary(rounds([10]), [], [1.0])


def test_the_other_program_gets_the_threads(other):
    assert {i.update_s for i in throughput.beside(other, 4)} == {2.0}


def test_refusals(tmp_path, monkeypatch, capsys):
    with pytest.raises(throughput.Failed, match="printed no iteration"):
        throughput.beside("echo hello", 1)
    (tmp_path / "fails.py").write_text("import sys\nprint('no simulator', file=sys.stderr)\nsys.exit(3)\n")
    with pytest.raises(throughput.Failed, match=r"ended with 3:\nno simulator"):
        throughput.beside(f"{sys.executable} {tmp_path / 'fails.py'}", 1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    missing = tmp_path / "missing.yaml"
    monkeypatch.setattr(sys, "argv", ["throughput.py", str(missing)])
    assert throughput.main() == 2
    assert "missing.yaml" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["throughput.py", str(missing), "--rounds", "0"])
    with pytest.raises(SystemExit, match="2"):
        throughput.main()
    assert "must be at least 1, got 4, 0 and 1" in capsys.readouterr().err
