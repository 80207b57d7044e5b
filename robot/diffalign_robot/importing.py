"""The job that takes over a policy that another program trained, so that it can be evaluated and fine-tuned."""

from __future__ import annotations

import shutil
from typing import Literal

import torch

from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign.train.supervised import Pretraining, fresh_state
from diffalign_robot.choices import Environment, Robosuite
from diffalign_robot.evaluation import Evaluation, evaluate_and_log, evaluate_run, film, open_env, sample_videos
from diffalign_robot.native import formats
from diffalign_robot.runs import load_policy


@spec
class RobotImport:
    """A policy of another program, `source` FORMAT:PATH, as a run: copied into its folder and evaluated.

    Formats: lerobot (a folder of save_pretrained), dppo (one with state_N.pt, config.yaml and normalization.npz),
    robomimic (a .pth of its train.py).
    denoising_steps: how many its chain takes here, null for its own; `diffalign export --to FORMAT:PATH` writes that
    number back. base: demonstrations in the environment's observations, for algorithms that clone beside improving.
    """

    type: Literal["robot_import"] = "robot_import"
    source: str
    environment: Environment
    denoising_steps: int | None = None
    base: str | None = None
    evaluation: Evaluation = Evaluation()
    num_envs: int = 50
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        formats.source(self.source)
        for name in ("num_envs", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.denoising_steps is not None and self.denoising_steps < 1:
            raise ValueError(f"denoising_steps must be at least 1, got {self.denoising_steps}")

    def train(self, run: Run) -> None:
        """Copy, save as a checkpoint of ours, evaluate."""
        name, path = formats.source(self.source)
        self._check_order(formats.observed(name, path))
        policy = formats.read(name, path, self.denoising_steps)
        env = open_env(self.environment, policy, self.num_envs, self.workers)
        kept, partial = formats.kept(run.path), run.path / ".native.partial"
        if not kept.exists():
            shutil.rmtree(partial, ignore_errors=True)
            formats.copy(name, path, partial)
            partial.rename(kept)
        module = policy.denoiser
        assert isinstance(module, torch.nn.Module)
        run.save(fresh_state(Pretraining(steps=1, ema_decay=None), module, seed=self.seed))
        evaluate_and_log(run, policy, env, self.evaluation, seed=self.seed, step=0, name="after")
        film(run, policy, self.environment, self.evaluation, seed=self.seed, name="after")
        env.close()

    def _check_order(self, keys: tuple[str, ...]) -> None:
        if keys and isinstance(self.environment, Robosuite) and self.environment.keys != keys:
            raise ValueError(f"the policy sees {', '.join(keys)} in this order, the environment shows "
                             f"{', '.join(self.environment.keys)}; set environment.keys to [{', '.join(keys)}]")

    evaluate = evaluate_run
    sample = sample_videos

    def trained_policy(self, run: Run) -> DiffusionPolicy:
        """The imported policy."""
        return load_policy(run.path)
