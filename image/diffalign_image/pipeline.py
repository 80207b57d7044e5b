"""The saved model as a diffusers pipeline: what is trained is what is exported.

No `from __future__ import annotations` here: diffusers reads the constructor's annotations at run time.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    ImagePipelineOutput,
    SD3Transformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from diffalign_image.autoencoder import decode_latents
from diffalign_image.model import TIME_SCALE, TextTransformer
from diffalign_image.rewards import to_bytes
from diffalign_image.text import encode_captions


class ShapesPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Text to 32x32 image by Euler steps of the learned flow, from parts that plain diffusers and transformers load.

    A consistency model has FlowMatchLCMScheduler instead: each step goes to the clean end and noises it anew.

    `ShapesPipeline.from_pretrained(folder)("a red circle above a blue square").images[0]`
    """

    def __init__(self, transformer: SD3Transformer2DModel, vae: AutoencoderKL, text_encoder: CLIPTextModel,
                 tokenizer: PreTrainedTokenizerFast,
                 scheduler: Union[FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler]) -> None:  # noqa: UP007 - for diffusers
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
                              scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt: str | list[str], *, num_inference_steps: int = 8, noise: Tensor | None = None,
                 generator: torch.Generator | None = None, output_type: str = "pil") -> ImagePipelineOutput:
        """One image per prompt: PIL images, or with output_type "pt" a tensor [N, 3, 32, 32] in [-1, 1].

        noise [N, Z, 8, 8] overrides the draw of the start from the generator.

        Raises: ValueError for words that the text encoder does not know or an unknown output_type.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be 'pil' or 'pt', got {output_type!r}")
        captions = [prompt] if isinstance(prompt, str) else list(prompt)
        cond = encode_captions(self.tokenizer, self.text_encoder, captions)
        denoiser = TextTransformer(self.transformer)
        x = torch.randn(len(captions), *denoiser.event, generator=generator) if noise is None else noise
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps))
        for t in self.scheduler.timesteps:
            velocity = denoiser(x, t.expand(len(captions)) / TIME_SCALE, cond)
            noisy = {"generator": generator} if isinstance(self.scheduler, FlowMatchLCMScheduler) else {}
            x = self.scheduler.step(velocity, t, x, return_dict=False, **noisy)[0]
        images = decode_latents(self.vae, x)
        return ImagePipelineOutput(images=images if output_type == "pt" else self.numpy_to_pil(to_bytes(images) / 255))


@dataclass(frozen=True)
class Parts:
    """A loaded model: the denoiser that is aligned, and the frozen autoencoder and text side.

    consistency: the denoiser is a distilled student, whose x0 is the end of a trajectory and whose v is no ODE's.
    """

    denoiser: TextTransformer
    autoencoder: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: PreTrainedTokenizerFast
    consistency: bool = False


def save(parts: Parts, folder: Path, *, shift: float) -> Path:
    """Write the pipeline folder (model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/)."""
    kind = FlowMatchLCMScheduler if parts.consistency else FlowMatchEulerDiscreteScheduler
    scheduler = kind(num_train_timesteps=1000, shift=shift)
    ShapesPipeline(parts.denoiser.transformer, parts.autoencoder, parts.text_encoder, parts.tokenizer, scheduler
                   ).save_pretrained(folder)
    return folder


def load(run: str, *, consistency: bool = False) -> Parts:
    """The model in `run`/pipeline, in evaluation mode. consistency: whether it may be a consistency model.

    Raises: ValueError if the run folder has none, with the command that makes it, or for a consistency model that the
    caller would sample or train as a flow.
    """
    folder = Path(run) / "pipeline"
    if not (folder / "model_index.json").is_file():
        what = "holds no finished model (pipeline/model_index.json)" if Path(run).is_dir() else "does not exist"
        raise ValueError(f"base: {run} {what}; make one with "
                         f"`diffalign train configs/image/shapes_pretrain.yaml --run {run}`")
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"]
    distilled = scheduler == FlowMatchLCMScheduler.__name__
    if distilled and not consistency:
        raise ValueError(f"{run} is a consistency model (its scheduler is {scheduler}), which has no ODE; "
                         "take the run that it was distilled from, or image_align with an algorithm of the transition "
                         "likelihood (ddpo, flow_grpo, ...)")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False).eval()
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False).eval().requires_grad_(False)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return Parts(TextTransformer(transformer), autoencoder, encoder, tokenizer, distilled)
