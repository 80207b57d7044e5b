"""Rewards of images, a closed union chosen in a config by `type`, one small file a kind.

Legend: N images in [-1, 1] with one caption each; a reward returns [N], larger is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.clip import Aesthetic, ClipScore, PickScore
from diffalign_image.rewards.function import PythonFunction
from diffalign_image.rewards.jpeg import Jpeg, JpegIncompressibility, jpeg_kb
from diffalign_image.rewards.protocol import Metadata, Reward, to_bytes
from diffalign_image.rewards.remote import Remote
from diffalign_image.rewards.shapes import Verifiable

__all__ = ["Aesthetic", "AnyReward", "ClipScore", "Frames", "Jpeg", "JpegIncompressibility", "Metadata", "PickScore",
           "PythonFunction", "Remote", "Reward", "Term", "Verifiable", "WeightedSum", "jpeg_kb", "measure", "to_bytes"]

Single = Jpeg | JpegIncompressibility | Verifiable | PythonFunction | ClipScore | PickScore | Aesthetic | Remote


@spec
class Frames:
    """The mean of an image reward over frames of a clip. take: their indices, negative ones from the end; null for all.

    Each frame is scored with the clip's caption and metadata.
    """

    type: Literal["frames"] = "frames"
    reward: Annotated[Single, Field(discriminator="type")]
    take: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.take is not None and not self.take:
            raise ValueError("take must name frames, e.g. [0, -1], or be null for all; got []")

    def __call__(self, images: Float[Tensor, "N F 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """One number a clip. Raises: ValueError for images, or for frames that the clips have not."""
        if images.ndim != 5:
            raise ValueError("reward.type=frames scores clips, and the model makes images; use the reward inside it")
        count = images.shape[1]
        take = range(count) if self.take is None else self.take
        if any(not -count <= i < count for i in take):
            raise ValueError(f"reward.take: {list(take)} names frames that clips of {count} frames have not")
        repeats = len(take)
        frames = images[:, list(take)].flatten(0, 1)
        scores = self.reward(frames, [caption for caption in captions for _ in range(repeats)],
                             [one for one in metadata for _ in range(repeats)])
        return scores.reshape(-1, repeats).mean(1)


@spec
class Term:
    """A reward and its weight in a sum."""

    weight: float
    reward: Annotated[Single | Frames, Field(discriminator="type")]


@spec
class WeightedSum:
    """Sum of weight * reward. The weights carry the exchange rate between units (kB, score)."""

    type: Literal["weighted_sum"] = "weighted_sum"
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("weighted_sum needs at least one term, got none")

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """The weighted sum."""
        return torch.stack([term.weight * term.reward(images, captions, metadata) for term in self.terms]).sum(0)


AnyReward = Annotated[Single | Frames | WeightedSum, Field(discriminator="type")]


def measure(images: Float[Tensor, "N 3 32 32"], captions: Sequence[str]) -> dict[str, Float[Tensor, "N"]]:
    """What every evaluation of the shapes set reports: the verifiable score and the JPEG size in kB at quality 95."""
    return {"verifiable": Verifiable()(images, captions), "jpeg_kb": jpeg_kb(images)}
