"""The image jobs a YAML can name: pre-training from scratch and alignment of a pre-trained model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffalign import choices
from diffalign.algorithms import Algorithm
from diffalign.diffusion import CPS, ODE, FlowPath, Schedule, TrainedSteps
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser
from diffalign.spec import spec
from diffalign.train import checkpoint
from diffalign.train.on_policy import optimize
from diffalign.train.run import Run
from diffalign.train.state import Iteration, TrainState, frozen_copy
from diffalign.train.supervised import Pretraining, fit
from diffalign_image import pipeline
from diffalign_image.autoencoder import (
    AutoencoderTraining,
    autoencoder_state,
    build_autoencoder,
    freeze,
    render_pool,
    train_autoencoder,
)
from diffalign_image.evaluate import Evaluation, Sampler, draw, evaluate, pick_captions, sampler_policy, save_grid
from diffalign_image.model import JointDenoiser, ShapesModel, TextTransformer, build
from diffalign_image.pipeline import Parts
from diffalign_image.rewards import AnyReward
from diffalign_image.source import training_prompts
from diffalign_image.text import tokenize

_GRID = 32  # pictures in the grids that training writes


@spec
class ImagePretrain:
    """From scratch on captioned shapes: an autoencoder, then flow matching on its latents.

    Text encoder and denoiser learn together. The autoencoder has its own checkpoints in autoencoder/. pool_images:
    rendered images that flow matching draws from. schedule is the sampler of evaluations (ODE).
    """

    type: Literal["image_pretrain"] = "image_pretrain"
    seed: int = 0
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    model: ShapesModel = ShapesModel()
    pretraining: Pretraining
    pool_images: int = 16384
    schedule: Schedule = Schedule(steps=8)
    evaluation: Evaluation = Evaluation()
    log_every: int = 20
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("pool_images", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def train(self, run: Run) -> None:
        """Pre-train or go on, evaluate, write the pipeline folder and a grid of pictures."""
        autoencoder = self._autoencoder(run)
        joint, tokenizer = build(self.model, self.autoencoder.latent_channels, self.seed)
        plan, policy = self.pretraining, _policy(joint, self.schedule, ODE())
        state = TrainState.create({"policy": joint}, {"policy": plan.learning_rate}, weight_decay=plan.weight_decay,
                                  beta2=plan.beta2, ema_decay=plan.ema_decay, seed=self.seed)
        run.restore(state)
        run.total = plan.steps
        pool = render_pool(autoencoder, self.pool_images, torch.Generator().manual_seed(self.seed))
        tokens = tokenize(tokenizer, pool.captions)

        def batch(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            rows = torch.randint(len(tokens), (plan.batch_size,), generator=generator)
            return pool.latents[rows], {"tokens": tokens[rows]}

        self._loop(run, state, fit(plan, policy, batch, state), plan.steps, "train")
        with state.ema_modules():
            parts = Parts(joint.denoiser, autoencoder, joint.text_encoder, tokenizer)
            _report(run, "after", _policy(parts.denoiser, self.schedule, ODE()), parts, self.evaluation, state.step)
            pipeline.save(parts, run.folder("pipeline"), shift=self.schedule.shift)

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards of the newest checkpoint on held-out captions; episodes = number of images."""
        parts = self._parts(run)
        policy = _policy(parts.denoiser, self.schedule, ODE())
        return evaluate(policy, parts, _sized(self.evaluation, seed, episodes),
                        sampler=_sampler(sampler, stochastic=False))

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """A grid of pictures for held-out captions."""
        parts = self._parts(run)
        policy = _policy(parts.denoiser, self.schedule, ODE())
        return [_grid(policy, parts, self.evaluation, out, "samples", seed, count)]

    def _autoencoder(self, run: Run) -> AutoencoderKL:
        """Trained, or gone on with, in the run's autoencoder/ folder."""
        autoencoder = build_autoencoder(self.autoencoder, self.seed)
        state = autoencoder_state(self.autoencoder, autoencoder, self.seed)
        stage = Run(run.folder("autoencoder"), listener=run.listener)
        stage.restore(state)
        stage.total = self.autoencoder.steps
        self._loop(stage, state, train_autoencoder(self.autoencoder, state), stage.total, "autoencoder")
        return freeze(autoencoder)

    def _loop(self, run: Run, state: TrainState, loop: Iterator[Iteration], steps: int, phase: str) -> None:
        for iteration in loop:
            if iteration.step % self.log_every == 0 or iteration.step == steps:
                run.log(iteration.step, iteration.metrics, phase)
            if iteration.step % self.checkpoint_every == 0 or iteration.step == steps:
                run.save(state)

    def _parts(self, run: Run) -> Parts:
        newest = _newest(run)
        joint, tokenizer = build(self.model, self.autoencoder.latent_channels, self.seed)
        checkpoint.load_modules(newest, {"policy": joint}, prefer_ema=True)
        autoencoder = build_autoencoder(self.autoencoder, self.seed)
        checkpoint.load_modules(_newest(Run(run.path / "autoencoder")), {"autoencoder": autoencoder})
        return Parts(joint.denoiser, freeze(autoencoder), joint.text_encoder.eval(), tokenizer)


@dataclass(frozen=True)
class _Models:
    """The trained policy, the text side, and the frozen pre-trained denoiser."""

    policy: DiffusionPolicy
    parts: Parts
    reference: Denoiser


@spec
class ImageAlign:
    """Policy optimisation of a pre-trained model on a reward; the text encoder stays frozen.

    base: the run folder of the model to start from. kernel, schedule and trained are the sampler of the rollouts;
    evaluations sample the ODE on the same schedule. One iteration makes prompts_per_update x images_per_prompt images;
    with shared_noise those of a prompt start from the same noise.
    """

    type: Literal["image_align"] = "image_align"
    seed: int = 0
    base: str
    algorithm: Algorithm
    reward: AnyReward
    kernel: choices.Kernel = CPS(noise_level=0.8)
    schedule: Schedule = Schedule(steps=8)
    trained: TrainedSteps = TrainedSteps()
    prompts_per_update: int = 16
    images_per_prompt: int = 16
    shared_noise: bool = False
    iterations: int
    evaluation: Evaluation = Evaluation()
    evaluate_every: int | None = None
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        if self.algorithm.compose().needs_critic:
            raise ValueError(f"algorithm {self.algorithm.type} needs a value critic, which image jobs do not have; "
                             "use flow_grpo, ddpo or awm, or a group or prompt_running advantage")
        for name in ("iterations", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1 or null, got {self.evaluate_every}")

    def train(self, run: Run) -> None:
        """Align or go on, with evaluations on held-out captions before, during and after."""
        models, pieces = self._models(), self.algorithm.compose()
        plan, net = pieces.optimization, models.parts.denoiser
        state = TrainState.create({"policy": net}, {"policy": plan.learning_rate}, weight_decay=plan.weight_decay,
                                  ema_decay=plan.ema_decay, seed=self.seed)
        source = training_prompts(models.parts, self.reward, prompts=self.prompts_per_update,
                                  images_per_prompt=self.images_per_prompt, shared_noise=self.shared_noise)
        if not run.restore(state):
            self._report(run, "before", models, state)
            run.save(state)
        run.total = self.iterations
        loop = optimize(pieces, models.policy, source, state, reference=models.reference)
        while state.step < self.iterations:
            iteration = next(loop)
            run.log(iteration.step, iteration.metrics)
            if self.evaluate_every and state.step % self.evaluate_every == 0 and state.step < self.iterations:
                self._report(run, f"step_{state.step:06d}", models, state)
            if state.step % self.checkpoint_every == 0 or state.step == self.iterations:
                run.save(state)
        self._report(run, "after", models, state)
        with state.ema_modules():
            pipeline.save(models.parts, run.folder("pipeline"), shift=self.schedule.shift)

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards and KL of the newest checkpoint on held-out captions; episodes = number of images."""
        models = self._trained(run)
        return evaluate(models.policy, models.parts, _sized(self.evaluation, seed, episodes),
                        sampler=_sampler(sampler, stochastic=self.kernel.stochastic), reference=models.reference)

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """Two grids for the same held-out captions and noise: the pre-trained model and the aligned one."""
        models = self._trained(run)
        before = replace(models.policy, denoiser=models.reference)
        return [_grid(policy, models.parts, self.evaluation, out, name, seed, count)
                for name, policy in (("before", before), ("after", models.policy))]

    def _models(self) -> _Models:
        parts = pipeline.load(self.base)
        policy = _policy(parts.denoiser, self.schedule, self.kernel, self.trained)
        return _Models(policy, parts, _frozen(parts.denoiser))

    def _trained(self, run: Run) -> _Models:
        models = self._models()
        checkpoint.load_modules(_newest(run), {"policy": models.parts.denoiser}, prefer_ema=True)
        return models

    def _report(self, run: Run, name: str, models: _Models, state: TrainState) -> None:
        with state.ema_modules():
            _report(run, name, models.policy, models.parts, self.evaluation, state.step, models.reference)


def _policy(denoiser: TextTransformer | JointDenoiser, schedule: Schedule, kernel: choices.Kernel,
            trained: TrainedSteps | None = None) -> DiffusionPolicy:
    return DiffusionPolicy(denoiser, FlowPath(), kernel, schedule, denoiser.event, trained or TrainedSteps())


def _frozen(denoiser: TextTransformer) -> TextTransformer:
    copy = frozen_copy(denoiser)
    assert isinstance(copy, TextTransformer)
    return copy


def _newest(run: Run) -> Path:
    found = checkpoint.latest(run.path / "checkpoints")
    if found is None:
        raise ValueError(f"{run.path} has no checkpoint yet; train it first with "
                         f"`diffalign train {run.path / 'config.yaml'} --run {run.path} --resume`")
    return found


def _report(run: Run, name: str, policy: DiffusionPolicy, parts: Parts, evaluation: Evaluation, step: int,
            reference: Denoiser | None = None) -> None:
    """evaluations/<name>.json, a line of metrics, and samples/<name>.png."""
    result = evaluate(policy, parts, evaluation, reference=reference)
    run.write_json(f"evaluations/{name}.json", {**result, "step": step})
    metrics = {f"{evaluation.split}/{reward}": values["mean"] for reward, values in result["rewards"].items()}
    if "kl_nats" in result:
        metrics["kl_nats"] = result["kl_nats"]
    run.log(step, metrics, phase="eval")
    _grid(policy, parts, evaluation, run.folder("samples"), name, evaluation.seed, _GRID)


def _grid(policy: DiffusionPolicy, parts: Parts, evaluation: Evaluation, folder: Path, name: str, seed: int,
          count: int) -> Path:
    captions = pick_captions(evaluation)
    some = [captions[i % len(captions)] for i in range(count)]
    return save_grid(draw(sampler_policy(policy, "ode"), parts, some, seed=seed), folder / f"{name}.png")


def _sized(evaluation: Evaluation, seed: int, images: int | None) -> Evaluation:
    """The evaluation with another seed, and with about `images` images."""
    if images is None:
        return replace(evaluation, seed=seed)
    return replace(evaluation, seed=seed, prompts=max(2, images // evaluation.images_per_prompt))


def _sampler(name: str | None, *, stochastic: bool) -> Sampler:
    if name in (None, "ode"):
        return "ode"
    if name == "stochastic" and stochastic:
        return "stochastic"
    known = "'ode' or 'stochastic'" if stochastic else "'ode'"
    raise ValueError(f"sampler must be {known} for this run, got {name!r}; zero_noise would make every image of a "
                     "caption the same")


JOBS = (ImagePretrain, ImageAlign)
