"""The job that distils a model into a consistency model, which draws an image in one to four calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.diffusion import ODE, Schedule
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import select_rows
from diffalign.spec import spec
from diffalign.train import checkpoint
from diffalign.train.consistency import Distillation, distill, end_error
from diffalign.train.run import Run
from diffalign.train.supervised import Batch, fresh_state
from diffalign_image import pipeline
from diffalign_image.autoencoder import render_pool
from diffalign_image.evaluate import Evaluation, evaluate, pick_captions
from diffalign_image.pipeline import Parts
from diffalign_image.runs import (
    CONSISTENCY,
    build_policy,
    chosen_sampler,
    drive,
    frozen_denoiser,
    grid,
    newest_checkpoint,
    report,
    require_positive,
    sized,
)
from diffalign_image.text import encode_captions


@spec
class ImageDistill:
    """A consistency student of the model in the run folder `base`, started from it; the text encoder stays frozen.

    It learns on pool_images rendered training images. schedule: its sampler, which noises anew between calls; it is
    evaluated with the step counts of `fewer` too, and before training the teacher is, by teacher_steps steps of its
    ODE with the same shift. Evaluations hold end_error too, the distance in latents of one call from the end of the
    teacher's ODE on the whole grid, from the same noise: a score alone does not tell a student from a blurred mean.
    """

    type: Literal["image_distill"] = "image_distill"
    seed: int = 0
    base: str
    distillation: Distillation
    pool_images: int = 16384
    schedule: Schedule = Schedule(steps=4)
    fewer: tuple[int, ...] = (1, 2)
    teacher_steps: int = 8
    evaluation: Evaluation = Evaluation()
    evaluate_every: int | None = None
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        require_positive(self, "pool_images", "teacher_steps", "evaluate_every", "checkpoint_every")
        if any(not 1 <= steps < self.schedule.steps for steps in self.fewer):
            raise ValueError(f"fewer must be step counts from 1 to below the schedule's {self.schedule.steps}, got "
                             f"{list(self.fewer)}")
        for steps in (self.schedule.steps, *self.fewer):
            self.distillation.times(replace(self.schedule, steps=steps))

    def train(self, run: Run) -> None:
        """Distil or go on; ends with a pipeline folder whose scheduler samples a consistency model."""
        teacher, student, parts = self._models()
        plan = self.distillation.fitting
        state = fresh_state(plan, parts.denoiser, seed=self.seed)

        def report_as(name: str) -> None:
            with state.ema_modules():
                found = {"end_error": self._end_error(teacher, student, parts)}
                if name == "before":
                    report(run, name, teacher, parts, self.evaluation, state.step, extra=found)
                    return
                counts = {f"steps_{steps}": steps for steps in self.fewer} if name == "after" else {}
                for label, steps in {**counts, name: self.schedule.steps}.items():
                    policy = replace(student, schedule=replace(self.schedule, steps=steps))
                    report(run, label, policy, parts, self.evaluation, state.step, sampler="stochastic", extra=found)

        loop = distill(self.distillation, student, teacher, self._batch(parts), state)
        drive(run, state, loop, report_as, iterations=plan.steps, evaluate_every=self.evaluate_every,
              checkpoint_every=self.checkpoint_every)
        with state.ema_modules():
            pipeline.save(parts, run.folder("pipeline"), shift=self.schedule.shift)

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards of the newest student on held-out captions; episodes = number of images."""
        teacher, student, parts = self._models(run)
        chosen = chosen_sampler(sampler or "stochastic", stochastic=True)
        result = evaluate(student, parts, sized(self.evaluation, seed, episodes), sampler=chosen)
        return {**result, "end_error": self._end_error(teacher, student, parts)}

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """Two grids for the same held-out captions and initial noise: the teacher's ODE and the student."""
        teacher, student, parts = self._models(run)
        return [grid(teacher, parts, self.evaluation, out, "before", seed, count),
                grid(student, parts, self.evaluation, out, "after", seed, count, "stochastic")]

    def _models(self, run: Run | None = None) -> tuple[DiffusionPolicy, DiffusionPolicy, Parts]:
        """The frozen teacher, the student (of the run's newest checkpoint) and the student's parts."""
        parts = replace(pipeline.load(self.base), consistency=True)
        longer = replace(self.schedule, steps=self.teacher_steps)
        teacher = build_policy(frozen_denoiser(parts.denoiser), longer, ODE())
        if run is not None:
            checkpoint.load_modules(newest_checkpoint(run), {"policy": parts.denoiser}, prefer_ema=True)
        return teacher, build_policy(parts.denoiser, self.schedule, CONSISTENCY), parts

    def _end_error(self, teacher: DiffusionPolicy, student: DiffusionPolicy, parts: Parts) -> float:
        """Mean of `end_error` over the evaluation's captions, one noise each, against the ODE on the whole grid."""
        cond = encode_captions(parts.tokenizer, parts.text_encoder, pick_captions(self.evaluation))
        finest = replace(teacher, schedule=replace(self.schedule, steps=self.distillation.grid))
        generator = torch.Generator().manual_seed(self.evaluation.seed)
        return float(end_error(student, finest, cond, generator=generator).mean())

    def _batch(self, parts: Parts) -> Batch:
        """Batches of the rendered images and their encoded captions, with replacement."""
        pool = render_pool(parts.autoencoder, self.pool_images, torch.Generator().manual_seed(self.seed))
        cond = encode_captions(parts.tokenizer, parts.text_encoder, pool.captions)
        rows = self.distillation.fitting.batch_size

        def batch(generator: torch.Generator) -> tuple[torch.Tensor, Cond]:
            index = torch.randint(len(pool.latents), (rows,), generator=generator)
            return pool.latents[index], select_rows(cond, index)

        return batch
