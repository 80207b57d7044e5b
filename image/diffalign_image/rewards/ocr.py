"""Text in images: how much of the wanted text an OCR engine reads.

Legend: N images of H x W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.function import check_name, load_function
from diffalign_image.rewards.protocol import Metadata, checked, to_bytes

Engine = Callable[[np.ndarray], Sequence[str]]


@spec
class Ocr:
    """1 - edit distance / length of the wanted text, at least 0 (the OCR reward of Flow-GRPO, sec. 5.1 there).

    The wanted text is metadata `text`, or what the prompt has between double quotes; spaces and case do not matter, and
    an image in which it stands somewhere scores 1. engine: `rapidocr` (pip install rapidocr; its models are in the
    package), or FILE.py:NAME or MODULE:NAME of a function from images, uint8 [N, H, W, 3], to N texts.
    """

    type: Literal["ocr"] = "ocr"
    engine: str = "rapidocr"

    def __post_init__(self) -> None:
        if self.engine != "rapidocr":
            check_name(self.engine, "engine")

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """Scores in [0, 1]. Raises: ValueError for a prompt without a wanted text, or without the engine."""
        wanted = [wanted_text(*pair) for pair in zip(captions, list(metadata) or [{}] * len(captions), strict=True)]
        engine = _rapidocr() if self.engine == "rapidocr" else load_function(self.engine, "reward.engine")
        texts = list(engine(to_bytes(images)))
        if len(texts) != len(wanted) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the OCR engine {self.engine} must return one text an image, {len(wanted)}, got "
                             f"{len(texts)}: {str(texts)[:80]}")
        return checked([text_score(*pair) for pair in zip(texts, wanted, strict=True)], len(wanted), "the OCR reward")


def wanted_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """What the image should say. Raises: ValueError if neither the metadata nor the prompt says it."""
    quoted = re.findall(r'"([^"]+)"|\u201c([^\u201d]+)\u201d', prompt)
    text = metadata.get("text", " ".join(a or b for a, b in quoted))
    if not isinstance(text, str) or not _plain(text):
        raise ValueError(f'the OCR reward needs the wanted text: put it into double quotes in the prompt, or into the '
                         f'metadata as {{"text": "..."}}; got the prompt {prompt[:80]!r} and the metadata '
                         f"{str(dict(metadata))[:80]}")
    return text


def text_score(text: str, wanted: str) -> float:
    """1 - min(distance, length) / length on lower-case letters without spaces, 1 where `wanted` stands in `text`."""
    read, goal = _plain(text), _plain(wanted)
    if goal in read:
        return 1.0
    return 1 - min(edit_distance(read, goal), len(goal)) / len(goal)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that turn a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


@lru_cache(maxsize=1)
def _rapidocr() -> Engine:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ValueError("the OCR reward's engine rapidocr is not installed or does not import "
                         f"({error}); `pip install rapidocr`, or set reward.engine to FILE.py:NAME") from None
    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(images: np.ndarray) -> list[str]:
        return [" ".join(engine(np.ascontiguousarray(one[..., ::-1])).txts or ()) for one in images]  # it wants BGR

    return read
