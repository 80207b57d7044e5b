"""Stable Diffusion XL: SD 1.5's UNet grown, with two text encoders and the image's size as conditioning.

Legend: N rows, Z = 4 latent channels, L = 77 tokens, C text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import VPPath
from diffalign_image.families.consistency import consistent
from diffalign_image.families.protocol import decode_scaled
from diffalign_image.families.sd15 import (
    UNET_LORA_TARGETS,
    UNet,
    guidance_embedding,
    unet_event,
    unet_prediction,
    vp_path,
)


@dataclass(frozen=True)
class SDXL:
    """StableDiffusionXLPipeline; size: (height, width) in pixels, null for the size it was trained at.

    The pipeline's default scheduler is Euler, which is another grid of the same path: DDIM with trailing spacing on the
    same weights is the core's ODE. Images are conditioned as uncropped originals of their own size.
    """

    pipe: Any
    network: nn.Module
    size: Sequence[int] | None = None
    pipeline: ClassVar[Any] = StableDiffusionXLPipeline
    left_out: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    trunk_name: ClassVar[str] = "unet"
    frame_rate: ClassVar[int | None] = None
    lora_targets: ClassVar[tuple[str, ...]] = UNET_LORA_TARGETS

    @classmethod
    def of(cls, pipe: Any, size: Sequence[int] | None, distilled_guidance: float | None) -> SDXL:
        """The family around a loaded pipeline. Raises: ValueError for a guidance scale that the model cannot take or a
        VAE that scales by channel.

        The autoencoder of SDXL overflows in half precision and always runs in float32 here.
        """
        if pipe.vae.config.get("latents_mean") is not None:
            raise ValueError("vae/config.json has latents_mean, a scaling by channel that is not supported; "
                             "use an SDXL checkpoint with the original autoencoder")
        embedding = guidance_embedding(pipe, "sdxl", distilled_guidance)
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

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """{"text" [1, L, C], "pooled" [1, C2], "size" [1, 6]}."""
        with torch.no_grad():
            text, _, pooled, _ = self.pipe.encode_prompt(prompt, device=self.pipe.device,
                                                         do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled, "size": self._size(text)}

    def encode_empty(self) -> dict[str, Tensor]:
        """The empty prompt: zeros where the pipeline says `force_zeros_for_empty_prompt`."""
        with torch.no_grad():
            _, text, _, pooled = self.pipe.encode_prompt("", device=self.pipe.device, do_classifier_free_guidance=True)
        return {"text": text, "pooled": pooled, "size": self._size(text)}

    def decode(self, latent: Float[Tensor, "1 Z h w"]) -> Float[Tensor, "1 3 H W"]:
        """The image of a latent."""
        return decode_scaled(self.pipe.vae, latent)

    def _size(self, like: Tensor) -> Float[Tensor, "1 6"]:
        """Original height and width, crop corner, target height and width."""
        height, width = (side * self.pipe.vae_scale_factor for side in self.event[1:])
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=like.dtype, device=like.device)
