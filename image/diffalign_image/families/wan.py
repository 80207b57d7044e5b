"""Wan 2.1 and 2.2 text-to-video: a transformer over clips that predicts the velocity of the flow path.

Legend: N rows, Z latent channels, F latent frames, L = 512 tokens, C text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import WanPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import FlowPath, Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign_image.families.protocol import clip_sides, decode_by_channel
from diffalign_image.families.sd3 import TIME_SCALE
from diffalign_image.families.sd15 import UNET_LORA_TARGETS, refuse_distilled

_DEFAULT_SIZE = (81, 480, 832)
_TOKENS = 512


@dataclass(frozen=True)
class Wan:
    """WanPipeline with one transformer (2.1 of both sizes, 2.2 TI2V-5B); size: (frames, height, width).

    The core's ODE is diffusers' FlowMatchEuler on `sigmas=linspace(1, 1/K, K)`, shifted by the schedule's `shift` (3 at
    480 lines, 5 at 720). The pipeline comes with UniPC, a solver of higher order on nearly the same grid.
    """

    pipe: Any
    network: nn.Module
    size: Sequence[int] | None = None
    pipeline: ClassVar[Any] = WanPipeline
    left_out: ClassVar[tuple[str, ...]] = ()
    trunk_name: ClassVar[str] = "transformer"
    frame_rate: ClassVar[int | None] = 16
    lora_targets: ClassVar[tuple[str, ...]] = UNET_LORA_TARGETS

    @classmethod
    def of(cls, pipe: Any, size: Sequence[int] | None, distilled_guidance: float | None) -> Wan:
        """The family around a loaded pipeline. Raises: ValueError for a guidance embedding or a second transformer."""
        refuse_distilled("wan", distilled_guidance)
        if pipe.transformer_2 is not None:
            raise ValueError("model_index.json has a transformer_2 (Wan 2.2 A14B, two experts by noise level), of "
                             "which only one would be trained; use Wan 2.1 or Wan 2.2 TI2V-5B")
        return cls(pipe, ClipTransformer(pipe.transformer, tokenwise=bool(pipe.config.expand_timesteps)), size)

    @property
    def path(self) -> FlowPath:
        """The flow path."""
        return FlowPath()

    @property
    def event(self) -> tuple[int, int, int, int]:
        """Shape (Z, F, h, w) of one latent."""
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
        scales = self.pipe.vae_scale_factor_temporal, scale
        return (config.in_channels, *clip_sides(self.size, _DEFAULT_SIZE, scales, scale * config.patch_size[1]))

    def encode(self, prompt: str) -> dict[str, Float[Tensor, "1 L C"]]:
        """{"text"}: the states of the text encoder, zero after the prompt's end."""
        with torch.no_grad():
            text, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=_TOKENS,
                                              device=self.pipe.device)
        return {"text": text}

    def encode_empty(self) -> dict[str, Float[Tensor, "1 L C"]]:
        """The empty prompt."""
        return self.encode("")

    def decode(self, latent: Float[Tensor, "1 Z F h w"]) -> Float[Tensor, "1 frames 3 H W"]:
        """The clip of a latent."""
        return decode_by_channel(self.pipe.vae, latent)


class ClipTransformer(nn.Module):
    """cond = {"text": [N, L, C]}; tokenwise: the time is given for every token of 2 x 2 positions (TI2V)."""

    prediction: Prediction = "flow"

    def __init__(self, transformer: Any, *, tokenwise: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenwise = tokenwise

    def forward(self, x: Float[Tensor, "N Z F h w"], t: Float[Tensor, "N"], cond: Cond
                ) -> Float[Tensor, "N Z F h w"]:
        """The velocity eps - x0."""
        dtype, time = self.transformer.dtype, t * TIME_SCALE  # some of Wan's layers stay in float32
        if self.tokenwise:
            time = time[:, None].expand(-1, x[0, 0, :, ::2, ::2].numel())
        out: Tensor = self.transformer(hidden_states=x.to(dtype), timestep=time,
                                       encoder_hidden_states=cond["text"].to(dtype), return_dict=False)[0]
        return out.float()
