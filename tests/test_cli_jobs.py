"""The robot recipes through the command line, end to end at the smallest size that still runs every part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.cli import demo
from diffalign.cli.main import main

# Meta-World's scripted experts warn that they clip; that is how they are.
pytestmark = pytest.mark.filterwarnings("ignore:Constant.s. may be too high")

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ["environment.horizon=20"]
POLICY = ["num_envs=2", "workers=1", "evaluation.episodes=2", "evaluation.videos=0"]
TINY = {
    "collect": [*ENVIRONMENT, "episodes=2"],
    "bc": [*ENVIRONMENT, *POLICY, "network.width=16", "pretraining.steps=4", "pretraining.batch_size=8"],
    "dppo": [*ENVIRONMENT, *POLICY, "iterations=2", "save_every=1", "evaluation.every=1",
             "algorithm.optimization.epochs=1", "algorithm.optimization.minibatches=1"],
}  # fmt: skip


def train(name: str, folder: Path, *words: str) -> int:
    command = "collect" if name == "collect" else "train"
    config = ROOT / f"configs/robot/pick_place_{name}.yaml"
    return main([command, str(config), "--run", str(folder), *TINY[name], *words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """collect -> bc -> dppo."""
    out = tmp_path_factory.mktemp("runs")
    assert train("collect", out / "collect") == 0
    assert train("bc", out / "bc", f"base={out / 'collect'}") == 0
    assert train("dppo", out / "dppo", f"base={out / 'bc'}") == 0
    return out


def test_every_run_folder_is_complete(runs: Path) -> None:
    for name in ("collect", "bc", "dppo"):
        for file in ("config.yaml", "metrics.jsonl", "environment.json", "report.html"):
            assert (runs / name / file).is_file(), f"{name}/{file}"
    page = (runs / "dppo/report.html").read_text()
    assert "<td>before</td>" in page
    assert "<td>after</td>" in page
    assert "&rarr;" in page


def test_evaluate_prints_one_json_object(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert (
        main(["evaluate", str(runs / "dppo"), "--seed", "3", "--episodes", "2", "--sampler", "zero_noise", "--json"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["episodes"] == 2
    assert result["seed"] == 3
    assert "zero noise" in result["sampler"]
    low, high = result["interval"]
    assert 0 <= low <= result["success_rate"] <= high + 1e-9


def test_a_collection_has_nothing_to_evaluate(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(runs / "collect")]) == 2
    assert "holds no policy" in capsys.readouterr().err


def test_a_finished_run_resumes_to_itself(runs: Path) -> None:
    before = (runs / "dppo/metrics.jsonl").read_text()
    assert train("dppo", runs / "dppo", f"base={runs / 'bc'}", "--resume") == 0
    assert (runs / "dppo/metrics.jsonl").read_text() == before
    assert json.loads((runs / "dppo/finished.json").read_text())["resumed"]


def test_demo_runs_every_stage_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = zip(demo.DEMOS["robot"], TINY.values(), strict=True)
    tiny = [demo.Stage(stage.config, stage.suffix, stage.what, tuple(overrides)) for stage, overrides in stages]
    monkeypatch.setitem(demo.DEMOS, "robot", tuple(tiny))
    monkeypatch.setattr("diffalign.cli.rendering.works", lambda: False)
    words = ["demo", "robot", "--out", str(tmp_path), "--seed", "2"]
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-robot", "demo-robot-bc", "demo-robot-collect"]
    assert "seed 2" in (tmp_path / "demo-robot/report.html").read_text()
    assert "no videos" in capsys.readouterr().err
    assert main(words) == 0
    assert capsys.readouterr().err.count("already done") == 3
    assert main([*words[:-1], "3"]) == 2
    assert "(seed: 2 -> 3)" in capsys.readouterr().err


def test_the_image_demo_ends_in_grids_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["evaluation.prompts=2", "evaluation.images_per_prompt=1", "evaluation.kl_images=2", "schedule.steps=2"]
    pretrain = ["pretraining.steps=2", "pretraining.batch_size=2", "model.width=32", "autoencoder.steps=2",
                "pool_images=8"]
    align = ["iterations=1", "prompts_per_update=2", "images_per_prompt=2", "trained={}", "evaluate_every=null"]
    stages = zip(demo.DEMOS["image"], (pretrain, align), strict=True)
    tiny = [demo.Stage(stage.config, stage.suffix, stage.what, (*small, *more)) for stage, more in stages]
    monkeypatch.setitem(demo.DEMOS, "image", tuple(tiny))
    assert main(["demo", "image", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "demo-image/report.html").read_text()
    assert page.index("<figcaption>Before") < page.index("<figcaption>After")
    assert page.count("data:image/png;base64,") == 2
    assert 'href="../demo-image-pretrain/report.html"' in page
    assert "KL to base (nats)" in page
