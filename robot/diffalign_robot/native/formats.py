"""Which program a policy comes from, and policies read from its format."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from diffalign.policy.diffusion import DiffusionPolicy
from diffalign_robot.native import dppo, lerobot, robomimic

FORMATS: dict[str, ModuleType] = {"lerobot": lerobot, "dppo": dppo, "robomimic": robomimic}


def place(text: str) -> tuple[str, Path] | None:
    """(format, path) of `FORMAT:PATH`, None for a text that names none of the formats."""
    name, colon, path = text.partition(":")
    return (name, Path(path)) if colon and name in FORMATS and path else None


def source(text: str) -> tuple[str, Path]:
    """(format, path) of what a robot_import run takes over. Raises: ValueError for a text that names no format."""
    found = place(text)
    if found is None:
        raise ValueError(f"source must be FORMAT:PATH with FORMAT one of {', '.join(FORMATS)}, got {text!r}")
    return found


def read(name: str, path: Path, denoising_steps: int | None = None) -> DiffusionPolicy:
    """The policy at a path. Raises: ValueError for one that cannot be read; ModuleNotFoundError without its extra."""
    policy: DiffusionPolicy = FORMATS[name].read(path, denoising_steps)
    return policy


def copy(name: str, path: Path, to: Path) -> None:
    """Copy the files that make up the policy into the new folder `to`."""
    FORMATS[name].copy(path, to)


def observed(name: str, path: Path) -> tuple[str, ...]:
    """The simulator's names of what the policy sees, in its order; () for a format that does not say them."""
    return robomimic.observed(path) if name == "robomimic" else ()


def kept(run: Path) -> Path:
    """Where a robot_import run keeps the files of the policy that it took over."""
    return run / "native"
