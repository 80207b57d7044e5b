"""The verifiable reward of the shapes set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image import verifiable
from diffalign_image.rewards.protocol import Metadata
from diffalign_image.shapes import parse


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

    def __call__(self, images: Float[Tensor, "N 3 32 32"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """Mean score of the parts. Raises: ValueError for a caption that is not of the shapes set."""
        return verifiable.read(images, [parse(caption) for caption in captions]).score(self.parts)
