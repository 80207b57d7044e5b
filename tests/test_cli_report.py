"""report.html and console progress from the files and numbers of a run."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from diffalign.cli import figures, report
from diffalign.cli.evaluations import Measure, read_evaluations
from diffalign.cli.main import main
from diffalign.cli.progress import ConsoleProgress, duration, key_metrics

# A complete one-pixel PNG.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02fe0def46b8"
    "0000000049454e44ae426082"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished robot alignment run, as its files."""
    folder = tmp_path / "demo-robot"
    for name in ("evaluations", "videos", "samples"):
        (folder / name).mkdir(parents=True)
    base = tmp_path / "demo-robot-bc"
    base.mkdir()
    (base / "config.yaml").write_text("type: robot_bc\n")
    (folder / "config.yaml").write_text(f"type: robot_align\nseed: 5\nbase: {base}\nnote: <script>alert(1)</script>\n")
    lines = [{"phase": "train", "step": step, "reward/mean": step / 9, "loss": 1 / step} for step in range(1, 10)]
    lines.append({"phase": "eval", "step": 9, "success_rate": 0.75})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"phase": "train", "st')
    for name, step, rate in (("before", 0, 0.33), ("step_000005", 5, 0.5), ("after", 9, 0.88)):
        record = {"success_rate": rate, "interval": [rate - 0.1, rate + 0.1], "episodes": 100, "seed": 7, "step": step,
                  "sampler": "ddpm(10 steps, stochastic)"}  # fmt: skip
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(record))
    for name in ("before", "after"):
        (folder / "videos" / f"{name}.mp4").write_bytes(f"movie {name}".encode())
    (folder / "samples" / "step_000005.png").write_bytes(PNG)
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.7", "packages": {"torch": "2.10.0"}}))
    (folder / "finished.json").write_text(json.dumps({"seconds": 200.0, "resumed": False}))
    return folder


def page_of(run: Path) -> str:
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


def test_report_shows_before_and_after(run: Path) -> None:
    page = page_of(run)
    assert "<h2>Before and after</h2>" in page
    before, after = page.index("<figcaption>Before"), page.index("<figcaption>After")
    assert before < after
    assert len(re.findall(r'<video [^>]*src="data:video/mp4;base64,[A-Za-z0-9+/=]+"', page)) == 2
    assert 'src="data:image/png;base64,' in page
    assert "33% &rarr; 88%" in page
    assert "[23%, 43%] &rarr; [78%, 98%]" in page


def test_report_is_complete_and_self_contained(run: Path) -> None:
    page = page_of(run)
    texts = ["seed 5", "3 min 20 s", "9 iterations", "Training curves", "<h2>Evaluations</h2>", "reward/mean"]
    texts += ["ddpm(10 steps, stochastic), episodes 100, seed 7", "torch 2.10.0", 'href="config.yaml"']
    for text in texts:
        assert text in page
    assert 'href="../demo-robot-bc/report.html"' in page
    assert "http" not in page
    assert not re.search(r'(src|href)="(?!data:|config\.yaml|metrics\.jsonl|environment\.json|\.\./)', page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_report_is_well_formed(run: Path) -> None:
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "br", "path", "circle", "polyline"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("path", "circle", "polyline"):
                assert open_tags.pop() == tag

    Checker().feed(page_of(run))
    assert open_tags == []


def test_train_metrics_and_evaluations_are_apart(run: Path) -> None:
    page = page_of(run)
    assert page.count("<h2>Evaluations</h2>") == 1
    assert page.count('aria-label="success_rate"') == 0  # the files of evaluations/ have the intervals as well
    for file in (run / "evaluations").iterdir():
        file.unlink()
    page = page_of(run)
    train, evaluations = page.index("<h2>Training curves</h2>"), page.index("<h2>Evaluations</h2>")
    assert train < page.index('aria-label="loss"') < evaluations < page.index('aria-label="success_rate"')


def test_report_of_a_run_that_just_began(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("type: image_pretrain\n")
    page = page_of(tmp_path)
    assert "not finished" in page
    assert "Before and after" not in page


def test_evaluations_are_ordered_and_read(run: Path) -> None:
    found = read_evaluations(run / "evaluations")
    assert [evaluation.name for evaluation in found] == ["before", "step 000005", "after"]
    assert found[2].measures["success rate"].text() == "88%"


def test_image_evaluations_have_every_reward_and_the_kl(tmp_path: Path) -> None:
    record = {"rewards": {"jpeg_kb": {"mean": 1.25, "interval": [1.2, 1.3]}}, "kl_nats": 3.5, "kl_interval": [3.0, 4.0]}
    (tmp_path / "after.json").write_text(json.dumps(record))
    found = read_evaluations(tmp_path)[0]
    assert found.measures["jpeg kb"] == Measure(1.25, 1.2, 1.3)
    assert found.measures["KL to base (nats)"].interval() == "[3, 4]"


def test_metrics_leave_out_a_line_cut_short(run: Path) -> None:
    assert len(report.read_metrics(run / "metrics.jsonl")) == 10


def test_curves_survive_constant_huge_and_missing_values() -> None:
    for points in ([(1, 2.0)], [(0, 0.0), (1, 0.0)], [(0, 1e12), (5, 3e12)], [(0, float("nan")), (1, 1.0)],
                   [(0, float("inf"))], [(i, i % 7) for i in range(5000)], [(0, -1e-9), (1, 1e-9)]):  # fmt: skip
        drawn = figures.curve([(float(x), float(y)) for x, y in points], 'a "<b>"')
        assert "nan" not in drawn.replace("a &quot;", "")
        assert "inf" not in drawn.replace("finite", "")
        assert len(drawn) < 20_000
        assert "&lt;b&gt;" in drawn


def test_ticks_are_round_and_inside() -> None:
    assert figures.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert figures.ticks(-3.0, 27.0) == pytest.approx([0, 10, 20])


def test_running_mean() -> None:
    assert figures.running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_plain_progress_prints_rate_time_left_and_key_metrics() -> None:
    out = io.StringIO()
    with ConsoleProgress("bc", seconds_between_lines=0.0, console=Console(file=out, width=200)) as progress:
        progress(1, {"loss": 0.5, "grad_norm/policy": 2.0}, "train", 10)
        progress(2, {"loss": 0.25, "grad_norm/policy": 2.0}, "train", 10)
        progress(2, {"success_rate": 0.5}, "eval", 10)
    lines = out.getvalue().splitlines()
    assert lines[0] == "bc: step 1/10; loss 0.5  grad_norm/policy 2"
    assert re.fullmatch(r"bc: step 2/10, [\d.]+ (steps/s|s/step), \d+ .*left; loss 0.25  grad_norm/policy 2", lines[1])
    assert lines[2] == "bc: eval at step 2: success_rate 0.5"
    assert lines[3].startswith("bc: done in ")


def test_plain_progress_waits_between_lines() -> None:
    out = io.StringIO()
    with ConsoleProgress("bc", console=Console(file=out, width=200)) as progress:
        for step in range(1, 100):
            progress(step, {"loss": 0.5}, "train", None)
    assert len(out.getvalue().splitlines()) == 2


def test_terminal_progress_shows_a_bar() -> None:
    out = io.StringIO()
    with ConsoleProgress("bc", console=Console(file=out, width=160, force_terminal=True)) as progress:
        progress(5, {"loss": 0.5}, "train", 10)
    assert "5/10" in out.getvalue()


def test_duration_and_key_metrics() -> None:
    assert [duration(s) for s in (12.4, 200.0, 3900.0)] == ["12 s", "3 min 20 s", "1 h 05 min"]
    assert key_metrics({"x": 1.0, "loss": 2.0}, 1) == "loss 2"
