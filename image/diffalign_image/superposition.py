"""The job that draws what several captions, or several models, ask for at once: AND and OR (SuperDiff)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign import choices
from diffalign.diffusion import DDIM, Schedule
from diffalign.diffusion.paths import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.compose import compose
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser, Policy
from diffalign.policy.superpose import Superposition
from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign_image.composition import load_parents
from diffalign_image.evaluate import Drawn, describe, images_of, over_prompts, save_grid
from diffalign_image.pipeline import Parts
from diffalign_image.rewards import AnyReward
from diffalign_image.runs import GRID, build_policy, chosen_sampler, record
from diffalign_image.text import encode_captions


@dataclass(frozen=True)
class Told:
    """A denoiser that is told one of several captions: the leaves `<number>/name` of the condition as `name`."""

    denoiser: Denoiser
    number: int

    @property
    def prediction(self) -> Prediction:
        """That of the denoiser."""
        return self.denoiser.prediction

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser's prediction for its own caption."""
        own = f"{self.number}/"
        return self.denoiser(x, t, {name[len(own):]: leaf for name, leaf in cond.items() if name.startswith(own)})


@spec
class ImageSuperpose:
    """AND: images that every caption of an entry finds equally likely; OR: images of the union of what they ask for.

    captions: entries of P captions. parents: one model for all of them, or P models of one pre-trained one. kernel: a
    step must have noise, whose density the operators compare. The result is beside that of every caption alone and of
    the plain average of the predictions; `together` is the reward's mean over images of its lowest value among the
    captions (AND), or of its highest (OR), `caption_i` its mean for one of them. Nothing is trained.
    """

    type: Literal["image_superpose"] = "image_superpose"
    seed: int = 0
    parents: tuple[str, ...]
    operator: Literal["and", "or"]
    captions: tuple[tuple[str, ...], ...]
    reward: AnyReward
    images: int = 16
    kernel: choices.Kernel = DDIM(eta=1.0)
    schedule: Schedule = Schedule(steps=32)
    gain: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        counts = sorted({len(entry) for entry in self.captions})
        if len(self.captions) < 2 or len(counts) != 1 or counts[0] < 2:
            raise ValueError("captions must be at least two entries of the same number, two or more, of captions; got "
                             f"{len(self.captions)} entries with {counts} captions")
        if len(self.parents) not in (1, counts[0]):
            raise ValueError(f"parents must be one model or one for each of the {counts[0]} captions of an entry, got "
                             f"{len(self.parents)}")
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        if not self.kernel.stochastic:
            raise ValueError(f"kernel {self.kernel} is deterministic and states no density to compare; use ddim with "
                             "eta > 0, or cps")

    def train(self, run: Run) -> None:
        """Draw and score every way of sampling; what is finished is kept."""
        parts, policies = self._policies()
        for number, (name, policy) in enumerate(self._ways(policies)):
            if not (run.path / f"evaluations/{name}.json").is_file():
                drawn = self._draw(policy, parts, self.seed, self.images)
                record(run, name, self._score(drawn, parts, self.seed), number)
                each = max(1, GRID // len(self.captions))
                shown = [i for i in range(len(drawn.captions)) if i % self.images < each]
                save_grid(Drawn(drawn.images[shown], [drawn.captions[i] for i in shown]),
                          run.folder("samples") / f"{name}.png")

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards of the superposition; episodes = number of images."""
        chosen_sampler(sampler or "stochastic", stochastic=True)
        parts, policies = self._policies()
        images = self.images if episodes is None else max(1, episodes // len(self.captions))
        return self._score(self._draw(self._superposed(policies), parts, seed, images), parts, seed)

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """A grid of every way of sampling, from the same noise."""
        parts, policies = self._policies()
        each = max(1, count // len(self.captions))
        return [save_grid(self._draw(policy, parts, seed, each), out / f"{name}.png")
                for name, policy in self._ways(policies)]

    def _policies(self) -> tuple[Parts, list[DiffusionPolicy]]:
        parts, denoisers = load_parents(self.parents)
        told = denoisers * len(self.captions[0]) if len(denoisers) == 1 else denoisers
        policies = [build_policy(denoiser, self.schedule, self.kernel) for denoiser in told]
        return parts, [replace(policy, denoiser=Told(policy.denoiser, i)) for i, policy in enumerate(policies)]

    def _superposed(self, policies: list[DiffusionPolicy]) -> Superposition:
        return Superposition(tuple(policies), self.operator, temperature=self.temperature, gain=self.gain)

    def _ways(self, policies: list[DiffusionPolicy]) -> Iterator[tuple[str, Policy]]:
        yield from ((f"alone_{i}", policy) for i, policy in enumerate(policies))
        yield "average", compose(policies, tuple(1 / len(policies) for _ in policies))
        yield "after", self._superposed(policies)

    def _entries(self, images: int) -> list[tuple[str, ...]]:
        return [entry for entry in self.captions for _ in range(images)]

    def _draw(self, policy: Policy, parts: Parts, seed: int, images: int) -> Drawn:
        """`images` pictures of every entry, in the entries' order."""
        entries = self._entries(images)
        cond = {f"{i}/{name}": leaf for i, captions in enumerate(zip(*entries, strict=True))
                for name, leaf in encode_captions(parts.tokenizer, parts.text_encoder, captions).items()}
        return Drawn(images_of(policy, parts, cond, seed=seed), [f" {self.operator} ".join(entry) for entry in entries])

    def _score(self, drawn: Drawn, parts: Parts, seed: int) -> dict[str, Any]:
        """The rewards of what `_draw` gave."""
        images = len(drawn.captions) // len(self.captions)
        columns = zip(*self._entries(images), strict=True)
        scores = torch.stack([self.reward(drawn.images, captions) for captions in columns], 1)
        together = scores.amin(1) if self.operator == "and" else scores.amax(1)
        named = {"together": together, **{f"caption_{i}": score for i, score in enumerate(scores.T)}}
        return {"rewards": {name: over_prompts(values, images) for name, values in named.items()}, "split": "given",
                "prompts": len(self.captions), "images": len(drawn.captions), "seed": seed,
                "sampler": describe(build_policy(parts.denoiser, self.schedule, self.kernel))}
