"""What scores one image, and its mean over frames of a clip.

Legend: N clips of F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.clip import Aesthetic, ClipScore, PickScore
from diffalign_image.rewards.function import PythonFunction
from diffalign_image.rewards.geneval import GenEval
from diffalign_image.rewards.hps import HPS
from diffalign_image.rewards.image_reward import ImageReward
from diffalign_image.rewards.jpeg import Jpeg, JpegIncompressibility
from diffalign_image.rewards.judge import Judge
from diffalign_image.rewards.ocr import Ocr
from diffalign_image.rewards.protocol import Metadata
from diffalign_image.rewards.remote import Remote
from diffalign_image.rewards.shapes import Verifiable

Single = (Jpeg | JpegIncompressibility | Verifiable | PythonFunction | ClipScore | PickScore | Aesthetic | HPS |
          ImageReward | Ocr | GenEval | Judge | Remote)
ImageKind = Annotated[Single, Field(discriminator="type")]


@spec
class Frames:
    """The mean of an image reward over frames of a clip. take: their indices, negative ones from the end; null for all.

    Each frame is scored with the clip's caption and metadata.
    """

    type: Literal["frames"] = "frames"
    reward: ImageKind
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


OneReward = Annotated[Single | Frames, Field(discriminator="type")]
