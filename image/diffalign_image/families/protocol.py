"""What the core needs from a text-to-image pipeline of diffusers, and what most of them share.

Legend: N rows, Z latent channels, h x w latent positions, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import Path, Prediction
from diffalign.diffusion.trajectories import Cond


class Network(Protocol):
    """A family's denoiser without guidance; an `nn.Module` around the pipeline's UNet or transformer.

    x, t and the prediction are float32 whatever the weights are, so that densities are computed in float32.
    """

    @property
    def prediction(self) -> Prediction: ...

    def __call__(self, x: Float[Tensor, "N Z h w"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Z h w"]: ...


class Family(Protocol):
    """A loaded pipeline as the core sees it.

    trunk_name: the part of the pipeline that is trained, `unet` or `transformer`. lora_targets: the names of its linear
    layers that LoRA adapts.
    """

    trunk_name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]

    @property
    def pipe(self) -> Any: ...

    @property
    def network(self) -> nn.Module:
        """The trunk as a `Network`."""
        ...

    @property
    def path(self) -> Path:
        """The noise path that the model was trained on."""
        ...

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape (Z, h, w) of one latent."""
        ...

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """The conditioning of one prompt, every leaf [1, ...]."""
        ...

    def encode_empty(self) -> dict[str, Tensor]:
        """The conditioning that the pipeline guides away from when no negative prompt is given."""
        ...


def trunk(family: Family) -> nn.Module:
    """The UNet or transformer that is trained."""
    found: nn.Module = getattr(family.pipe, family.trunk_name)
    return found


def save_lora(family: Family, layers: dict[str, Tensor], folder: File) -> None:
    """Write LoRA weights that the pipeline's `load_lora_weights(folder)` reads."""
    family.pipe.save_lora_weights(folder, **{f"{family.trunk_name}_lora_layers": layers})


def latent_sides(size: Sequence[int] | None, default: int, scale: int, multiple: int) -> tuple[int, int]:
    """(h, w) of the latents of images of `size` (height, width) pixels, or default x default.

    Raises: ValueError unless both sides are positive multiples of `multiple` pixels.
    """
    height, width = (default, default) if size is None else size
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise ValueError(f"model.size must be two multiples of {multiple} pixels for this model, got "
                         f"[{height}, {width}]")
    return height // scale, width // scale


@torch.no_grad()
def decode(family: Family, latents: Float[Tensor, "N Z h w"]) -> Float[Tensor, "N 3 H W"]:
    """Images in [-1, 1] by the autoencoder, one at a time: memory does not grow with N."""
    vae = family.pipe.vae
    raw = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return torch.cat([vae.decode(one.to(vae.dtype)).sample.float() for one in raw.split(1)]).clamp(-1, 1)
