"""Rewards of images, a closed union chosen in a config by `type`.

Legend: N images in [-1, 1] with one caption each; a reward returns [N], larger is better.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from torch import Tensor

from diffalign.spec import spec
from diffalign_image import verifiable
from diffalign_image.shapes import parse


class Reward(Protocol):
    """What a prompt source needs: (images, captions) -> one number an image."""

    def __call__(self, images: Float[Tensor, "N 3 32 32"], captions: Sequence[str]) -> Float[Tensor, "N"]: ...


def to_bytes(images: Float[Tensor, "N 3 32 32"]) -> np.ndarray:
    """8-bit images [N, H, W, 3]; values outside [-1, 1] are clamped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def jpeg_kb(images: Float[Tensor, "N 3 32 32"], quality: int = 95) -> Float[Tensor, "N"]:
    """Size of each image as a JPEG file in kB (1,000 bytes), with Huffman tables fitted to it."""
    sizes = []
    for pixels in to_bytes(images):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


@spec
class Jpeg:
    """Compressibility: minus the size in kB of the JPEG file (DDPO, sec. 5.1; quality 95 as there)."""

    type: Literal["jpeg"] = "jpeg"
    quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality must lie in 1..95 (Pillow's range for sane files), got {self.quality}")

    def __call__(self, images: Float[Tensor, "N 3 32 32"], captions: Sequence[str]) -> Float[Tensor, "N"]:
        """-kB; the captions do not matter."""
        return -jpeg_kb(images, self.quality)


@spec
class Verifiable:
    """The share in [0, 1] of a caption's five parts (two colors, two shapes, the relation) that the image shows.

    parts: which of them count, e.g. [color, relation] to ask for two compact objects of the stated colors in the stated
    relation, of any shape.
    """

    type: Literal["verifiable"] = "verifiable"
    parts: tuple[verifiable.Part, ...] = ("color", "shape", "relation")

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts must name some of color, shape, relation once each, got {list(self.parts)}")

    def __call__(self, images: Float[Tensor, "N 3 32 32"], captions: Sequence[str]) -> Float[Tensor, "N"]:
        """Mean score of the parts. Raises: ValueError for a caption that is not of the shapes set."""
        return verifiable.read(images, [parse(caption) for caption in captions]).score(self.parts)


@spec
class Term:
    """A reward and its weight in a sum."""

    weight: float
    reward: Annotated[Jpeg | Verifiable, Field(discriminator="type")]


@spec
class WeightedSum:
    """Sum of weight * reward. The weights carry the exchange rate between units (kB, score)."""

    type: Literal["weighted_sum"] = "weighted_sum"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("weighted_sum needs at least one term, got none")

    def __call__(self, images: Float[Tensor, "N 3 32 32"], captions: Sequence[str]) -> Float[Tensor, "N"]:
        """The weighted sum."""
        return torch.stack([term.weight * term.reward(images, captions) for term in self.terms]).sum(0)


AnyReward = Annotated[Jpeg | Verifiable | WeightedSum, Field(discriminator="type")]


def measure(images: Float[Tensor, "N 3 32 32"], captions: Sequence[str]) -> dict[str, Float[Tensor, "N"]]:
    """What every evaluation reports: the verifiable score and the JPEG size in kB at quality 95."""
    return {"verifiable": Verifiable()(images, captions), "jpeg_kb": jpeg_kb(images)}
