"""Captioned shapes: two colored shapes in a stated relation, rendered at 32x32 on a gray checked floor.

Legend: N images, O = 2 objects, H = W = 32 pixels. Images are RGB in [-1, 1]; lengths are in pixels, y points down.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIZE = 32
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.8, -0.8, -0.8), "green": (-0.8, 0.8, -0.8), "blue": (-0.8, -0.8, 0.8),
    "yellow": (0.8, 0.8, -0.8), "magenta": (0.8, -0.8, 0.8), "cyan": (-0.8, 0.8, 0.8),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "below", "left of", "right of")
HELD_OUT_PERCENT = 20
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Scene:
    """What a caption says: indices into COLORS and SHAPES of the two objects, and into RELATIONS."""

    colors: tuple[int, int]
    shapes: tuple[int, int]
    relation: int

    @property
    def caption(self) -> str:
        """For example "a red circle above a blue square"."""
        names = [f"a {tuple(COLORS)[c]} {SHAPES[s]}" for c, s in zip(self.colors, self.shapes)]
        return f"{names[0]} {RELATIONS[self.relation]} {names[1]}"

    @property
    def held_out(self) -> bool:
        """Whether the scene is kept from all training.

        A hash of the scene, not of the words: "A above B" and "B below A" fall on the same side.
        """
        first, second = zip(self.colors, self.shapes)
        if self.relation % 2:  # below, right of: say it the other way round
            first, second = second, first
        key = f"{first}{second}{self.relation // 2}".encode()
        return hashlib.sha256(key).digest()[0] * 100 < HELD_OUT_PERCENT * 256


@lru_cache(maxsize=2)
def scenes(split: Split) -> tuple[Scene, ...]:
    """All scenes of a split: two objects of different colors, 1,080 scenes of which about a fifth are held out."""
    colors = itertools.permutations(range(len(COLORS)), 2)
    kinds = range(len(SHAPES))
    every = (Scene((c1, c2), (s1, s2), relation) for (c1, c2), s1, s2, relation
             in itertools.product(colors, kinds, kinds, range(len(RELATIONS))))
    return tuple(scene for scene in every if scene.held_out == (split == "held_out"))


@lru_cache(maxsize=1)
def _by_caption() -> dict[str, Scene]:
    return {scene.caption: scene for split in ("train", "held_out") for scene in scenes(split)}


def parse(caption: str) -> Scene:
    """The scene of a caption.

    Raises: ValueError for a caption outside the set, with an example of one inside.
    """
    scene = _by_caption().get(" ".join(caption.lower().split()))
    if scene is None:
        raise ValueError(f"caption {caption!r} is not of the form 'a COLOR SHAPE RELATION a COLOR SHAPE' with two "
                         f"different colors of {', '.join(COLORS)}; shapes {', '.join(SHAPES)}; relations "
                         f"{', '.join(RELATIONS)}; for example 'a red circle above a blue square'")
    return scene


def palette() -> Float[Tensor, "C 3"]:
    """RGB of COLORS in [-1, 1]."""
    return torch.tensor(list(COLORS.values()))


def coverage(center: Float[Tensor, "*B 2"], area: Float[Tensor, "*B"], shape: Int[Tensor, "*B"]
             ) -> Float[Tensor, "*B 32 32"]:
    """Anti-aliased coverage in [0, 1] of a shape with this centroid (x, y) and area in square pixels."""
    rows, areas, kinds = center.reshape(-1, 2), area.reshape(-1), shape.reshape(-1)
    cover = torch.empty(len(kinds), SIZE, SIZE)
    grid = torch.arange(SIZE) + 0.5
    for index, name in enumerate(SHAPES):
        mine = kinds == index
        dx = grid[None, None, :] - rows[mine, 0, None, None]
        dy = grid[None, :, None] - rows[mine, 1, None, None]
        cover[mine] = (0.5 - _signed_distance(name, dx, dy, areas[mine, None, None])).clamp(0, 1)
    return cover.reshape(*shape.shape, SIZE, SIZE)


def _signed_distance(name: str, dx: Tensor, dy: Tensor, area: Tensor) -> Tensor:
    if name == "circle":
        return (dx**2 + dy**2).sqrt() - (area / math.pi).sqrt()
    if name == "square":
        return torch.maximum(dx.abs(), dy.abs()) - area.sqrt() / 2
    slanted = dx.abs() * (math.sqrt(3) / 2) - dy / 2  # triangle: equilateral, one corner up, area 3 sqrt(3) inradius^2
    return torch.maximum(dy.expand_as(slanted), slanted) - (area / (3 * math.sqrt(3))).sqrt()


def render(batch: list[Scene], generator: torch.Generator) -> Float[Tensor, "N 3 32 32"]:
    """One image per scene with random positions, sizes, brightness, and floor level and contrast.

    No caption speaks of the floor's contrast, uniform from none to 0.7 between a light and a dark tile: a model can
    give it up for a smaller file without touching an object.
    """
    n = len(batch)
    colors = torch.tensor([scene.colors for scene in batch])
    shapes = torch.tensor([scene.shapes for scene in batch])
    center, area = _layout(torch.tensor([scene.relation for scene in batch]), shapes, generator)
    cover = coverage(center, area, shapes)[:, :, None]
    rgb = palette()[colors][..., None, None] * (1 + 0.15 * _uniform((n, 2, 1, 1, 1), generator))
    floor = 0.15 * _uniform((n, 1, 1, 1), generator) + 0.35 * torch.rand((n, 1, 1, 1), generator=generator) * _checks()
    image = floor.expand(n, 3, SIZE, SIZE)
    for o in range(2):
        image = image * (1 - cover[:, o]) + rgb[:, o] * cover[:, o]
    return image


def _checks() -> Float[Tensor, "32 32"]:
    """Tiles of 4 pixels, +1 and -1 in turn."""
    tile = torch.arange(SIZE) // 4 % 2
    return 1.0 - 2.0 * (tile[:, None] ^ tile[None, :])


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * 2 - 1


def _layout(relation: Tensor, shapes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centroids [N, 2, 2] and areas [N, 2] that obey the relation and keep both objects inside the image."""
    n = len(relation)
    area = (8.7 + 1.2 * _uniform((n, 2), generator)) ** 2
    along = torch.tensor([8.0, 24.0]) + 1.2 * _uniform((n, 2), generator)
    across = 16 + 5 * _uniform((n, 2), generator)
    along = torch.where((relation % 2 == 1)[:, None], along.flip(1), along)
    vertical = (relation < 2)[:, None]
    x, y = torch.where(vertical, across, along), torch.where(vertical, along, across)
    inradius = (area / (3 * math.sqrt(3))).sqrt()
    drop = torch.where(shapes == SHAPES.index("triangle"), inradius / 2, torch.zeros_like(area))
    return torch.stack([x, y + drop], -1), area  # a triangle's centroid lies below the middle of its box


def training_batch(size: int, generator: torch.Generator, split: Split = "train"
                   ) -> tuple[Float[Tensor, "N 3 32 32"], list[str]]:
    """Random scenes of a split, rendered, and their captions."""
    pool = scenes(split)
    picks = torch.randint(len(pool), (size,), generator=generator).tolist()
    chosen = [pool[i] for i in picks]
    return render(chosen, generator), [scene.caption for scene in chosen]
