"""What a reward is, and how images reach one.

Legend: N images in [-1, 1] of H x W pixels, or N clips [N, F, 3, H, W] of F frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

Metadata = Sequence[Mapping[str, Any]]


class Reward(Protocol):
    """What a prompt source needs: (images, captions, metadata of the prompts) -> one number an image, more is better.

    metadata is empty where prompts have none.
    """

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]: ...


def to_bytes(images: Float[Tensor, "N *F 3 H W"]) -> np.ndarray:
    """8-bit images [N, H, W, 3] or clips [N, F, H, W, 3]; values outside [-1, 1] are clamped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def to_pictures(images: Float[Tensor, "N 3 H W"]) -> list[Image.Image]:
    """8-bit RGB pictures. Raises: ValueError for clips."""
    if images.ndim != 4:
        raise ValueError(f"this reward scores images, and the model makes clips of {images.shape[1]} frames; score "
                         "frames, `reward: {type: frames, reward: {...}}`, or whole clips with a python reward")
    return [Image.fromarray(pixels) for pixels in to_bytes(images)]


def checked(values: Any, count: int, who: str) -> Float[Tensor, "N"]:
    """The rewards as a float32 tensor [N] without gradient.

    Raises: ValueError if they are not `count` finite numbers, saying what came instead.
    """
    try:
        rewards = torch.as_tensor(values).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{who} must return one number an image, got {type(values).__name__} that is no list of "
                         f"numbers ({str(error).splitlines()[0]})") from None
    if tuple(rewards.shape) != (count,):
        raise ValueError(f"{who} must return one number an image, shape ({count},), got {tuple(rewards.shape)}")
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{who} returned {rewards[bad[0]].item()} for image {bad[0]} ({len(bad)} of {count} are not "
                         "finite); return a finite number for every image, e.g. the worst one where scoring fails")
    return rewards
