"""The job that aligns a pre-trained model with a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from diffalign import choices
from diffalign.algorithms import Algorithm
from diffalign.diffusion import CPS, Schedule, TrainedSteps
from diffalign.spec import spec
from diffalign.train.on_policy import optimize
from diffalign.train.run import Run
from diffalign.train.state import TrainState
from diffalign_image.evaluate import Evaluation
from diffalign_image.rewards import AnyReward
from diffalign_image.runs import Models, drive, refuse_critic, require_positive
from diffalign_image.source import training_prompts


@spec
class ImageAlign:
    """Policy optimisation of a pre-trained model on a reward; the text encoder stays frozen.

    base: the run folder of the model to start from, pre-trained or aligned. reference: that of the model against which
    the KL is reported and penalized; null is the base. kernel, schedule and trained are the sampler of the rollouts;
    evaluations sample the ODE on the same schedule. A base that image_distill made is a consistency model: rollouts and
    evaluations alike sample it by kernel {type: cps, noise_level: 1.0} (RLCM). One iteration makes prompts_per_update x
    images_per_prompt images; with shared_noise those of a prompt start from the same noise. steering: hidden widths of
    a network that chooses the initial noise of the frozen model, for noise_ppo; null trains the model itself.
    """

    type: Literal["image_align"] = "image_align"
    seed: int = 0
    base: str
    reference: str | None = None
    algorithm: Algorithm
    reward: AnyReward
    kernel: choices.Kernel = CPS(noise_level=0.8)
    schedule: Schedule = Schedule(steps=8)
    trained: TrainedSteps = TrainedSteps()
    prompts_per_update: int = 16
    images_per_prompt: int = 16
    shared_noise: bool = False
    steering: tuple[int, ...] | None = None
    iterations: int
    evaluation: Evaluation = Evaluation()
    evaluate_every: int | None = None
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        pieces = self.algorithm.compose()
        pieces.require_steering(self.steering)
        if self.steering is not None and self.shared_noise:
            raise ValueError("with steering the initial noise is what is learned: shared_noise must be false")
        refuse_critic(self.algorithm)
        require_positive(self, "iterations", "checkpoint_every", "evaluate_every")

    def train(self, run: Run) -> None:
        """Align or go on, with evaluations on held-out captions before, during and after."""
        models, pieces = self._models(), self.algorithm.compose()
        plan = pieces.optimization
        state = TrainState.create({"policy": models.trained}, {"policy": plan.learning_rate},
                                  weight_decay=plan.weight_decay, ema_decay=plan.ema_decay, seed=self.seed)
        source = training_prompts(models.parts, self.reward, prompts=self.prompts_per_update,
                                  images_per_prompt=self.images_per_prompt, shared_noise=self.shared_noise)
        loop = optimize(pieces, models.policy, source, state, reference=models.reference)
        drive(run, state, loop, lambda name: models.report(run, name, self.evaluation, state),
              iterations=self.iterations, evaluate_every=self.evaluate_every, checkpoint_every=self.checkpoint_every)
        models.save(run, self.schedule, state)

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards and KL of the newest checkpoint on held-out captions; episodes = number of images."""
        return self._models().restore(run).evaluate(self.evaluation, seed=seed, images=episodes, sampler=sampler)

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """Two grids for the same held-out captions and noise: the pre-trained model and the aligned one."""
        return self._models().restore(run).sample(self.evaluation, out, seed=seed, count=count)

    def _models(self) -> Models:
        return Models.load(self.base, self.schedule, self.kernel, self.trained, reference=self.reference,
                           steering=self.steering, seed=self.seed,
                           consistency="gaussian step" in self.algorithm.compose().likelihood.provides)
