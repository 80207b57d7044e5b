"""What the core needs from a text-to-image or text-to-video pipeline of diffusers, and what most of them share.

Legend: N rows, *E one latent: [Z, h, w] of an image, [Z, F, h, w] of a clip; H x W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any, ClassVar, Protocol, cast

import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import Path, Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.train import distributed, sharding

TEXT_ENCODER = "text_encoder"  # what the names of a pipeline's text encoders begin with


class Network(Protocol):
    """A family's denoiser without guidance; an `nn.Module` around the pipeline's UNet or transformer.

    x, t and the prediction are float32 whatever the weights are, so that densities are computed in float32.
    """

    @property
    def prediction(self) -> Prediction: ...

    def __call__(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]: ...


class Family(Protocol):
    """A loaded pipeline as the core sees it.

    trunk_name: the part of the pipeline that is trained, `unet` or `transformer`. lora_targets: the names of its linear
    layers that LoRA adapts. frame_rate: frames a second of its clips, None of a model of images.
    """

    trunk_name: ClassVar[str]
    frame_rate: ClassVar[int | None]
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
    def event(self) -> tuple[int, ...]:
        """Shape (Z, h, w) of one latent; of a clip (Z, F, h, w)."""
        ...

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """The conditioning of one prompt, every leaf [1, ...]."""
        ...

    def encode_empty(self) -> dict[str, Tensor]:
        """The conditioning that the pipeline guides away from when no negative prompt is given."""
        ...

    def decode(self, latent: Float[Tensor, "1 *E"]) -> Tensor:
        """The image [1, 3, H, W] or the clip [1, frames, 3, H, W] of one latent, about -1 to 1."""
        ...


def trunk(family: Family) -> nn.Module:
    """The UNet or transformer that is trained."""
    found: nn.Module = getattr(family.pipe, family.trunk_name)
    return found


@contextmanager
def encoders_on(family: Family, device: torch.device) -> Iterator[None]:
    """Within the block the text encoders are on the device, after it in main memory."""
    encoders = [part for name, part in family.pipe.components.items()
                if name.startswith(TEXT_ENCODER) and isinstance(part, nn.Module)]
    for encoder in encoders:
        encoder.to(device)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")


def save_pipeline(family: Family, folder: File) -> None:
    """Write a folder that `from_pretrained` reads; all ranks must ask, the first one writes."""
    pipe, part = family.pipe, cast(Any, trunk(family))
    if sharding.any_sharded(part):
        weights = sharding.gathered(part.state_dict())
        with init_empty_weights():
            plain = type(part).from_config(part.config)
        pipe = copy.copy(pipe)
        setattr(pipe, family.trunk_name, plain)
        if distributed.leads():
            plain.load_state_dict(weights, assign=True)
    if distributed.leads():
        pipe.save_pretrained(folder)


def save_lora(family: Family, layers: dict[str, Tensor], folder: File) -> None:
    """Write LoRA weights that the pipeline's `load_lora_weights(folder)` reads."""
    family.pipe.save_lora_weights(folder, **{f"{family.trunk_name}_lora_layers": layers})


def latent_sides(size: Sequence[int] | None, default: int, scale: int, multiple: int) -> tuple[int, int]:
    """(h, w) of the latents of images of `size` (height, width) pixels, or default x default.

    Raises: ValueError unless both sides are positive multiples of `multiple` pixels.
    """
    sides = (default, default) if size is None else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"model.size must be two multiples of {multiple} pixels, [height, width], for a model of "
                         f"images, got {list(sides)}")
    height, width = sides
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise ValueError(f"model.size must be two multiples of {multiple} pixels for this model, got "
                         f"[{height}, {width}]")
    return height // scale, width // scale


def clip_sides(size: Sequence[int] | None, default: tuple[int, int, int], scale: tuple[int, int], multiple: int
               ) -> tuple[int, int, int]:
    """(F, h, w) of the latents of clips of `size` (frames, height, width); scale: frames and pixels a latent position.

    Raises: ValueError unless frames is one more than a multiple of scale[0], and both sides are positive multiples of
    `multiple` pixels.
    """
    sides = default if size is None else tuple(size)
    if len(sides) != 3 or sides[0] < 1 or (sides[0] - 1) % scale[0]:
        raise ValueError(f"model.size of a video model must be [frames, height, width] with frames one more than a "
                         f"multiple of {scale[0]}, e.g. {list(default)}, got {list(sides)}")
    return (sides[0] - 1) // scale[0] + 1, *latent_sides(sides[1:], 0, scale[1], multiple)


def decode_scaled(vae: Any, latent: Float[Tensor, "1 Z h w"]) -> Float[Tensor, "1 3 H W"]:
    """The image of a latent that one factor and one offset normalize."""
    raw = latent / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    image: Tensor = vae.decode(raw.to(vae.dtype)).sample
    return image


def decode_by_channel(vae: Any, latent: Float[Tensor, "1 Z F h w"]) -> Float[Tensor, "1 frames 3 H W"]:
    """The clip of a latent that a mean and a std of every channel, in the config of the autoencoder, normalize."""
    mean, std = (latent.new_tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    clip: Tensor = vae.decode((latent * std + mean).to(vae.dtype)).sample
    return clip.transpose(1, 2)


@torch.no_grad()
def decode(family: Family, latents: Float[Tensor, "N *E"]) -> Tensor:
    """Images [N, 3, H, W] or clips [N, frames, 3, H, W] in [-1, 1], one at a time: memory does not grow with N."""
    return torch.cat([family.decode(one).float() for one in latents.split(1)]).clamp(-1, 1)
