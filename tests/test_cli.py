"""The command line: exit codes, messages and JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from diffalign.cli import commands, demo, doctor, inventory, jobs, rendering
from diffalign.cli.errors import paragraph
from diffalign.cli.main import COMMANDS, main
from diffalign.config import ConfigError, dump, load

ROOT = Path(__file__).resolve().parents[1]
DPPO = ROOT / "configs/robot/pick_place_dppo.yaml"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that must end with exit code 2 and one paragraph on stderr."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    return err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"diffalign {name}" in text.partition("example:")[2]
    assert "%%" not in text


@pytest.mark.parametrize(
    "words", [["train"], ["evaluate", "run", "a=b"], ["train", "x.yaml", "--runn", "y"], ["dance"]]
)
def test_wrong_usage_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: diffalign" in capsys.readouterr().err


def test_unknown_key_names_key_closest_and_file(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "train", str(DPPO), "learning_rte=1")
    assert "learning_rte" in text
    assert "learning_rate" in text
    assert "pick_place_dppo.yaml" in text


def test_overrides_may_follow_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "train", str(DPPO), "--run", str(tmp_path / "r"), "learning_rte=1", "--resume", "sed=2")
    assert "learning_rte" in text
    assert "sed" in text
    assert not (tmp_path / "r").exists()


def test_unknown_type_lists_the_types_and_the_closest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("type: robot_bd\n")
    text = refused(capsys, "train", str(file))
    assert "did you mean 'robot_bc'" in text
    assert str(file) in text
    assert all(name in text for names in jobs.JOB_TYPES.values() for name in names)


def test_a_config_without_type_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("seed: 1\n")
    assert "no top-level `type`" in refused(capsys, "train", str(file))


@pytest.mark.parametrize("content", ["- a\n", "a: [1\n", ""])
def test_a_file_that_is_no_mapping_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(content)
    assert str(file) in refused(capsys, "train", str(file))


def test_missing_config_and_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(capsys, "train", str(tmp_path / "none.yaml"))
    assert "does not exist" in refused(capsys, "evaluate", str(tmp_path / "none"))
    text = refused(capsys, "sample", str(tmp_path))
    assert "not a run folder" in text
    assert "diffalign train" in text
    assert "not a run folder" in refused(capsys, "report", str(tmp_path))


def test_missing_base_names_the_command_that_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        str(ROOT / "configs/image/shapes_flow_grpo.yaml"),
        f"base={tmp_path / 'none'}",
        "--run",
        str(tmp_path / "run"),
    ]
    text = refused(capsys, "train", *words)
    assert str(tmp_path / "none") in text
    assert "diffalign train" in text
    assert not (tmp_path / "run").exists()  # or the next attempt would be told to resume


def test_collect_refuses_other_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "robot_collect" in refused(capsys, "collect", str(ROOT / "configs/robot/pick_place_bc.yaml"))


def test_a_folder_with_a_run_needs_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("type: robot_align\n")
    assert "--resume" in refused(capsys, "train", str(DPPO), "--run", str(tmp_path))


def test_resume_with_another_config_names_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, job = jobs.load_job(DPPO, ["seed=3"])
    (tmp_path / "config.yaml").write_text(dump(job))
    text = refused(capsys, "train", str(DPPO), "--run", str(tmp_path), "--resume", "seed=4")
    assert "(seed: 3 -> 4)" in text


def test_threads_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--threads" in refused(capsys, "train", str(DPPO), "--threads", "0")


def test_job_types_are_those_of_the_adapters() -> None:
    for domain, names in jobs.JOB_TYPES.items():
        assert tuple(job.type for job in import_module(f"diffalign_{domain}.jobs").JOBS) == names


def test_list_json_has_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"ddpo", "flow_grpo", "grpo_guard", "dppo", "awm", "nft"} <= found["algorithms"].keys()
    assert {"ddpm", "ddim", "ode", "flow_sde", "dance_sde", "cps"} <= found["kernels"].keys()
    assert {"gae", "group", "leave_one_out", "prompt_running"} <= found["advantages"].keys()
    assert {"jpeg", "verifiable"} <= found["rewards"].keys()
    assert {"environments", "policies", "surrogates", "likelihoods", "paths"} <= found.keys()
    assert all(text for entries in found.values() for text in entries.values())
    assert all(entries for entries in found.values())


def test_list_text_has_a_line_for_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for kind, entries in inventory.inventory().items():
        assert f"{kind}\n" in text
        assert all(f"\n  {name} " in text for name in entries)


def test_doctor_says_what_is_missing_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extras = {"image": ("json",), "robot": ("json", "surely_not_here"), "export": ("this",)}
    monkeypatch.setattr(doctor, "EXTRAS", extras)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == version("torch")
    assert found["extras"]["image"] == {"usable": True}
    assert found["extras"]["robot"]["why"] == "not installed: surely_not_here"
    assert ".[robot]" in found["extras"]["robot"]["fix"]
    assert "robot" in doctor.as_text(found)


def test_doctor_reports_an_import_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('of another version')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor._extra("robot", ("broken_package",))["why"] == "RuntimeError: of another version"


def test_doctor_fails_where_neither_domain_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"image": ("surely_not_here",), "robot": ("surely_not_here",)})
    assert main(["doctor"]) == 1


def test_only_errors_of_our_own_code_are_the_users() -> None:
    def caught(action: object) -> BaseException:
        with pytest.raises(Exception) as info:
            action()  # type: ignore[operator]
        return info.value

    assert paragraph(caught(lambda: load(int, Path("none.yaml"))))
    assert (
        paragraph(caught(lambda: Path("surely/not/here").read_text())) == "No such file or directory: surely/not/here"
    )
    assert paragraph(caught(lambda: json.loads("{"))) is None
    assert paragraph(FloatingPointError("loss is nan")) == "loss is nan"
    assert paragraph(RuntimeError("a bug")) is None
    assert "[robot]" in (paragraph(ModuleNotFoundError("No module named 'mujoco'", name="mujoco.viewer")) or "")
    assert paragraph(ModuleNotFoundError("No module named 'x'", name="x")) is None
    for module, extra in {"lerobot.utils.import_utils": "[lerobot]", "torch.nn": None}.items():
        theirs = caught(lambda module=module: exec("raise ImportError('no av')", {"__name__": module}))
        said = paragraph(theirs)
        assert said is None if extra is None else said and "no av" in said and extra in said


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(inventory, "inventory", broken)
    with pytest.raises(KeyError):
        main(["list"])


def test_traceback_option_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        main(["train", str(tmp_path / "none.yaml"), "--traceback"])


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(file: Path, overrides: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "load_job", interrupted)
    assert main(["train", str(DPPO)]) == 130
    assert "--resume" in capsys.readouterr().err


def test_evaluation_as_text() -> None:
    text = commands.readable(
        {"success_rate": 0.5, "interval": [0.4, 0.6], "rewards": {"a": {"mean": 1.0, "interval": [0, 2.0]}}}
    )
    assert text.splitlines() == ["success_rate  0.5", "interval      [0.4, 0.6]", "rewards.a     1  95% [0, 2]"]


def test_demo_configs_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.configs("robot") == ROOT / "configs"


def test_demo_without_recipes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffalign.__file__", str(tmp_path / "lib" / "diffalign" / "__init__.py"))
    assert str(tmp_path) in refused(capsys, "demo", "robot")


def test_demo_recipes_load_with_their_overrides() -> None:
    for stages in demo.DEMOS.values():
        for number, stage in enumerate(stages):
            base = ["base=runs/x"] if number else []
            jobs.load_job(ROOT / "configs" / stage.config, ["seed=1", *stage.overrides, *base])


def test_python_m_diffalign() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", "evaluate", "nowhere"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "nowhere does not exist" in done.stderr


@pytest.mark.parametrize("chosen", [None, "active"])
def test_torchs_threads_sleep_while_they_wait_unless_the_user_says_otherwise(chosen: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | {"OMP_DISPLAY_ENV": "true"}
    if chosen is not None:
        env["OMP_WAIT_POLICY"] = chosen
    done = subprocess.run([sys.executable, "-c", "import diffalign.cli.main, torch"], capture_output=True, text=True,
                          check=True, env=env)
    assert f"OMP_WAIT_POLICY = '{(chosen or 'passive').upper()}'" in done.stderr


def test_renderer_is_chosen_by_the_library_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, expected in (("EGL", "egl"), ("OSMesa", "osmesa"), ("", "disable")):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
        monkeypatch.delenv("DISPLAY", raising=False)
        monkeypatch.setattr(rendering, "find_library", lambda name, installed=installed: name == installed)
        rendering.choose()
        assert os.environ["MUJOCO_GL"] == expected
        assert os.environ.get("PYOPENGL_PLATFORM", "disable") == expected


def test_the_users_renderer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    rendering.choose()
    assert os.environ["MUJOCO_GL"] == "osmesa"


def test_a_renderer_that_fails_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(rendering, "_PICTURE", "raise RuntimeError('no driver')")
    assert rendering.problem("egl") == "RuntimeError: no driver"
    assert not rendering.works()
    assert os.environ["MUJOCO_GL"] == "disable"


def test_a_reader_who_leaves_is_no_error() -> None:
    """`diffalign list | true`: no traceback."""
    command = f"{sys.executable} -m diffalign list | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)
