"""The size of an image as a JPEG file, as a reward of either sign (DDPO, sec. 5.1)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.protocol import Metadata, to_pictures


def jpeg_kb(images: Float[Tensor, "N 3 H W"], quality: int = 95) -> Float[Tensor, "N"]:
    """Size of each image as a JPEG file in kB (1,000 bytes), with Huffman tables fitted to it."""
    sizes = []
    for picture in to_pictures(images):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


@spec
class Jpeg:
    """Compressibility: minus the size in kB of the JPEG file (DDPO, sec. 5.1; quality 95 as there)."""

    type: Literal["jpeg"] = "jpeg"
    quality: int = 95

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """-kB; the captions do not matter."""
        return -jpeg_kb(images, self.quality)


@spec
class JpegIncompressibility:
    """Incompressibility: the size in kB of the JPEG file (DDPO, sec. 5.1; quality 95 as there)."""

    type: Literal["jpeg_incompressibility"] = "jpeg_incompressibility"
    quality: int = 95

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """kB; the captions do not matter."""
        return jpeg_kb(images, self.quality)


def _check_quality(quality: int) -> None:
    if not 1 <= quality <= 95:
        raise ValueError(f"quality must lie in 1..95 (Pillow's range for sane files), got {quality}")
