"""LTX-Video text-to-video: a transformer over strongly compressed clips that predicts the velocity of the flow path.

Legend: N rows, Z = 128 latent channels, F latent frames, L = 128 tokens, C text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import LTXPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import FlowPath, Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign_image.families.protocol import clip_sides
from diffalign_image.families.sd3 import TIME_SCALE
from diffalign_image.families.sd15 import UNET_LORA_TARGETS, refuse_distilled

_DEFAULT_SIZE = (161, 512, 704)
_TOKENS = 128
_FRAME_RATE = 25


@dataclass(frozen=True)
class LTX:
    """LTXPipeline; size: (frames, height, width); clips of 25 frames a second.

    The pipeline shifts its grid by exp(mu) with mu from the number of latent positions (schedule.shift) and stretches
    it to end at its scheduler's `shift_terminal` (schedule.terminal, 0.1).
    """

    pipe: Any
    network: nn.Module
    size: Sequence[int] | None = None
    pipeline: ClassVar[Any] = LTXPipeline
    left_out: ClassVar[tuple[str, ...]] = ()
    trunk_name: ClassVar[str] = "transformer"
    frame_rate: ClassVar[int | None] = _FRAME_RATE
    lora_targets: ClassVar[tuple[str, ...]] = UNET_LORA_TARGETS

    @classmethod
    def of(cls, pipe: Any, size: Sequence[int] | None, distilled_guidance: float | None) -> LTX:
        """The family around a loaded pipeline. Raises: ValueError for a guidance embedding or patches of positions."""
        refuse_distilled("ltx", distilled_guidance)
        patches = pipe.transformer.config.patch_size, pipe.transformer.config.patch_size_t
        if patches != (1, 1):
            raise ValueError(f"transformer/config.json has patch_size and patch_size_t {patches}, expected (1, 1)")
        scales = pipe.vae_temporal_compression_ratio / _FRAME_RATE, *[pipe.vae_spatial_compression_ratio] * 2
        return cls(pipe, FlatTransformer(pipe.transformer, scales), size)

    @property
    def path(self) -> FlowPath:
        """The flow path."""
        return FlowPath()

    @property
    def event(self) -> tuple[int, int, int, int]:
        """Shape (Z, F, h, w) of one latent."""
        scale = self.pipe.vae_spatial_compression_ratio
        scales = self.pipe.vae_temporal_compression_ratio, scale
        return (self.pipe.transformer.config.in_channels, *clip_sides(self.size, _DEFAULT_SIZE, scales, scale))

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """{"text" [1, L, C], "mask" [1, L], true where a token is}."""
        with torch.no_grad():
            text, mask, _, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False,
                                                       max_sequence_length=_TOKENS, device=self.pipe.device)
        return {"text": text, "mask": mask}

    def encode_empty(self) -> dict[str, Tensor]:
        """The empty prompt."""
        return self.encode("")

    def decode(self, latent: Float[Tensor, "1 Z F h w"]) -> Float[Tensor, "1 frames 3 H W"]:
        """The clip of a latent; a decoder that is told the noise left in the latent is told none."""
        vae = self.pipe.vae
        mean, std = (one[:, None, None, None] for one in (vae.latents_mean, vae.latents_std))
        raw = (latent * std / vae.config.scaling_factor + mean).to(vae.dtype)
        clip: Tensor = vae.decode(raw, raw.new_zeros(1) if vae.config.timestep_conditioning else None).sample
        return clip.transpose(1, 2)


class FlatTransformer(nn.Module):
    """cond = {"text": [N, L, C], "mask": [N, L]}; scales: seconds and pixels a latent position covers."""

    prediction: Prediction = "flow"

    def __init__(self, transformer: nn.Module, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.transformer = transformer
        self.scales = scales

    def forward(self, x: Float[Tensor, "N Z F h w"], t: Float[Tensor, "N"], cond: Cond
                ) -> Float[Tensor, "N Z F h w"]:
        """The velocity eps - x0."""
        dtype, (frames, height, width) = next(self.transformer.parameters()).dtype, x.shape[2:]
        out: Tensor = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(dtype), encoder_hidden_states=cond["text"].to(dtype),
            timestep=t * TIME_SCALE, encoder_attention_mask=cond["mask"], num_frames=frames, height=height, width=width,
            rope_interpolation_scale=self.scales, return_dict=False)[0]
        return out.float().transpose(1, 2).reshape_as(x)
