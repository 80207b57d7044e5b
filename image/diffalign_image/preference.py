"""The job that learns from winners, or from winners and losers, without a reward in the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from diffalign import choices
from diffalign.algorithms import PreferenceAlgorithm
from diffalign.diffusion import CPS, ODE, Schedule
from diffalign.policy.protocols import select_rows
from diffalign.spec import spec
from diffalign.train.preferences import Pairs, prefer
from diffalign.train.run import Run
from diffalign.train.supervised import fresh_state
from diffalign_image.autoencoder import decode_latents, render_pool
from diffalign_image.evaluate import Evaluation
from diffalign_image.rewards import AnyReward
from diffalign_image.runs import Models, drive, require_positive
from diffalign_image.shapes import scenes
from diffalign_image.text import encode_captions

_BLOCK = 256


@spec
class Renders:
    """Winners only: correct renderings of random training captions."""

    type: Literal["renders"] = "renders"
    images: int = 4096


@spec
class BestAndWorst:
    """Pairs: of samples_per_prompt images of the base model the best and the worst by a reward, for random captions."""

    type: Literal["best_and_worst"] = "best_and_worst"
    reward: AnyReward
    prompts: int = 512
    samples_per_prompt: int = 8


@spec
class ImagePreference:
    """Preference learning from the model in the run folder `base`; the text encoder stays frozen.

    data are made once, before training. kernel and schedule are those of evaluations. opponents: the ODE steps of a
    sampled opponent (None: the schedule's); few leave errors, which the loss then unlearns before the faults.
    """

    type: Literal["image_preference"] = "image_preference"
    seed: int = 0
    base: str
    algorithm: PreferenceAlgorithm
    data: Annotated[Renders | BestAndWorst, Field(discriminator="type")]
    kernel: choices.Kernel = CPS(noise_level=0.8)
    schedule: Schedule = Schedule(steps=8)
    opponents: Schedule | None = None
    evaluation: Evaluation = Evaluation()
    evaluate_every: int | None = None
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if self.algorithm.compose().opponent == "given" and isinstance(self.data, Renders):
            raise ValueError(f"algorithm {self.algorithm.type} needs losers, which data of type renders have not; "
                             "use data of type best_and_worst, or seppo")
        require_positive(self, "evaluate_every", "checkpoint_every")

    def train(self, run: Run) -> None:
        """Learn or go on, with evaluations on held-out captions before, during and after."""
        models, pieces = self._models(), self.algorithm.compose()
        state = fresh_state(pieces.fitting, models.parts.denoiser, seed=self.seed)
        policy = replace(models.policy.with_sampler(ODE()), schedule=self.opponents or self.schedule)
        drive(run, state, prefer(pieces, policy, self._pairs(models), state),
              lambda name: models.report(run, name, self.evaluation, state), iterations=pieces.fitting.steps,
              evaluate_every=self.evaluate_every, checkpoint_every=self.checkpoint_every)
        models.save(run, self.schedule, state)

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards and KL of the newest checkpoint on held-out captions; episodes = number of images."""
        return self._models().restore(run).evaluate(self.evaluation, seed=seed, images=episodes, sampler=sampler)

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """Two grids for the same held-out captions and noise: the pre-trained model and the aligned one."""
        return self._models().restore(run).sample(self.evaluation, out, seed=seed, count=count)

    def _models(self) -> Models:
        return Models.load(self.base, self.schedule, self.kernel)

    def _pairs(self, models: Models) -> Callable[[torch.Generator], Pairs]:
        """Batches of the data, with replacement."""
        generator, size = torch.Generator().manual_seed(self.seed), self.algorithm.compose().fitting.batch_size
        if isinstance(self.data, Renders):
            pool = render_pool(models.parts.autoencoder, self.data.images, generator)
            data = Pairs(pool.latents, None, encode_captions(models.parts.tokenizer, models.parts.text_encoder,
                                                             pool.captions))
        else:
            data = best_and_worst(self.data, models, generator)

        def batch(generator: torch.Generator) -> Pairs:
            index = torch.randint(len(data.winner), (size,), generator=generator)
            loser = None if data.loser is None else data.loser[index]
            return Pairs(data.winner[index], loser, select_rows(data.cond, index))

        return batch


def best_and_worst(plan: BestAndWorst, models: Models, generator: torch.Generator) -> Pairs:
    """Samples of the ODE in groups of one caption; groups whose rewards are all equal make no pair."""
    pool = [scene.caption for scene in scenes("train")]
    picked = torch.randint(len(pool), (plan.prompts,), generator=generator).repeat_interleave(plan.samples_per_prompt)
    captions = [pool[i] for i in picked.tolist()]
    cond = encode_captions(models.parts.tokenizer, models.parts.text_encoder, captions)
    policy = models.policy.with_sampler(ODE())
    rows = torch.arange(len(captions))
    samples = torch.cat([policy.act(select_rows(cond, block), generator=generator).action
                         for block in rows.split(_BLOCK)])
    reward = torch.cat([plan.reward(decode_latents(models.parts.autoencoder, samples[block]),
                                    [captions[i] for i in block.tolist()]) for block in rows.split(_BLOCK)])
    grouped = reward.reshape(plan.prompts, plan.samples_per_prompt)
    first = torch.arange(plan.prompts) * plan.samples_per_prompt
    best, worst = first + grouped.argmax(1), first + grouped.argmin(1)
    clear = reward[best] > reward[worst]
    if not bool(clear.any()):
        raise ValueError("no group of samples has a best and a worst one: the reward is constant; choose another one")
    return Pairs(samples[best[clear]], samples[worst[clear]], select_rows(cond, best[clear]))
