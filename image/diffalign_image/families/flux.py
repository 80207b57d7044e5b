"""FLUX.1: a transformer over packed latents that predicts the velocity of the flow path.

Legend: N rows, Z = 16 latent channels, L text tokens, P = h/2 * w/2 image tokens of 4 Z numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import FlowPath, Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign_image.families.protocol import decode_scaled, latent_sides
from diffalign_image.families.sd3 import JOINT_LORA_TARGETS

_DEFAULT_SIDE = 1024
_DEFAULT_GUIDANCE = 3.5


@dataclass(frozen=True)
class Flux:
    """FluxPipeline (dev and schnell); size: (height, width) in pixels, null for 1024 x 1024.

    dev has the guidance scale as an input (model.distilled_guidance, 3.5); model.guidance is classifier-free guidance
    on top, which neither needs. The pipeline shifts its grid by exp(mu) with mu from the number of image tokens: 3.16
    at 1024 x 1024 (mu = 1.15) and 1.88 at 512 x 512 (mu = 0.63) is that schedule.shift.
    """

    pipe: Any
    network: nn.Module
    size: Sequence[int] | None = None
    pipeline: ClassVar[Any] = FluxPipeline
    left_out: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    trunk_name: ClassVar[str] = "transformer"
    frame_rate: ClassVar[int | None] = None
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_LORA_TARGETS

    @classmethod
    def of(cls, pipe: Any, size: Sequence[int] | None, distilled_guidance: float | None) -> Flux:
        """The family around a loaded pipeline. Raises: ValueError for a guidance scale that the model cannot take."""
        embeds = bool(pipe.transformer.config.guidance_embeds)
        if distilled_guidance is not None and not embeds:
            raise ValueError(f"model.distilled_guidance={distilled_guidance}, but this FLUX model (schnell) has no "
                             "guidance input; set it to null")
        scale = (_DEFAULT_GUIDANCE if distilled_guidance is None else distilled_guidance) if embeds else None
        return cls(pipe, PackedTransformer(pipe.transformer, scale), size)

    @property
    def path(self) -> FlowPath:
        """The flow path."""
        return FlowPath()

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape (Z, h, w) of one latent before packing."""
        return packed_event(self.pipe, self.size)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """{"text" [1, L, C] of T5, "pooled" [1, C2] of CLIP}."""
        with torch.no_grad():
            text, pooled, _ = self.pipe.encode_prompt(prompt, prompt_2=None, device=self.pipe.device)
        return {"text": text, "pooled": pooled}

    def encode_empty(self) -> dict[str, Tensor]:
        """The empty prompt."""
        return self.encode("")

    def decode(self, latent: Float[Tensor, "1 Z h w"]) -> Float[Tensor, "1 3 H W"]:
        """The image of a latent."""
        return decode_scaled(self.pipe.vae, latent)


class PackedTransformer(nn.Module):
    """cond = {"text": [N, L, C], "pooled": [N, C2]}; guidance: the scale given to a guidance-distilled model."""

    prediction: Prediction = "flow"

    def __init__(self, transformer: nn.Module, guidance: float | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.guidance = guidance

    def forward(self, x: Float[Tensor, "N Z h w"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Z h w"]:
        """The velocity eps - x0."""
        dtype, (height, width) = next(self.transformer.parameters()).dtype, x.shape[2:]
        text = cond["text"].to(dtype)
        guidance = None if self.guidance is None else torch.full_like(t, self.guidance)
        out: Tensor = self.transformer(
            hidden_states=pack(x).to(dtype), timestep=t, guidance=guidance, encoder_hidden_states=text,
            pooled_projections=cond["pooled"].to(dtype), txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=positions(height // 2, width // 2, text), return_dict=False)[0]
        return unpack(out, height, width).float()


def packed_event(pipe: Any, size: Sequence[int] | None) -> tuple[int, int, int]:
    """(Z, h, w) of a transformer whose tokens are packed from latents, 1024 x 1024 pixels if no size is given."""
    scale = pipe.vae_scale_factor
    return (pipe.transformer.config.in_channels // 4, *latent_sides(size, _DEFAULT_SIDE, scale, 2 * scale))


def pack(x: Float[Tensor, "N Z h w"]) -> Float[Tensor, "N P Z4"]:
    """Squares of 2 x 2 latent positions as tokens, row by row; a token holds its channels, each by row and column."""
    n, channels, height, width = x.shape
    squares = x.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(n, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Float[Tensor, "N P Z4"], height: int, width: int) -> Float[Tensor, "N Z h w"]:
    """The inverse of `pack`."""
    n, _, size = tokens.shape
    squares = tokens.reshape(n, height // 2, width // 2, size // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(n, size // 4, height, width)


def positions(rows: int, columns: int, like: Tensor) -> Float[Tensor, "P 3"]:
    """(0, row, column) of every image token."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).to(like)
