"""A run's policy written back to the format of the program that it was imported from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from diffalign.policy.diffusion import DiffusionPolicy
from diffalign_robot.evaluate import RobotPolicy
from diffalign_robot.native import formats
from diffalign_robot.networks import ChunkDenoiser
from diffalign_robot.runs import config_of

TOLERANCE = 1e-4  # of the actions, where the widest normalized one is 1; float32 keeps it


def origin(run: Path) -> Path:
    """The robot_import run that a run goes back to. Raises: ValueError if there is none."""
    config = config_of(run, "diffalign train CONFIG")
    if config["type"] == "robot_import":
        return run
    if not config.get("base") or not (Path(config["base"]) / "config.yaml").is_file():
        raise ValueError(f"{run} does not go back to a robot_import run: it has no format of another program to be "
                         "written in; export it as a controller package (--to DIR)")
    return origin(Path(config["base"]))


def write(name: str, policy: RobotPolicy, run: Path, to: Path) -> dict[str, Any]:
    """Write a run's policy in the format it was imported from; returns where it is and how far its actions are off.

    Raises: ValueError if it comes from elsewhere, if it is more than a denoiser of that format (a learned start or
    noise, a composition), if `to` is taken, or if the program's own actions from what is written are not ours; nothing
    is left behind then.
    """
    imported = origin(run)
    came, _ = formats.source(config_of(imported, "diffalign train CONFIG")["source"])
    if came != name:
        raise ValueError(f"{run} was imported from {came}, it can be written back as {came}:PATH only, got {name}")
    if not isinstance(policy, DiffusionPolicy) or not isinstance(policy.denoiser, ChunkDenoiser):
        what = type(policy.denoiser if isinstance(policy, DiffusionPolicy) else policy).__name__
        raise ValueError(f"a {what} has no place in a policy of {name}; export the run "
                         "that it improves")
    if to.exists():
        raise ValueError(f"{to} is already there; choose another path")
    partial = to.parent / f".{to.name}.partial"
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    module, normalizer = formats.FORMATS[name], policy.denoiser.observation_normalizer
    generator = torch.Generator().manual_seed(0)
    obs = normalizer.unnormalize(torch.rand(256, len(normalizer.shift), generator=generator) * 2)
    try:
        module.write(policy, formats.kept(imported), partial)
        found = module.difference(policy, partial, obs)
        allowed = TOLERANCE * float(policy.denoiser.action_normalizer.scale.max())
        if not found <= allowed:
            raise ValueError(f"{name}'s own actions from the written policy differ by {found:.3g}, "
                             f"at most {allowed:.3g} is allowed; nothing was written. Please report this as a defect")
        partial.rename(to)
    finally:
        _remove(partial)
    return {"policy": str(to), "format": name, "observations": len(obs), "max_abs_difference": found}


def _remove(path: Path) -> None:
    """Some formats are folders, some are files."""
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
