"""The README's Python examples run as they stand and improve what they say they improve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_one_example_for_each_domain():
    assert len(BLOCKS) == 2


def test_image_example_improves_the_reward(capsys):
    exec(compile(BLOCKS[0], "README image example", "exec"), {"__name__": "readme"})
    rewards = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(rewards) == 4
    assert rewards[-1] > 0.5 * rewards[0]


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_robot_example_balances_the_pole(capsys):
    exec(compile(BLOCKS[1], "README robot example", "exec"), {"__name__": "readme"})
    returns = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert returns[-1] > 10 * returns[0]


def test_robot_example_runs_one_iteration(capsys):
    short = BLOCKS[1].replace("count=32", "count=2").replace(", 30):", ", 5):")
    assert short != BLOCKS[1]
    exec(compile(short, "README robot example", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.startswith("5 return")


def test_every_file_and_path_that_the_readme_names_exists():
    root = README.parent
    for name in re.findall(r"`((?:configs|scripts|docs|tests)/[\w/.-]+)`", README.read_text()):
        assert (root / name).exists(), name
