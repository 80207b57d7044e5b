"""The job that fine-tunes a cloned policy by reinforcement learning in its environment."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch

from diffalign.algorithms import Algorithm, ReinFlow
from diffalign.choices import Kernel
from diffalign.diffusion import DDPM, NoisyODE, TrainedSteps
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.injection import NoisyDenoiser
from diffalign.policy.protocols import Denoiser
from diffalign.rl.critics import ValueNet
from diffalign.spec import spec
from diffalign.train.on_policy import OnPolicy, optimize
from diffalign.train.run import Run
from diffalign.train.state import TrainState, frozen_copy
from diffalign.train.supervised import Batch
from diffalign_robot.choices import Environment
from diffalign_robot.cloning import batches_for
from diffalign_robot.data.formats import load_demonstrations
from diffalign_robot.evaluation import Evaluation, evaluate_and_log, evaluate_run, film, open_env, sample_videos
from diffalign_robot.runs import add_noise, config_of, load_policy, steer
from diffalign_robot.source import EnvSource, chunk_denoiser
from diffalign_robot.vector import VectorEnv
from diffalign_robot.vision import VisionValue


@spec
class Exploration:
    """How rollouts sample: the kernel (its min_std explores) and the trained denoising steps."""

    kernel: Kernel = DDPM(min_std=0.1)
    trained: TrainedSteps = TrainedSteps()


@spec
class RobotAlign:
    """RL fine-tuning of the policy in the run folder `base`, one episode per environment and iteration.

    steering: hidden widths of a network that chooses the initial noise of the frozen base, for noise_ppo; null trains
    the base itself. noise: hidden widths of a network that learns how much noise the noisy_ode kernel injects, for
    reinflow. group: environments that start from the same seed, for advantages against a group. encoder: of a base
    that sees images, trained with the rest, or frozen: then rollouts hold its features and not the images.
    """

    type: Literal["robot_align"] = "robot_align"
    base: str
    environment: Environment
    algorithm: Algorithm
    exploration: Exploration = Exploration()
    iterations: int = 40
    num_envs: int = 50
    workers: int = 2
    reward_scale: float = 1.0
    critic_hidden: tuple[int, ...] = (256, 256)
    steering: tuple[int, ...] | None = None
    noise: tuple[int, ...] | None = None
    group: int = 1
    encoder: Literal["trained", "frozen"] = "trained"
    evaluation: Evaluation = Evaluation()
    save_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "num_envs", "workers", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.algorithm.compose().require_steering(self.steering)
        if self.group < 1 or self.num_envs % self.group:
            raise ValueError(f"group must divide num_envs={self.num_envs}, got {self.group}")
        if self.noise is not None and (self.steering is not None or not isinstance(self.exploration.kernel, NoisyODE)):
            raise ValueError("a learned noise needs the noisy_ode kernel and no steering, got "
                             f"{self.exploration.kernel} and steering={self.steering}")
        if self.encoder == "frozen" and self.environment.images is None:
            raise ValueError("encoder: frozen is for a policy that sees images, but environment.images is not set")
        if isinstance(self.algorithm, ReinFlow) and self.noise is None:
            raise ValueError("reinflow learns the noise of its steps: set noise to the hidden widths of its network, "
                             "e.g. [64, 64], and exploration.kernel to noisy_ode")

    def train(self, run: Run) -> None:
        """Evaluate, fine-tune with evaluations on the way, evaluate and film again."""
        policy, pieces, state = self._build()
        reference = cast(Denoiser, frozen_copy(state.modules["policy"])) if pieces.needs_reference else None
        demonstrations = self._demonstrations(pieces, policy)
        run.restore(state)
        run.total = self.iterations
        env = open_env(self.environment, policy, self.num_envs, self.workers)
        if state.step == 0:
            evaluate_and_log(run, policy, env, self.evaluation, seed=self.seed, step=0, name="before")
            film(run, policy, self.environment, self.evaluation, seed=self.seed, name="before")
        loop = optimize(pieces, policy, EnvSource(env, self.reward_scale, self.group), state, reference=reference,
                        demonstrations=demonstrations)
        while state.step < self.iterations:
            self._narrow(policy, state)
            start = time.perf_counter()
            iteration = next(loop)
            updating = time.perf_counter() - start - iteration.metrics["time/rollout"]
            total = state.count("env_steps", iteration.metrics["env_steps"])
            run.log(iteration.step, {**iteration.metrics, "time/update": updating, "env_steps_total": total})
            self._evaluate_if_due(run, policy, env, state)
            if iteration.step % self.save_every == 0 or iteration.step == self.iterations:
                run.save(state)
        with state.ema_modules():
            film(run, policy, self.environment, self.evaluation, seed=self.seed, name="after")
        env.close()

    def _narrow(self, policy: DiffusionPolicy, state: TrainState) -> None:
        denoiser: object = policy.denoiser
        if isinstance(denoiser, NoisyDenoiser) and isinstance(policy.kernel, NoisyODE):
            denoiser.narrow(policy.kernel, state.step / self.iterations)

    def _evaluate_if_due(self, run: Run, policy: DiffusionPolicy, env: VectorEnv, state: TrainState) -> None:
        last = state.step == self.iterations
        if last or state.step % self.evaluation.every == 0:
            with state.ema_modules():
                evaluate_and_log(run, policy, env, self.evaluation, seed=self.seed, step=state.step,
                                 name="after" if last else f"step_{state.step:06d}")

    evaluate = evaluate_run
    sample = sample_videos

    def trained_policy(self, run: Run) -> DiffusionPolicy:
        """The averaged policy of the newest checkpoint."""
        return replace(load_policy(run.path), kernel=self.exploration.kernel)

    def _build(self) -> tuple[DiffusionPolicy, OnPolicy, TrainState]:
        pieces = self.algorithm.compose()
        policy = replace(load_policy(Path(self.base)), kernel=self.exploration.kernel, trained=self.exploration.trained)
        network = chunk_denoiser(policy)
        if self.encoder == "frozen" and network.encoder is not None:
            network.encoder.requires_grad_(False)
        if self.steering is not None:
            policy = steer(policy, self.steering, seed=self.seed)
        if self.noise is not None:
            policy = add_noise(policy, self.noise, seed=self.seed)
        modules: dict[str, torch.nn.Module] = {"policy": cast(torch.nn.Module, policy.denoiser)}
        plan = pieces.optimization
        rates = {"policy": plan.learning_rate}
        if pieces.needs_critic:
            rates["critic"] = plan.critic_learning_rate
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                features = len(network.observation_normalizer.shift)
                value = ValueNet(features, self.critic_hidden, normalizer=network.observation_normalizer)
            own = None if network.frozen_encoder else copy.deepcopy(network.encoder)
            modules["critic"] = value if own is None else VisionValue(own, value)
        state = TrainState.create(modules, rates, weight_decay=plan.weight_decay, ema_decay=plan.ema_decay,
                                  seed=self.seed)
        return policy, pieces, state

    def _demonstrations(self, pieces: OnPolicy, policy: DiffusionPolicy) -> Batch | None:
        if not pieces.behavior_cloning:
            return None
        source = config_of(Path(self.base), "diffalign train")["base"]
        if source is None:
            raise ValueError(f"a term of behaviour cloning needs demonstrations, and {self.base} names none; import "
                             "it again with base: the run folder or data set of its demonstrations")
        return batches_for(policy, [load_demonstrations(str(source), self.environment)], 256)
