"""Rewards of images, closed unions chosen in a config by `type`, one small file a kind.

Legend: N images in [-1, 1] with one caption each; a reward returns [N], larger is better.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from diffalign_image.rewards.clip import Aesthetic, ClipScore, PickScore
from diffalign_image.rewards.combine import (
    AnyReward,
    Combination,
    Constrained,
    Constraint,
    NormalizedSum,
    PerReward,
    Product,
    Term,
    TrainingReward,
    WeightedSum,
    named_rewards,
    overall,
)
from diffalign_image.rewards.frames import Frames, OneReward
from diffalign_image.rewards.function import PythonFunction
from diffalign_image.rewards.geneval import GenEval
from diffalign_image.rewards.hps import HPS
from diffalign_image.rewards.image_reward import ImageReward
from diffalign_image.rewards.jpeg import Jpeg, JpegIncompressibility, jpeg_kb
from diffalign_image.rewards.judge import Judge
from diffalign_image.rewards.ocr import Ocr
from diffalign_image.rewards.protocol import Metadata, Reward, to_bytes
from diffalign_image.rewards.remote import Remote
from diffalign_image.rewards.shapes import Verifiable

__all__ = ["HPS", "Aesthetic", "AnyReward", "ClipScore", "Combination", "Constrained", "Constraint", "Frames",
           "GenEval", "ImageReward", "Jpeg", "JpegIncompressibility", "Judge", "Metadata", "NormalizedSum",
           "Ocr", "OneReward", "PerReward", "PickScore", "Product", "PythonFunction", "Remote", "Reward",
           "Term", "TrainingReward", "Verifiable", "WeightedSum", "jpeg_kb", "measure", "named_rewards",
           "overall", "to_bytes"]


def measure(images: Float[Tensor, "N 3 32 32"], captions: Sequence[str]) -> dict[str, Float[Tensor, "N"]]:
    """What every evaluation of the shapes set reports: the verifiable score and the JPEG size in kB at quality 95."""
    return {"verifiable": Verifiable()(images, captions), "jpeg_kb": jpeg_kb(images)}
