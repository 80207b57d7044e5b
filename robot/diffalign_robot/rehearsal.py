"""An exported controller in the simulator, beside the torch policy that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffalign.diffusion.trajectories import Cond
from diffalign.train import checkpoint
from diffalign.train.run import Run
from diffalign_robot.evaluate import Sampler, describe, evaluation_policy, play, require_episodes, summary
from diffalign_robot.evaluation import open_env
from diffalign_robot.export import ExportableJob
from diffalign_robot.exported import ExportedPolicy
from diffalign_robot.parity import chunks_of

if TYPE_CHECKING:
    from diffalign_controller.policy import Policy


def rehearse(run: Run, job: ExportableJob, folder: Path, *, seed: int, episodes: int | None, sampler: Sampler | None
             ) -> dict[str, Any]:
    """The evaluation of a controller package by the runtime of robots and, as `torch`, that of its run.

    Both play the same episodes with the same noise. same_outcome: how many episodes succeed in both or in none;
    max_abs_difference: between the chunks of both on everything that the controller saw, in robot units. None takes
    the recipe's episodes and sampler.

    Raises: ValueError if the package is damaged, was exported from something else, or its runtime is missing.
    """
    sampler, episodes = sampler or job.evaluation.sampler, episodes or job.evaluation.episodes
    require_episodes(episodes)
    policy = ExportedPolicy(evaluation_policy(job.trained_policy(run), sampler))
    package = open_package(folder)
    name = describe(policy.policy, sampler)
    require_same(package, policy, run, name)
    apart = 0.0

    def by_package(cond: Cond, generator: torch.Generator) -> Tensor:
        nonlocal apart
        obs = cond["obs"]
        noise = policy.draw(len(obs), generator)
        found = torch.from_numpy(chunks_of(policy, lambda inputs: package.chunk_of(
            inputs["obs"][0], {part: values for part, values in inputs.items() if part != "obs"})[None], obs, noise))
        apart = max(apart, float((found - policy(obs, **noise)).abs().max()))
        return found

    def by_torch(cond: Cond, generator: torch.Generator) -> Tensor:
        return policy(cond["obs"], **policy.draw(len(cond["obs"]), generator))

    env = open_env(job.environment, policy.policy, job.num_envs, job.workers)
    try:
        ours, theirs = (play(act, env, seed=seed, episodes=episodes) for act in (by_package, by_torch))
    finally:
        env.close()
    return {**summary(ours, seed=seed, sampler=name), "max_abs_difference": apart,
            "same_outcome": int(np.equal(ours.success, theirs.success).sum()),
            "torch": summary(theirs, seed=seed, sampler=name)}


def open_package(folder: Path) -> Policy:
    """The package in the runtime that a robot uses. Raises: ValueError if it, or the runtime, cannot be used."""
    try:
        from diffalign_controller.policy import Policy
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("diffalign_controller"):
            raise
        raise ValueError("playing a controller needs the runtime of robots; install it with "
                         "`pip install ./robot/controller`") from None
    return Policy(folder)


def require_same(package: Policy, policy: ExportedPolicy, run: Run, sampler: str) -> None:
    """Raises: ValueError if a package was not exported from what is to be played beside it."""
    newest = checkpoint.latest(run.path / "checkpoints")
    wanted = {"sampler": sampler, "checkpoint": newest and newest.name, "inputs": policy.shapes}
    plain = {name: shape for name, shape in package.shapes.items() if name not in ("previous", "weight")}
    said = {"sampler": package.manifest["sampler"], "checkpoint": package.manifest["provenance"]["checkpoint"],
            "inputs": plain}  # without a plan, a package for real-time chunking is the policy
    for name, value in wanted.items():
        if said[name] != value:
            raise ValueError(f"the controller has {name} {said[name]}, the run {value}; export this run again, or give "
                             "the --sampler that it was exported with")
