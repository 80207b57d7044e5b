"""The job that improves a frozen policy off-policy: steering, residuals, edits, re-ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from diffalign.algorithms import OffPolicyAlgorithm
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.improved import ImprovedPolicy
from diffalign.policy.operators import OnActions
from diffalign.rl.replay import Replay
from diffalign.spec import spec
from diffalign.train import checkpoint, off_policy
from diffalign.train.off_policy_pieces import OffPolicy
from diffalign.train.run import Run
from diffalign.train.state import TrainState
from diffalign_robot.choices import Environment
from diffalign_robot.data.formats import load_demonstrations
from diffalign_robot.evaluate import evaluation_policy
from diffalign_robot.evaluation import Evaluation, evaluate_and_log, evaluate_run, film, open_env, sample_videos
from diffalign_robot.queued import QueuedBase, queued_demonstrations
from diffalign_robot.replay import demonstration_rows, encoded_demonstrations
from diffalign_robot.runs import load_policy, newest_checkpoint
from diffalign_robot.source import EnvSource, chunk_denoiser


@spec
class RobotOffPolicy:
    """Off-policy RL on the frozen policy in the run folder `base`; every iteration is num_envs episodes, then updates.

    demonstrations: run folders whose demonstrations fill the algorithm's demonstration_fraction of every batch.
    online false trains on them alone, without a simulator step. sampler: how the base acts, `stochastic` or `ode`.
    per_step decides once a control step beside the base's queued chunk (ResFiT) instead of once a chunk.
    """

    type: Literal["robot_off_policy"] = "robot_off_policy"
    base: str
    environment: Environment
    algorithm: OffPolicyAlgorithm
    demonstrations: tuple[str, ...] = ()
    online: bool = True
    sampler: Literal["stochastic", "ode"] = "stochastic"
    per_step: bool = False
    iterations: int = 60
    num_envs: int = 10
    workers: int = 1
    reward_scale: float = 1.0
    evaluation: Evaluation = Evaluation()
    save_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "num_envs", "workers", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        pieces = self.algorithm.compose()  # refuses pieces that do not fit
        if not self.online and not self.demonstrations:
            raise ValueError("online: false trains on demonstrations alone and there are none; "
                             "give their run folders or set online: true")
        if self.demonstrations and not pieces.operator.scores_actions:
            raise ValueError("dsrl's sac variant learns the value of initial noise, which demonstrations do not have; "
                             "use variant: na or leave demonstrations out")

        single = isinstance(pieces.operator, OnActions) and pieces.operator.samples == 1
        if self.per_step and self.environment.images is not None:
            raise ValueError("per_step does not see images yet: the queue is filled from numbers; set per_step: false")
        if self.per_step and not single:
            raise ValueError(f"per_step corrects the one action that the base has queued, which {self.algorithm.type} "
                             "does not; use residual, or per_step: false")
        if self.per_step and self.sampler != self.evaluation.sampler:
            raise ValueError(f"per_step queues are filled alike in training and evaluation: set evaluation.sampler to "
                             f"{self.sampler}, got {self.evaluation.sampler}")

    def train(self, run: Run) -> None:
        """Evaluate, improve with evaluations on the way, evaluate and film again."""
        pieces, policy, state = self._build()
        demonstrations = self._demonstrations(policy)
        resumed = run.restore(state)
        run.total = self.iterations
        env = open_env(self.environment, policy, self.num_envs, self.workers)
        if not resumed:
            base = self._base()
            evaluate_and_log(run, base, env, self.evaluation, seed=self.seed, step=0, name="before")
            film(run, base, self.environment, self.evaluation, seed=self.seed, name="before")
        source = EnvSource(env, self.reward_scale) if self.online else None
        loop = off_policy.optimize(pieces, policy, source, state, demonstrations=demonstrations)
        while state.step < self.iterations:
            iteration = next(loop)
            total = state.count("env_steps", iteration.metrics.get("env_steps", 0.0))
            run.log(iteration.step, {**iteration.metrics, "env_steps_total": total})
            last = state.step == self.iterations
            if last or state.step % self.evaluation.every == 0:
                evaluate_and_log(run, policy, env, self.evaluation, seed=self.seed, step=state.step,
                                 name="after" if last else f"step_{state.step:06d}")
            if last or state.step % self.save_every == 0:
                run.save(state)
        film(run, policy, self.environment, self.evaluation, seed=self.seed, name="after")
        env.close()

    evaluate = evaluate_run
    sample = sample_videos

    def _build(self) -> tuple[OffPolicy, ImprovedPolicy, TrainState]:
        pieces = self.algorithm.compose()
        base = self._base()
        observations = chunk_denoiser(base).observation_normalizer
        normalizer = base.normalizer(observations) if isinstance(base, QueuedBase) else observations
        modules = off_policy.build_modules(pieces, base, normalizer, seed=self.seed)
        modules = {"policy": chunk_denoiser(base).requires_grad_(False), **modules}
        return pieces, off_policy.improved_policy(pieces, base, modules), off_policy.build_state(
            pieces, modules, seed=self.seed)

    def _base(self) -> DiffusionPolicy | QueuedBase:
        chunks = evaluation_policy(load_policy(Path(self.base)), self.sampler)
        if chunks.executed is not None:
            raise ValueError(f"{self.base} denoises {chunks.event[0]} actions and executes a part of them, "
                             f"{chunks.executed}: a critic of actions needs all of them; fine-tune it by robot_align")
        return QueuedBase(chunks) if self.per_step else chunks

    def trained_policy(self, run: Run) -> ImprovedPolicy:
        """The frozen base under the newest actor and critic."""
        _, policy, state = self._build()
        checkpoint.load_modules(newest_checkpoint(run.path, "diffalign train CONFIG"), state.modules)
        return policy

    def _demonstrations(self, policy: ImprovedPolicy) -> Replay | None:
        """Demonstrations as transitions; their base signals are drawn once, from the job's seed."""
        if not self.demonstrations:
            return None
        history = chunk_denoiser(policy).history
        data = [load_demonstrations(path, self.environment).with_history(history) for path in self.demonstrations]
        data = [encoded_demonstrations(part, chunk_denoiser(policy)) for part in data]
        generator = torch.Generator().manual_seed(self.seed)
        if isinstance(policy.base, QueuedBase):
            data = [queued_demonstrations(part, policy.base.chunks, generator) for part in data]
        pieces = self.algorithm.compose()
        rows = [demonstration_rows(part, policy, discount=pieces.learning.discount, reward_scale=self.reward_scale,
                                   generator=generator, signals=pieces.uses_signals) for part in data]
        replay = Replay({}, "demonstrations", sum(len(part.reward) for part in rows))
        for part in rows:
            replay.add(part)
        return replay
