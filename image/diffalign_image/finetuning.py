"""The job that fine-tunes a pretrained diffusers pipeline on a reward.

Legend: P prompts x G images of each = B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign import choices
from diffalign.algorithms import Algorithm
from diffalign.diffusion import Schedule, TrainedSteps
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.rollouts import Rollout, image_rollout
from diffalign.spec import spec
from diffalign.train import checkpoint, distributed
from diffalign.train.on_policy import optimize
from diffalign.train.run import Run
from diffalign.train.state import TrainState
from diffalign_image.families import decode
from diffalign_image.pretrained import Model, Pretrained, report
from diffalign_image.prompts import Prompt, positions, read_prompts
from diffalign_image.rewards import AnyReward, Reward
from diffalign_image.rewards.protocol import checked
from diffalign_image.runs import chosen_sampler, drive, newest_checkpoint, refuse_critic, require_positive


@spec
class PromptEvaluation:
    """How the job is evaluated: the first `count` prompts of a file, G images of each, by the ODE; seed fixes noise.

    prompts: a file of held-out prompts; null takes the training prompts, and then no claim of generalization is made.
    kl_images: how many chains estimate the KL to the base; 0 for none.
    """

    prompts: str | None = None
    count: int = 16
    images_per_prompt: int = 2
    seed: int = 1000
    kl_images: int = 8

    def __post_init__(self) -> None:
        if self.count < 2 or self.images_per_prompt < 1 or self.kl_images < 0 or self.kl_images == 1:
            raise ValueError("need count >= 2 (an interval needs two prompts), images_per_prompt >= 1 and kl_images 0 "
                             f"or >= 2, got {self.count}, {self.images_per_prompt} and {self.kl_images}")


@spec
class ImageFinetune:
    """Policy optimization of a pretrained text-to-image pipeline on a reward, with LoRA or of all weights.

    prompts: a text file with one prompt a line, or JSONL with `prompt` and `metadata`; every prompt is drawn once
    before any is drawn again. One iteration makes prompts_per_update x images_per_prompt images. kernel, schedule and
    trained are the sampler of the rollouts; evaluations sample the ODE on the same schedule.
    """

    type: Literal["image_finetune"] = "image_finetune"
    seed: int = 0
    model: Model
    prompts: str
    reward: AnyReward
    algorithm: Algorithm
    kernel: choices.Kernel
    schedule: Schedule
    trained: TrainedSteps = TrainedSteps()
    prompts_per_update: int = 8
    images_per_prompt: int = 8
    iterations: int
    evaluation: PromptEvaluation = PromptEvaluation()
    evaluate_every: int | None = None
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        pieces = self.algorithm.compose()
        pieces.require_steering(None)
        refuse_critic(self.algorithm)
        switches = self.model.guidance
        if switches and switches.sampling != switches.likelihood and "density" in pieces.likelihood.provides:
            raise ValueError(f"algorithm {self.algorithm.type} compares densities of the chain that drew the images: "
                             "model.guidance.sampling and model.guidance.likelihood must be the same, got "
                             f"{switches.sampling} and {switches.likelihood}; or use a matching method (awm, nft)")
        require_positive(self, "prompts_per_update", "images_per_prompt", "iterations", "checkpoint_every",
                         "evaluate_every")

    def train(self, run: Run) -> None:
        """Fine-tune or go on, with evaluations before, during and after; ends with lora/ or pipeline/."""
        prompts, held_out = read_prompts(self.prompts), self._evaluation_prompts()
        model, pieces = self._load(), self.algorithm.compose()
        plan = pieces.optimization
        state = TrainState.create({"policy": model.trained}, {"policy": plan.learning_rate},
                                  weight_decay=plan.weight_decay, ema_decay=plan.ema_decay, seed=self.seed)
        source = PipelineSource(model, prompts, self.reward, self.prompts_per_update, self.images_per_prompt, state,
                                self.seed)
        reference = None if model.references is None else model.references[1]

        def report_as(name: str) -> None:
            with state.ema_modules():
                report(model, run, name, self._evaluated(model, held_out, self.evaluation), held_out, state.step,
                       seed=self.evaluation.seed)

        drive(run, state, optimize(pieces, model.policy, source, state, reference=reference), report_as,
              iterations=self.iterations, evaluate_every=self.evaluate_every, checkpoint_every=self.checkpoint_every)
        model.save(run, state)

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Reward and KL of the newest checkpoint; episodes = number of images."""
        plan = replace(self.evaluation, seed=seed)
        if episodes is not None:
            plan = replace(plan, count=max(2, episodes // plan.images_per_prompt))
        return self._evaluated(self._restored(run), self._evaluation_prompts(), plan, sampler)

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """Grids for the same prompts and noise: the base, where there is one to compare with, and the model."""
        model, prompts = self._restored(run), self._evaluation_prompts()
        before = [] if model.references is None else [
            model.grid(prompts, out, "before", seed=seed, count=count, base=True)]
        return [*before, model.grid(prompts, out, "after", seed=seed, count=count)]

    def _load(self) -> Pretrained:
        keep = self.algorithm.compose().needs_reference or self.evaluation.kl_images > 0
        return Pretrained.load(self.model, self.schedule, self.kernel, self.trained, seed=self.seed,
                               keep_reference=keep)

    def _restored(self, run: Run) -> Pretrained:
        model = self._load()
        checkpoint.load_modules(newest_checkpoint(run), {"policy": model.trained}, prefer_ema=True)
        return model

    def _evaluation_prompts(self) -> list[Prompt]:
        return read_prompts(self.evaluation.prompts or self.prompts)

    def _evaluated(self, model: Pretrained, prompts: list[Prompt], plan: PromptEvaluation, sampler: str | None = None
                   ) -> dict[str, Any]:
        chosen = chosen_sampler(sampler, stochastic=self.kernel.stochastic)
        result = model.evaluate(prompts[: plan.count], self.reward, images_per_prompt=plan.images_per_prompt,
                                seed=plan.seed, kl_images=plan.kl_images, sampler=chosen)
        return {**result, "split": "training prompts" if self.evaluation.prompts is None else "held_out"}


@dataclass(frozen=True)
class PipelineSource:
    """Draws the next P prompts, makes G images of each, rewards them; which prompts are next follows from state.step.

    Raises: ValueError if an update would ask for more prompts than there are or than processes can share.
    """

    model: Pretrained
    prompts: list[Prompt]
    reward: Reward
    prompts_per_update: int
    images_per_prompt: int
    state: TrainState
    seed: int

    def __post_init__(self) -> None:
        if self.prompts_per_update > len(self.prompts):
            raise ValueError(f"prompts_per_update={self.prompts_per_update} exceeds the {len(self.prompts)} prompts of "
                             "the file; lower it, or raise images_per_prompt instead")
        if self.prompts_per_update % distributed.world_size():
            raise ValueError(f"prompts_per_update={self.prompts_per_update} must be a multiple of the "
                             f"{distributed.world_size()} processes")

    def collect(self, policy: DiffusionPolicy, *, generator: torch.Generator) -> Rollout:
        """One rollout of this process's share of P x G images."""
        share = self.prompts_per_update // distributed.world_size()
        first = distributed.rank() * share
        chosen = positions(self.state.step * self.prompts_per_update + first, share, len(self.prompts), self.seed)
        repeated = [i for i in chosen for _ in range(self.images_per_prompt)]
        prompts = [self.prompts[i] for i in repeated]
        cond = self.model.embeddings([prompt.text for prompt in prompts])
        drawing = replace(policy, denoiser=self.model.sampling)
        decision = drawing.act(cond, generator=generator)
        images, device = decode(self.model.family, decision.action), decision.action.device
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        reward = checked(self.reward(images, texts, metadata), len(texts), "the reward").to(device)
        group = torch.arange(first, first + share, device=device).repeat_interleave(self.images_per_prompt)
        saturated = float((images.abs() > 0.99).float().mean())
        return image_rollout(decision.trajectory, reward, group, torch.tensor(repeated, device=device),
                             {"samples/saturated": saturated})
