"""The job that searches the weights of a composition of several image models (GPC)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.diffusion import ODE, Schedule
from diffalign.policy.compose import compose, noise_predictions
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign.train.search import found_weights, search_weights
from diffalign_image import pipeline
from diffalign_image.autoencoder import render_pool
from diffalign_image.evaluate import Evaluation, draw, evaluate
from diffalign_image.model import TextTransformer
from diffalign_image.pipeline import Parts
from diffalign_image.rewards import AnyReward
from diffalign_image.runs import build_policy, chosen_sampler, grid, report, sized
from diffalign_image.shapes import scenes
from diffalign_image.text import encode_captions

_SEARCH_SEED = 7_000  # captions and noise of the search, apart from those of evaluations


@spec
class ImageCompose:
    """A convex composition of the models in the run folders `parents`, which share autoencoder and text encoder.

    Candidate weights (two parents: a grid of `grid` + 1 weights and the closed form, more: `grid` + 1 random ones) draw
    `images` images of training captions; the half with the higher mean reward goes on with twice as many until one is
    left. The winner and every parent are then evaluated alike on held-out captions. No training.
    """

    type: Literal["image_compose"] = "image_compose"
    seed: int = 0
    parents: tuple[str, ...]
    reward: AnyReward
    schedule: Schedule = Schedule(steps=8)
    grid: int = 10
    images: int = 128
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        if len(self.parents) < 2:
            raise ValueError(f"a composition needs at least two parents, got {list(self.parents)}")
        if self.grid < 1 or self.images < 2:
            raise ValueError(f"need grid >= 1 and images >= 2, got {self.grid} and {self.images}")

    def train(self, run: Run) -> None:
        """Screen, search, evaluate on held-out captions, and write composition.json; a finished search is kept."""
        parts, policies = self._parents()
        if not (run.path / "composition.json").is_file():
            run.write_json("composition.json", self._search(run, parts, policies))
        for number, parent in enumerate(policies):
            if not (run.path / f"evaluations/parent_{number}.json").is_file():
                report(run, f"parent_{number}", parent, parts, self.evaluation, number)
        report(run, "after", self._composed(run, policies), parts, self.evaluation, len(policies))

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards of the composition that the search found; episodes = number of images."""
        parts, policies = self._parents()
        chosen = chosen_sampler(sampler, stochastic=False)
        return evaluate(self._composed(run, policies), parts, sized(self.evaluation, seed, episodes), sampler=chosen)

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """Grids of every parent and of the composition, for the same held-out captions and noise."""
        parts, policies = self._parents()
        named = [(f"parent_{i}", policy) for i, policy in enumerate(policies)]
        return [grid(policy, parts, self.evaluation, out, name, seed, count)
                for name, policy in [*named, ("after", self._composed(run, policies))]]

    def _parents(self) -> tuple[Parts, list[DiffusionPolicy]]:
        parts, denoisers = load_parents(self.parents)
        return parts, [build_policy(denoiser, self.schedule, ODE()) for denoiser in denoisers]

    def _search(self, run: Run, parts: Parts, policies: list[DiffusionPolicy]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        data = render_pool(parts.autoencoder, 256, generator)
        cond = encode_captions(parts.tokenizer, parts.text_encoder, data.captions)
        predictions, eps = noise_predictions(policies, data.latents, cond, count=2, generator=generator)
        pool = [scene.caption for scene in scenes("train")]
        tried = 0

        def play(weights: tuple[float, ...], images: int) -> float:
            nonlocal tried
            tried += 1
            picked = torch.Generator().manual_seed(_SEARCH_SEED + self.seed)
            captions = [pool[i] for i in torch.randint(len(pool), (images,), generator=picked).tolist()]
            drawn = draw(compose(policies, weights), parts, captions, seed=_SEARCH_SEED + self.seed)
            score = float(self.reward(drawn.images, captions).mean())
            run.log(tried, {"reward/mean": score, **{f"weight/{i}": w for i, w in enumerate(weights)}})
            return score

        found = search_weights(predictions, eps, play, grid=self.grid, episodes=self.images, generator=generator)
        return {**found, "parents": list(self.parents)}

    def _composed(self, run: Run, policies: list[DiffusionPolicy]) -> DiffusionPolicy:
        return compose(policies, found_weights(run.path))


def load_parents(folders: Sequence[str]) -> tuple[Parts, list[TextTransformer]]:
    """The first model with its text side, and the denoisers of all.

    Raises: ValueError for models whose latents or texts are not in the same space.
    """
    loaded = [pipeline.load(folder) for folder in folders]
    for folder, other in zip(folders[1:], loaded[1:], strict=True):
        for name in ("autoencoder", "text_encoder"):
            mine, theirs = (getattr(parts, name).state_dict() for parts in (loaded[0], other))
            if mine.keys() != theirs.keys() or any(not torch.equal(mine[key], theirs[key]) for key in mine):
                raise ValueError(f"{folder} has another {name} than {folders[0]}: their latents or texts are not in "
                                 "the same space; compose models aligned from one pre-trained model")
    return loaded[0], [parts.denoiser for parts in loaded]
