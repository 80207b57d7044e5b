"""The job that learns from successful demonstrations against the policy's own earlier samples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from diffalign.algorithms import PreferenceAlgorithm
from diffalign.diffusion import DDPM
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.spec import spec
from diffalign.train.preferences import Pairs, prefer
from diffalign.train.run import Run
from diffalign.train.supervised import Batch, fresh_state
from diffalign_robot.choices import Environment
from diffalign_robot.cloning import batches_for
from diffalign_robot.data.formats import load_demonstrations
from diffalign_robot.evaluation import Evaluation, evaluate_and_log, evaluate_run, film, open_env, sample_videos
from diffalign_robot.runs import load_policy
from diffalign_robot.source import chunk_denoiser


@spec
class RobotPreference:
    """Preference learning (SePPO) from the policy in the run folder `base`; winners are successful episodes' chunks.

    demonstrations: run folders with recorded episodes, of which the failed ones are left out. No simulator step is
    taken but for evaluations.
    """

    type: Literal["robot_preference"] = "robot_preference"
    base: str
    demonstrations: tuple[str, ...]
    environment: Environment
    algorithm: PreferenceAlgorithm
    evaluation: Evaluation = Evaluation()
    num_envs: int = 50
    workers: int = 1
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_envs", "workers", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.demonstrations:
            raise ValueError("demonstrations must name at least one run folder with recorded episodes, got none")
        if self.algorithm.compose().opponent == "given":
            raise ValueError(f"algorithm {self.algorithm.type} needs losers for the same observations, which "
                             "demonstrations do not have; use seppo")

    def train(self, run: Run) -> None:
        """Learn or go on, with evaluations before, during and after."""
        policy, pieces = load_policy(Path(self.base)), self.algorithm.compose()
        plan = pieces.fitting
        env = open_env(self.environment, policy, self.num_envs, self.workers)
        batch = self._winners(policy)
        state = fresh_state(plan, chunk_denoiser(policy), seed=self.seed)
        if not run.restore(state):
            evaluate_and_log(run, policy, env, self.evaluation, seed=self.seed, step=0, name="before")
            film(run, policy, self.environment, self.evaluation, seed=self.seed, name="before")
        run.total = plan.steps

        def pairs(generator: torch.Generator) -> Pairs:
            chunk, cond = batch(generator)
            return Pairs(chunk, None, cond)

        for iteration in prefer(pieces, policy.with_sampler(DDPM()), pairs, state):
            last = iteration.step == plan.steps
            if iteration.step % 50 == 0 or last:
                run.log(iteration.step, iteration.metrics)
            if last or iteration.step % self.evaluation.every == 0:
                with state.ema_modules():
                    evaluate_and_log(run, policy, env, self.evaluation, seed=self.seed, step=iteration.step,
                                     name="after" if last else f"step_{iteration.step:06d}")
            if last or iteration.step % self.save_every == 0:
                run.save(state)
        with state.ema_modules():
            film(run, policy, self.environment, self.evaluation, seed=self.seed, name="after")
        env.close()

    evaluate = evaluate_run
    sample = sample_videos

    def trained_policy(self, run: Run) -> DiffusionPolicy:
        """The averaged policy of the newest checkpoint."""
        return load_policy(run.path)

    def _winners(self, policy: DiffusionPolicy) -> Batch:
        data = [load_demonstrations(path, self.environment).successful() for path in self.demonstrations]
        return batches_for(policy, data, self.algorithm.compose().fitting.batch_size)
