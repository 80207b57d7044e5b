"""What is installed, what it drags in, and what the set-up pins."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OURS = {"diffalign", "diffalign_controller", "diffalign_image", "diffalign_robot"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


PYTHONS = ("3.11", "3.12")


def lines() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def constraints(python: str) -> dict[str, str]:
    pins = [pin for pin in map(Requirement, lines()) if applies(pin, python)]
    assert len({pin.name for pin in pins}) == len(pins)
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}


def test_nothing_named_robot_or_image_is_installed() -> None:
    for name in ("robot", "image"):
        assert "diffalign" not in packages_distributions().get(name, [])
        spec = find_spec(name)  # from the checkout a folder without __init__.py is at most a namespace
        assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents


def test_only_our_packages_are_declared() -> None:
    tops = distribution("diffalign").read_text("top_level.txt")
    assert tops is not None
    assert set(tops.split()) == OURS


@pytest.mark.parametrize("folder", ["robot", "image"])
def test_container_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert [path.name for path in (ROOT / folder).iterdir() if (path / "py.typed").is_file()] == [f"diffalign_{folder}"]


def test_packages_are_typed() -> None:
    for package in ("diffalign", "robot/diffalign_robot", "image/diffalign_image"):
        assert (ROOT / package / "py.typed").is_file()


def test_package_data_covers_every_file_that_is_read_at_run_time() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for package in ("diffalign", "robot/diffalign_robot", "image/diffalign_image"):
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert any(file.match(pattern) for pattern in patterns), f"{file} would not be installed"


def test_constraints_are_plain_exact_versions() -> None:
    python = r"( ; python_version (<|>=) '3\.12')?"
    assert all(re.fullmatch(rf"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*{python}", line) for line in lines())
    assert "//" not in (ROOT / "constraints.txt").read_text()
    assert constraints("3.11").keys() == constraints("3.12").keys() == {line.partition("==")[0] for line in lines()}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_meet_every_declared_requirement(python: str) -> None:
    pinned = constraints(python)
    texts = [*PROJECT["dependencies"], *(text for texts in EXTRAS.values() for text in texts)]
    for requirement in map(Requirement, texts):
        if requirement.name != "diffalign" and applies(requirement, python):
            assert requirement.specifier.contains(Version(pinned[requirement.name.lower()])), requirement


def test_extras_are_the_documented_ones() -> None:
    assert {"image", "robot", "lerobot", "export", "dev", "all"} <= EXTRAS.keys()


def imported(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split())


def test_the_command_line_starts_light() -> None:
    heavy = {"torch", "numpy", "pydantic", "rich", "diffusers", "transformers", "mujoco", "gymnasium", "metaworld"}
    assert not imported("import diffalign.cli.main as m; m.build_parser()") & (heavy | OURS - {"diffalign"})


def test_the_core_imports_no_adapter_library() -> None:
    code = "import diffalign.algorithms, diffalign.train.on_policy, diffalign.train.run, diffalign.config"
    assert not imported(code) & (
        {"diffusers", "transformers", "mujoco", "gymnasium", "metaworld"} | OURS - {"diffalign"}
    )


def test_an_adapter_does_not_load_the_other_ones_libraries() -> None:
    image = "from diffalign.cli.jobs import load_job; from pathlib import Path\n"
    image += "load_job(Path('configs/image/shapes_pretrain.yaml'), [])"
    assert not imported(image) & {"mujoco", "gymnasium", "metaworld", "diffalign_robot"}
    robot = image.replace("image/shapes_pretrain", "robot/pick_place_bc")
    assert not imported(robot) & {"diffusers", "transformers", "diffalign_image"}
