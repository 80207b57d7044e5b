"""Stable Diffusion 3 and 3.5: a transformer that predicts the velocity of the flow path.

Legend: N rows, Z = 16 latent channels, L tokens, C text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import FlowPath, Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign_image.families.protocol import decode_scaled, latent_sides
from diffalign_image.families.sd15 import refuse_distilled

JOINT_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TIME_SCALE = 1000.0  # path time 1 is the transformer's timestep 1000


@dataclass(frozen=True)
class SD3:
    """StableDiffusion3Pipeline (3 and 3.5); size: (height, width) in pixels, null for 1024 x 1024.

    The core's ODE is diffusers' FlowMatchEuler on `sigmas=linspace(1, 1/K, K)`, shifted by the schedule's `shift` (3).
    """

    pipe: Any
    network: nn.Module
    size: Sequence[int] | None = None
    pipeline: ClassVar[Any] = StableDiffusion3Pipeline
    left_out: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    trunk_name: ClassVar[str] = "transformer"
    frame_rate: ClassVar[int | None] = None
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_LORA_TARGETS

    @classmethod
    def of(cls, pipe: Any, size: Sequence[int] | None, distilled_guidance: float | None) -> SD3:
        """The family around a loaded pipeline. Raises: ValueError for a guidance embedding, which it has not."""
        refuse_distilled("sd3", distilled_guidance)
        return cls(pipe, JointTransformer(pipe.transformer), size)

    @property
    def path(self) -> FlowPath:
        """The flow path."""
        return FlowPath()

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape (Z, h, w) of one latent."""
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor
        sides = latent_sides(self.size, config.sample_size * scale, scale, scale * config.patch_size)
        return (config.in_channels, *sides)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """{"text" [1, L, C], "pooled" [1, C2]} of the three text encoders."""
        with torch.no_grad():
            text, _, pooled, _ = self.pipe.encode_prompt(prompt, None, None, device=self.pipe.device,
                                                         do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def encode_empty(self) -> dict[str, Tensor]:
        """The empty prompt."""
        return self.encode("")

    def decode(self, latent: Float[Tensor, "1 Z h w"]) -> Float[Tensor, "1 3 H W"]:
        """The image of a latent."""
        return decode_scaled(self.pipe.vae, latent)


class JointTransformer(nn.Module):
    """cond = {"text": [N, L, C], "pooled": [N, C2]}."""

    prediction: Prediction = "flow"

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Float[Tensor, "N Z h w"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Z h w"]:
        """The velocity eps - x0."""
        dtype = next(self.transformer.parameters()).dtype
        out: Tensor = self.transformer(x.to(dtype), encoder_hidden_states=cond["text"].to(dtype),
                                       pooled_projections=cond["pooled"].to(dtype), timestep=t * TIME_SCALE,
                                       return_dict=False)[0]
        return out.float()
