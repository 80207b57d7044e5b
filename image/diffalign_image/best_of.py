"""The job that draws several images of a caption and keeps the best: what selection alone reaches, without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.diffusion import ODE, Schedule
from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign_image import pipeline
from diffalign_image.evaluate import Drawn, Evaluation, describe, draw, pick_captions, save_grid, summary
from diffalign_image.pipeline import Parts
from diffalign_image.rewards import AnyReward
from diffalign_image.runs import build_policy, chosen_sampler, record, sized


@spec
class ImageBestOf:
    """Best of n images by a reward, for every n of `candidates`: the model in the run folder `base` is not changed.

    The density of the best of n is at most n times the model's: KL = log n - (n - 1) / n nats for a continuous reward,
    less where images tie.
    """

    type: Literal["image_best_of"] = "image_best_of"
    base: str
    reward: AnyReward
    candidates: tuple[int, ...] = (1, 2, 4, 8, 16)
    schedule: Schedule = Schedule(steps=8)
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        if not self.candidates or any(n < 1 for n in self.candidates) or list(self.candidates) != sorted(
                set(self.candidates)):
            raise ValueError(f"candidates must be increasing numbers of images from 1, got {list(self.candidates)}")

    def train(self, run: Run) -> None:
        """Evaluate every n on the same captions."""
        parts = pipeline.load(self.base)
        for number, n in enumerate(self.candidates):
            result, best = self._best(parts, n, self.evaluation)
            name = "after" if number == len(self.candidates) - 1 else "before" if number == 0 else f"best_of_{n:03d}"
            record(run, name, result, n)
            first = range(0, len(best.captions), self.evaluation.images_per_prompt)[:32]
            save_grid(Drawn(best.images[list(first)], [best.captions[i] for i in first]),
                      run.folder("samples") / f"{name}.png")

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards of the best of the most candidates; episodes = number of images that are kept."""
        chosen_sampler(sampler, stochastic=False)
        return self._best(pipeline.load(self.base), self.candidates[-1], sized(self.evaluation, seed, episodes))[0]

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """A grid of the best of the most candidates."""
        _, best = self._best(pipeline.load(self.base), self.candidates[-1], sized(self.evaluation, seed, count))
        return [save_grid(best, out / f"best_of_{self.candidates[-1]}.png")]

    def _best(self, parts: Parts, n: int, evaluation: Evaluation) -> tuple[dict[str, Any], Drawn]:
        captions = [c for c in pick_captions(evaluation) for _ in range(evaluation.images_per_prompt)]
        policy = build_policy(parts.denoiser, self.schedule, ODE())
        drawn = draw(policy, parts, [c for c in captions for _ in range(n)], seed=evaluation.seed)
        winner = self.reward(drawn.images, drawn.captions).reshape(-1, n).argmax(1) + n * torch.arange(len(captions))
        best = Drawn(drawn.images[winner], captions)
        how = f"best of {n}, {describe(policy)}"
        return {**summary(best, evaluation), "drawn": len(drawn.captions), "sampler": how,
                "kl_nats": math.log(n) - (n - 1) / n}, best
