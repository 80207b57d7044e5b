"""A pretrained pipeline with its trainable part: loaded, guided, compared with its base, evaluated, exported.

Legend: N images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from diffalign import choices
from diffalign.diffusion import Schedule, TrainedSteps
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser, select_rows
from diffalign.spec import spec
from diffalign.train import distributed, sharding
from diffalign.train.run import Run
from diffalign.train.state import TrainState, frozen_copy
from diffalign_image.evaluate import (
    Drawn,
    Sampler,
    describe,
    kl_summary,
    over_prompts,
    sampler_policy,
    save_film,
    save_grid,
)
from diffalign_image.families import Family, FamilyName, decode, encoders_on, load, save_lora, save_pipeline, trunk
from diffalign_image.guards import diversity, features
from diffalign_image.guidance import Guidance, GuidedDenoiser
from diffalign_image.lora import Lora, WithoutAdapters, add_lora, checkpoint_trainable_only, lora_layers
from diffalign_image.prompts import Embeddings, Prompt
from diffalign_image.rewards import Combination, Reward, named_rewards, overall
from diffalign_image.runs import record
from diffalign_image.scoring import Block, score

_GRID, _CLIPS = 16, 4  # pictures and clips in the grids that training writes


@spec
class Model:
    """A diffusers pipeline and what of it is trained.

    path: folder or hub id. family: null reads it off model_index.json. size: (height, width) in pixels, of clips
    (frames, height, width), null for the model's own. lora: null trains all weights of the UNet or transformer, in
    float32. guidance: null is none. distilled_guidance: the scale that guidance-distilled models (FLUX, LCM) take as an
    input. batch_rows: most images in one call of the network (twice as many rows with guidance); it bounds the memory
    of sampling and scoring, gradients are bounded by optimization.microbatch_rows. shard: training spreads the weights
    of the UNet or transformer over the processes, and what is kept beside each trained weight (gradient, moments,
    average); LoRA's own weights are small and stay whole. offload_encoders: the text encoders wait in main memory and
    come to the device for new prompts alone. compile: the UNet or transformer by torch.compile, which takes minutes
    before it pays.
    """

    path: str
    family: FamilyName | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    size: tuple[int, int] | tuple[int, int, int] | None = None
    lora: Lora | None = Lora()
    guidance: Guidance | None = None
    distilled_guidance: float | None = None
    batch_rows: int = 8
    gradient_checkpointing: bool = False
    shard: bool = False
    offload_encoders: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.lora is None and self.dtype != "float32":
            raise ValueError(f"lora: null trains all weights, whose updates {self.dtype} rounds away; use dtype: "
                             "float32, or lora, whose own weights are always float32")
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows must be at least 1, got {self.batch_rows}")
        if self.shard and self.compile:
            raise ValueError("compile: true was never tried on a model that is spread over processes (shard: true); "
                             "use one of them")


@dataclass(frozen=True)
class Pretrained:
    """A loaded model. policy is what is trained and scored; sampling is the denoiser that draws (the same one, or the
    one with the other guidance). references: the base as it draws and as it scores, None if it is not kept."""

    family: Family
    plan: Model
    policy: DiffusionPolicy
    sampling: GuidedDenoiser
    embeddings: Embeddings
    references: tuple[Denoiser, Denoiser] | None

    @classmethod
    def load(cls, plan: Model, schedule: Schedule, kernel: choices.Kernel, trained: TrainedSteps, *, seed: int,
             keep_reference: bool) -> Pretrained:
        """Load, and add fresh adapters from the seed. Without LoRA a reference is a copy, made only if asked for.

        In one process nothing is sharded. In several the model is loaded by each before its slices are taken.

        Raises: ValueError for a pipeline that cannot be read or settings that do not fit it.
        """
        device = torch.device("cuda" if plan.device == "auto" and torch.cuda.is_available() else
                              plan.device.replace("auto", "cpu"))
        sharded = plan.shard and distributed.world_size() > 1
        family = load(plan.path, plan.family, getattr(torch, plan.dtype), device, size=plan.size,
                      distilled_guidance=plan.distilled_guidance, trunk_waits=sharded,
                      encoders_wait=plan.offload_encoders)
        if plan.lora is None:
            trunk(family).requires_grad_(True)
        else:
            add_lora(trunk(family), plan.lora, family.lora_targets, seed=seed)
        if plan.gradient_checkpointing:
            cast(Any, trunk(family)).enable_gradient_checkpointing()
        base = frozen_copy(family.network) if plan.lora is None and keep_reference else None
        if sharded:
            adapters = frozenset(p for p in family.network.parameters() if plan.lora is not None and p.requires_grad)
            sharding.shard(family.network, device, kept=adapters)
            if base is not None:
                sharding.shard(base, device)
        if plan.compile:
            trunk(family).compile()
        at_work = partial(encoders_on, family, device) if plan.offload_encoders else nullcontext
        with at_work():
            empty = family.encode_empty()
        guidance = plan.guidance or Guidance(scale=1.0)
        prediction = cast(Denoiser, family.network).prediction

        def guided(network: nn.Module) -> tuple[GuidedDenoiser, GuidedDenoiser]:
            scales = [guidance.scale if on else 1.0 for on in (guidance.sampling, guidance.likelihood)]
            drawing, scoring = (GuidedDenoiser(network, prediction, empty, s, plan.batch_rows) for s in scales)
            return drawing, scoring

        drawing, scoring = guided(family.network)
        references: tuple[Denoiser, Denoiser] | None = None
        if plan.lora is not None:
            checkpoint_trainable_only(scoring)
            references = WithoutAdapters(drawing, trunk(family)), WithoutAdapters(scoring, trunk(family))
        elif base is not None:
            references = guided(base)
        policy = DiffusionPolicy(scoring, family.path, kernel, schedule, family.event, trained)
        return cls(family, plan, policy, drawing, Embeddings(family.encode, at_work), references)

    @property
    def trained(self) -> GuidedDenoiser:
        """The module that training changes."""
        return cast(GuidedDenoiser, self.policy.denoiser)

    @property
    def sampler(self) -> DiffusionPolicy:
        """The policy that draws images."""
        return replace(self.policy, denoiser=self.sampling)

    def draw(self, policy: DiffusionPolicy, prompts: Sequence[Prompt], seed: int) -> Drawn:
        """One image per prompt. Image i depends on the seed and on i, not on how many are drawn with it."""
        device = next(self.trained.parameters()).device
        cond, found = self.embeddings([prompt.text for prompt in prompts]), []
        for row in torch.arange(len(prompts), device=device):
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + int(row))
            latent = policy.act(select_rows(cond, row[None]), generator=generator).action
            found.append(decode(self.family, latent))
        return Drawn(torch.cat(found), [prompt.text for prompt in prompts])

    def evaluate(self, prompts: Sequence[Prompt], reward: Reward | Combination, *, images_per_prompt: int, seed: int,
                 kl_images: int, sampler: Sampler = "ode", held_out: Mapping[str, Reward] | None = None,
                 clip: str | None = None) -> dict[str, Any]:
        """Rewards with 95 % intervals over prompt means, the images' diversity in the features of `clip` or in pixels,
        and the exact KL to the base in nats per image."""
        chosen = sampler_policy(self.sampler, sampler)
        repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        drawn = self.draw(chosen, repeated, seed)
        measured = score(Block(drawn.images, repeated), {**named_rewards(reward), **(held_out or {})})
        found = {name: over_prompts(values, images_per_prompt) for name, values in overall(reward, measured).items()}
        group = torch.arange(len(prompts)).repeat_interleave(images_per_prompt)
        result = {"rewards": found, "diversity": diversity(features(drawn.images, clip), group), "split": "evaluation",
                  "prompts": len(prompts), "images": len(repeated), "seed": seed, "sampler": describe(chosen)}
        if kl_images and self.references is not None and self.policy.kernel.stochastic:
            some = self.embeddings([prompts[i % len(prompts)].text for i in range(kl_images)])
            result |= kl_summary(self.sampler, self.references[0], some, seed)
        return result

    def grid(self, prompts: Sequence[Prompt], folder: Path, name: str, *, seed: int, count: int | None = None,
             base: bool = False) -> list[Path]:
        """folder/<name>.png: pictures or frames of clips, by the ODE, of the model or its base; clips also as .mp4.

        Of several processes that ask the first one writes.
        """
        if count is None:
            count = _GRID if self.family.frame_rate is None else _CLIPS
        policy = sampler_policy(self.sampler, "ode")
        if base and self.references is not None:
            policy = replace(policy, denoiser=self.references[0])
        some = [prompts[i % len(prompts)] for i in range(count)]
        drawn = self.draw(policy, some, seed)
        if not distributed.leads():
            return []
        sheet = save_grid(drawn, folder / f"{name}.png")
        if self.family.frame_rate is None:
            return [sheet]
        return [sheet, save_film(drawn, folder / f"{name}.mp4", frame_rate=self.family.frame_rate)]

    def save(self, run: Run, state: TrainState) -> None:
        """The averaged weights: lora/ for `pipe.load_lora_weights`, or with all weights trained a pipeline/ folder.

        All ranks must ask, the first one writes.
        """
        with state.ema_modules():
            if self.plan.lora is None:
                save_pipeline(self.family, run.folder("pipeline"))
            elif distributed.leads():
                save_lora(self.family, lora_layers(trunk(self.family), self.plan.lora), run.folder("lora"))


def report(model: Pretrained, run: Run, name: str, result: dict[str, Any], prompts: Sequence[Prompt], step: int, *,
           seed: int) -> None:
    """evaluations/<name>.json, a line of metrics, and samples/<name>.png (clips: and .mp4)."""
    record(run, name, result, step)
    model.grid(prompts, run.folder("samples"), name, seed=seed)
