"""Stable Diffusion 1.x and 2.x: a UNet that predicts eps or v on a variance-preserving path; consistency models of it.

Legend: N rows, Z = 4 latent channels, L = 77 tokens, C text channels, W numbers that embed a guidance scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import Prediction, VPPath
from diffalign.diffusion.trajectories import Cond
from diffalign_image.families.consistency import consistent
from diffalign_image.families.protocol import decode_scaled, latent_sides

_DEFAULT_GUIDANCE = 8.5
UNET_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class SD15:
    """StableDiffusionPipeline; size: (height, width) in pixels, null for the size it was trained at.

    Sampling on the core's schedule is diffusers' DDIM with `timestep_spacing="trailing"` and `set_alpha_to_one=True`.
    With an LCMScheduler the model is a consistency model (see `consistent`).
    """

    pipe: Any
    network: nn.Module
    size: Sequence[int] | None = None
    pipeline: ClassVar[Any] = StableDiffusionPipeline
    left_out: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor")
    trunk_name: ClassVar[str] = "unet"
    frame_rate: ClassVar[int | None] = None
    lora_targets: ClassVar[tuple[str, ...]] = UNET_LORA_TARGETS

    @classmethod
    def of(cls, pipe: Any, size: Sequence[int] | None, distilled_guidance: float | None) -> SD15:
        """The family around a loaded pipeline. Raises: ValueError for a guidance scale that the model cannot take."""
        embedding = guidance_embedding(pipe, "sd15", distilled_guidance)
        network = UNet(pipe.unet, unet_prediction(pipe.scheduler), embedding)
        return cls(pipe, consistent(network, pipe.scheduler, vp_path(pipe.scheduler)), size)

    @property
    def path(self) -> VPPath:
        """The noise path of the pipeline's scheduler."""
        return vp_path(self.pipe.scheduler)

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape (Z, h, w) of one latent."""
        return unet_event(self.pipe, self.size)

    def encode(self, prompt: str) -> dict[str, Float[Tensor, "1 L C"]]:
        """{"text"}: the states of the text encoder."""
        with torch.no_grad():
            text, _ = self.pipe.encode_prompt([prompt], self.pipe.device, 1, False)
        return {"text": text}

    def encode_empty(self) -> dict[str, Float[Tensor, "1 L C"]]:
        """The empty prompt."""
        return self.encode("")

    def decode(self, latent: Float[Tensor, "1 Z h w"]) -> Float[Tensor, "1 3 H W"]:
        """The image of a latent."""
        return decode_scaled(self.pipe.vae, latent)


class UNet(nn.Module):
    """cond = {"text": [N, L, C]}, of SDXL also "pooled" [N, C2] and "size" [N, 6].

    guidance: the scale's embedding for a guidance-distilled model.
    """

    guidance: Tensor | None

    def __init__(self, unet: nn.Module, prediction: Prediction, guidance: Float[Tensor, "1 W"] | None) -> None:
        super().__init__()
        self.unet = unet
        self.prediction = prediction
        self.register_buffer("guidance", guidance, persistent=False)

    def forward(self, x: Float[Tensor, "N Z h w"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Z h w"]:
        """eps or v at the table entry nearest to t."""
        dtype = next(self.unet.parameters()).dtype
        added = {"text_embeds": cond["pooled"].to(dtype),
                 "time_ids": cond["size"].to(dtype)} if "pooled" in cond else None  # SDXL's
        out: Tensor = self.unet(x.to(dtype), table_index(t), encoder_hidden_states=cond["text"].to(dtype),
                                timestep_cond=repeated(self.guidance, x, dtype), added_cond_kwargs=added,
                                return_dict=False)[0]
        return out.float()


def repeated(row: Float[Tensor, "1 W"] | None, like: Float[Tensor, "N *E"], dtype: torch.dtype
             ) -> Float[Tensor, "N W"] | None:
    """The row once for every row of `like`."""
    return None if row is None else row.to(like.device, dtype).expand(len(like), -1)


def guidance_embedding(pipe: Any, family: str, scale: float | None) -> Float[Tensor, "1 W"] | None:
    """What a guidance-distilled UNet (LCM) is told of the scale, 8.5 if none is given; None for other UNets.

    Raises: ValueError if a scale is given to a UNet that takes none.
    """
    width = pipe.unet.config.time_cond_proj_dim
    if width is None:
        refuse_distilled(family, scale)
        return None
    chosen = _DEFAULT_GUIDANCE if scale is None else scale
    embedding: Tensor = pipe.get_guidance_scale_embedding(torch.tensor([chosen - 1.0]), embedding_dim=width)
    return embedding


def table_index(t: Float[Tensor, "N"]) -> Tensor:
    """diffusers' timestep 0..999 of path time: t = (index + 1) / 1000."""
    return (t.double() * 1000).round().long() - 1


def vp_path(scheduler: Any) -> VPPath:
    """The path of a scheduler's table of betas.

    Raises: ValueError for a table that the core has not, naming the entry of scheduler_config.json.
    """
    config = scheduler.config
    known = ("linear", "scaled_linear", "squaredcos_cap_v2")
    if config.get("trained_betas") is not None or config.beta_schedule not in known:
        raise ValueError(f"scheduler_config.json has beta_schedule {config.beta_schedule!r} (trained_betas "
                         f"{'given' if config.get('trained_betas') is not None else 'absent'}); the core knows {known}")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError("scheduler_config.json has rescale_betas_zero_snr: true, a table that the core has not; "
                         "use a checkpoint without it")
    if config.num_train_timesteps != 1000:
        raise ValueError(f"scheduler_config.json has num_train_timesteps {config.num_train_timesteps}, expected 1000")
    return VPPath(betas=config.beta_schedule, beta_start=config.beta_start, beta_end=config.beta_end)


def unet_prediction(scheduler: Any) -> Prediction:
    """The prediction kind that scheduler_config.json states. Raises: ValueError for another one."""
    kinds: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    kind = scheduler.config.prediction_type
    if kind not in kinds:
        raise ValueError(f"scheduler_config.json has prediction_type {kind!r}, expected one of {sorted(kinds)}")
    return kinds[kind]


def unet_event(pipe: Any, size: Sequence[int] | None) -> tuple[int, int, int]:
    """(Z, h, w) for a UNet that halves its input at every level but one."""
    config, scale = pipe.unet.config, pipe.vae_scale_factor
    halvings = 2 ** (len(config.block_out_channels) - 1)
    return (config.in_channels, *latent_sides(size, config.sample_size * scale, scale, scale * halvings))


def refuse_distilled(family: str, distilled_guidance: float | None) -> None:
    """Raises: ValueError if a guidance embedding is asked of a model without one."""
    if distilled_guidance is not None:
        raise ValueError("model.distilled_guidance is an input of guidance-distilled FLUX and LCM models; this "
                         f"{family} has none, got {distilled_guidance}. Use model.guidance for classifier-free "
                         "guidance")
