"""Reads colors, shapes and their relation off the pixels and compares them with a caption.

Legend: N images, O = 2 stated objects, S shapes, H = W = 32 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign_image.shapes import SHAPES, SIZE, Scene, coverage, palette

_COLOR_RADIUS = 0.9  # a pixel this far from every palette color and from the gray background is none of them
_MIN_AREA, _MAX_AREA = 40.0, 140.0  # square pixels; rendered objects have 56 to 98
_SHARPNESS = 25.0  # softmax temperature over shapes: an overlap 0.1 better than every other shape's is a clear win


Part = Literal["color", "shape", "relation"]
PARTS: tuple[Part, ...] = ("color", "shape", "relation")


@dataclass(frozen=True)
class Parts:
    """Scores in [0, 1] per image: color present and shape right of each stated object, and the relation."""

    color: Float[Tensor, "N 2"]
    shape: Float[Tensor, "N 2"]
    relation: Float[Tensor, "N"]

    def score(self, parts: Sequence[Part] = PARTS) -> Float[Tensor, "N"]:
        """Mean of the stated parts, of which color and shape have one per object."""
        columns = {"color": self.color, "shape": self.shape, "relation": self.relation[:, None]}
        return torch.cat([columns[part] for part in parts], 1).mean(1)

    @property
    def all_right(self) -> Bool[Tensor, "N"]:
        """Whether every part scores at least one half."""
        return torch.cat([self.color, self.shape, self.relation[:, None]], 1).amin(1) >= 0.5


@torch.no_grad()
def read(images: Float[Tensor, "N 3 32 32"], scenes: Sequence[Scene]) -> Parts:
    """How well each image shows its scene.

    Every pixel gets the nearest of the palette colors and gray, or none. The pixels of a stated color, all of them,
    are one object: templates of all shapes are rendered at the object's centroid and area, and overlaps
    (intersection over union) compared. A color counts as present if its pixels form one compact object of plausible
    area; a shape is right if its template overlaps well and better than the others; the relation needs both objects.
    Pixels of unstated colors or of none void the score gradually, from 5 % to 20 % of the image.
    """
    colors = torch.tensor([scene.colors for scene in scenes])
    shapes = torch.tensor([scene.shapes for scene in scenes])
    labels = _label(images)
    masks = (labels[:, None] == colors[..., None, None]).float()
    area = masks.sum((2, 3))
    center = _centroid(masks, area)
    overlap = _overlaps(masks, center, area)
    purity = _purity(labels, masks)[:, None]
    present = purity * _compact(overlap.amax(2)) * _ramp(area, 0.5 * _MIN_AREA, _MIN_AREA) * (
        _ramp(-area, -1.5 * _MAX_AREA, -_MAX_AREA))
    stated = overlap.gather(2, shapes[..., None])[..., 0]
    best = torch.softmax(_SHARPNESS * overlap, 2).gather(2, shapes[..., None])[..., 0]
    shape = present * _ramp(best, 0.2, 0.8) * _ramp(stated, 0.6, 0.82)
    relation = _relation(center, torch.tensor([scene.relation for scene in scenes])) * present.amin(1)
    return Parts(present, shape, relation)


def _ramp(x: Tensor, low: float, high: float) -> Tensor:
    return ((x - low) / (high - low)).clamp(0, 1)


def _compact(overlap: Tensor) -> Tensor:
    return _ramp(overlap, 0.45, 0.7)


def _label(images: Tensor) -> Tensor:
    """Palette index per pixel [N, H, W]; -1 is background, -2 is none."""
    gray = images.mean(1, keepdim=True).clamp(-0.4, 0.4).expand_as(images)
    to_gray = (images - gray).square().sum(1)
    corners = palette()
    distance = (images.square().sum(1)[:, None] - 2 * torch.einsum("nchw,pc->nphw", images, corners)
                + corners.square().sum(1)[None, :, None, None])
    nearest, index = distance.min(1)
    index = torch.where(to_gray <= nearest, torch.full_like(index, -1), index)
    far = torch.minimum(to_gray, nearest) > _COLOR_RADIUS**2
    return torch.where(far, torch.full_like(index, -2), index)


def _centroid(masks: Tensor, area: Tensor) -> Tensor:
    grid = torch.arange(SIZE) + 0.5
    weight = area.clamp(min=1)
    return torch.stack([(masks.sum(2) @ grid) / weight, (masks.sum(3) @ grid) / weight], -1)


def _overlaps(masks: Tensor, center: Tensor, area: Tensor) -> Float[Tensor, "N 2 S"]:
    n = masks.shape[0]
    kinds = torch.arange(len(SHAPES)).expand(n, 2, len(SHAPES))
    template = coverage(center[:, :, None].expand(n, 2, len(SHAPES), 2), area[:, :, None].expand_as(kinds), kinds)
    both = (masks[:, :, None] * template).sum((3, 4))
    return both / (area[:, :, None] + template.sum((3, 4)) - both).clamp(min=1)


def _purity(labels: Tensor, masks: Tensor) -> Tensor:
    stray = ((labels != -1).float() - masks.sum(1)).mean((1, 2))
    return _ramp(-stray, -0.20, -0.05)


def _relation(center: Tensor, relation: Tensor) -> Tensor:
    """1 if the stated direction wins by 6 pixels over half the sideways distance, falling to 0."""
    gap = center[:, 1] - center[:, 0]
    gap = torch.where((relation % 2 == 1)[:, None], -gap, gap)
    along = torch.where(relation < 2, gap[:, 1], gap[:, 0])
    across = torch.where(relation < 2, gap[:, 0], gap[:, 1])
    return _ramp(along - across.abs() / 2, 0.0, 6.0)
