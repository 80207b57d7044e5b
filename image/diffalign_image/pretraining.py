"""The job that pre-trains a model from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffalign.diffusion import ODE, Schedule
from diffalign.spec import spec
from diffalign.train import checkpoint
from diffalign.train.run import Run
from diffalign.train.state import Iteration, TrainState
from diffalign.train.supervised import Pretraining, fit, fresh_state
from diffalign_image import pipeline
from diffalign_image.autoencoder import (
    AutoencoderTraining,
    autoencoder_state,
    build_autoencoder,
    freeze,
    render_pool,
    train_autoencoder,
)
from diffalign_image.evaluate import Evaluation, evaluate
from diffalign_image.model import ShapesModel, build
from diffalign_image.pipeline import Parts
from diffalign_image.runs import build_policy, chosen_sampler, grid, newest_checkpoint, report, sized
from diffalign_image.text import tokenize


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
        plan, policy = self.pretraining, build_policy(joint, self.schedule, ODE())
        state = fresh_state(plan, joint, seed=self.seed)
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
            report(run, "after", build_policy(parts.denoiser, self.schedule, ODE()), parts, self.evaluation, state.step)
            pipeline.save(parts, run.folder("pipeline"), shift=self.schedule.shift)

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards of the newest checkpoint on held-out captions; episodes = number of images."""
        parts = self._parts(run)
        policy = build_policy(parts.denoiser, self.schedule, ODE())
        return evaluate(policy, parts, sized(self.evaluation, seed, episodes),
                        sampler=chosen_sampler(sampler, stochastic=False))

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """A grid of pictures for held-out captions."""
        parts = self._parts(run)
        policy = build_policy(parts.denoiser, self.schedule, ODE())
        return [grid(policy, parts, self.evaluation, out, "samples", seed, count)]

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
        newest = newest_checkpoint(run)
        joint, tokenizer = build(self.model, self.autoencoder.latent_channels, self.seed)
        checkpoint.load_modules(newest, {"policy": joint}, prefer_ema=True)
        autoencoder = build_autoencoder(self.autoencoder, self.seed)
        checkpoint.load_modules(newest_checkpoint(Run(run.path / "autoencoder")), {"autoencoder": autoencoder})
        return Parts(joint.denoiser, freeze(autoencoder), joint.text_encoder.eval(), tokenizer)
