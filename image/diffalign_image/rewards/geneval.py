"""Objects, counts, colors and positions in an image, checked with any object detector (GenEval, Ghosh et al. 2023).

Legend: N images of H x W pixels; a box is (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import colorsys
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.function import check_name, load_function
from diffalign_image.rewards.protocol import Metadata, checked, to_bytes

Box = tuple[float, float, float, float]
Relation = Literal["left of", "right of", "above", "below"]
# Hues in degrees where the next color begins; dark orange is brown, light red or purple is pink.
_HUES = ((15, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (300, "purple"), (345, "pink"),
         (360, "red"))


@dataclass(frozen=True)
class Found:
    """One detected object; color is None where the detector does not say it."""

    box: Box
    label: str
    score: float = 1.0
    color: str | None = None


@spec
class GenEval:
    """The share of a prompt's requirements that an image meets, or 0 and 1 with partial: false.

    metadata as in GenEval's own files: {"include": [{"class": "dog", "count": 2, "color": "red", "position": ["left
    of", 0]}], "exclude": [{"class": "dog", "count": 3}]}; count, color and position are optional, position names an
    earlier entry of include. detector: FILE.py:NAME or MODULE:NAME of a function from images, uint8 [N, H, W, 3], and
    prompts to one list an image of {"box": [left, top, right, bottom], "label": "dog", "score": 0.9}, with "color" if
    it knows it; otherwise the color is read from the pixels of the box. threshold: the least score that counts
    (GenEval: 0.3, and 0.9 for prompts that exclude a number of objects).
    """

    type: Literal["geneval"] = "geneval"
    detector: str
    threshold: float = 0.3
    counting_threshold: float = 0.9
    partial: bool = True

    def __post_init__(self) -> None:
        check_name(self.detector, "detector")

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """Scores in [0, 1]. Raises: ValueError for prompts without requirements, or another answer of the detector."""
        if len(metadata) != len(captions) or not all(one.get("include") for one in metadata):
            raise ValueError('the geneval reward needs metadata with every prompt: a .jsonl file with {"prompt": '
                             '"...", "metadata": {"include": [{"class": "dog", "count": 2}]}}')
        pixels = to_bytes(images)
        answers = load_function(self.detector, "reward.detector")(pixels, list(captions))
        if len(answers) != len(captions):
            raise ValueError(f"the detector {self.detector} must return one list an image, {len(captions)}, got "
                             f"{len(answers)}")
        scores = []
        for image, answer, wanted in zip(pixels, answers, metadata, strict=True):
            least = self.counting_threshold if wanted.get("exclude") else self.threshold
            objects = [one for one in map(_found, answer) if one.score > least]
            met = requirements(image, objects, wanted)
            scores.append(sum(met) / len(met) if self.partial else float(all(met)))
        return checked(scores, len(captions), "the geneval reward")


def requirements(image: np.ndarray, objects: Sequence[Found], wanted: Mapping[str, Any]) -> list[bool]:
    """Which requirements hold, in order: per entry of include its count, color and position, then those of exclude.

    The most certain objects of a class are looked at, as many as the count. Raises: ValueError for a wrong position.
    """
    by_class: dict[str, list[Found]] = {}
    for one in sorted(objects, key=lambda found: -found.score):
        by_class.setdefault(one.label, []).append(one)
    met: list[bool] = []
    groups: list[list[Found]] = []
    for entry in wanted["include"]:
        count = int(entry.get("count", 1))
        group = by_class.get(entry["class"], [])[:count]
        enough = len(group) >= count
        met.append(enough)
        if "color" in entry:
            met.append(enough and all((one.color or color_of(image, one.box)) == entry["color"] for one in group))
        if "position" in entry:
            relation, other = entry["position"]
            if not 0 <= other < len(groups):
                raise ValueError(f"position {entry['position']} must name an earlier entry of include, "
                                 f"0..{len(groups) - 1}")
            met.append(enough and bool(groups[other]) and all(
                relation in relations(a.box, b.box) for a in group for b in groups[other]))
        groups.append(group if enough else [])
    met += [len(by_class.get(entry["class"], [])) < int(entry["count"]) for entry in wanted.get("exclude", [])]
    return met


def relations(a: Box, b: Box, slack: float = 0.1) -> set[Relation]:
    """Where box a lies as seen from box b.

    The offset of the centers, less `slack` times the summed sizes along each axis, must reach half of the distance of
    the centers along an axis (GenEval's rule).
    """
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    distance = math.hypot(*offset)
    if distance == 0:
        return set()
    x, y = (math.copysign(max(abs(o) - slack * size, 0), o) / distance for o, size in zip(offset, sizes, strict=True))
    found: set[Relation] = set()
    if abs(x) > 0.5:
        found.add("left of" if x < 0 else "right of")
    if abs(y) > 0.5:
        found.add("above" if y < 0 else "below")
    return found


def color_of(image: np.ndarray, box: Box) -> str:
    """The most frequent color name among the pixels of the middle half of a box in an image, uint8 [H, W, 3]."""
    left, top, right, bottom = box
    inset_x, inset_y = (right - left) / 4, (bottom - top) / 4
    rows = slice(max(0, math.floor(top + inset_y)), max(1, math.ceil(bottom - inset_y)))
    columns = slice(max(0, math.floor(left + inset_x)), max(1, math.ceil(right - inset_x)))
    pixels = image[rows, columns].reshape(-1, 3)
    if len(pixels) == 0:
        raise ValueError(f"the box {box} lies outside of the image of {image.shape[1]} x {image.shape[0]} pixels; "
                         "boxes are (left, top, right, bottom) in pixels")
    values, counts = np.unique(pixels // 8 * 8 + 4, axis=0, return_counts=True)  # near colors are asked once
    names: Counter[str] = Counter()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        names[color_name(*value)] += count
    return names.most_common(1)[0][0]


def color_name(red: int, green: int, blue: int) -> str:
    """One of GenEval's ten colors or gray, by hue, saturation and brightness."""
    hue, saturation, brightness = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if brightness < 0.2:
        return "black"
    if saturation < 0.15:
        return "white" if brightness > 0.8 else "gray"
    name = next(name for until, name in _HUES if hue * 360 <= until)
    if name == "orange" and brightness < 0.65:
        return "brown"
    if name in ("red", "purple") and saturation < 0.5 and brightness > 0.8:
        return "pink"
    return name


def _found(one: Mapping[str, Any]) -> Found:
    try:
        left, top, right, bottom = (float(side) for side in one["box"])
        return Found((left, top, right, bottom), str(one["label"]), float(one.get("score", 1.0)), one.get("color"))
    except (KeyError, TypeError, ValueError):
        raise ValueError('the detector must return {"box": [left, top, right, bottom], "label": "...", "score": 0.9} '
                         f"for every object, got {str(one)[:80]}") from None
