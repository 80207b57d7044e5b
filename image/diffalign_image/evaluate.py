"""Evaluation on fixed captions and noise: rewards with intervals, exact KL to the pre-trained model, picture grids.

Legend: P prompts x G images of each = N rows; K denoising steps.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from diffalign.diffusion import ODE
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser, Policy, num_rows, select_rows
from diffalign.policy.steering import Steers
from diffalign.spec import spec
from diffalign.train.statistics import mean_interval
from diffalign_image.autoencoder import decode_latents
from diffalign_image.pipeline import Parts
from diffalign_image.rewards import measure, to_bytes
from diffalign_image.shapes import Split, scenes
from diffalign_image.text import encode_captions

Sampler = Literal["stochastic", "ode"]
_BATCH = 64
_CELL, _THUMBNAIL = 96, 192  # pixels of a picture in a grid, at least and at most


@spec
class Evaluation:
    """How a job is evaluated: P captions of the split, G images of each; seed fixes captions and noise.

    The same seed before and after training gives the same captions and the same initial noise.
    """

    prompts: int = 64
    images_per_prompt: int = 4
    split: Split = "held_out"
    seed: int = 1000
    kl_images: int = 64

    def __post_init__(self) -> None:
        most = len(scenes(self.split))
        if not 2 <= self.prompts <= most:
            raise ValueError(f"prompts must lie in 2..{most} (captions of the {self.split} split; an interval "
                             f"needs two), got {self.prompts}")
        if self.images_per_prompt < 1 or self.kl_images < 2:
            raise ValueError(f"need images_per_prompt >= 1 and kl_images >= 2, got {self.images_per_prompt} and "
                             f"{self.kl_images}")


@dataclass(frozen=True)
class Drawn:
    """Images [N, 3, H, W] or clips [N, F, 3, H, W] in [-1, 1] with their captions."""

    images: Tensor
    captions: list[str]


def pick_captions(spec: Evaluation) -> list[str]:
    """P distinct captions of the split, the same for the same seed."""
    pool = scenes(spec.split)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(spec.seed))
    return [pool[i].caption for i in order[: spec.prompts].tolist()]


def sampler_policy(policy: DiffusionPolicy, sampler: Sampler) -> DiffusionPolicy:
    """The policy sampled by its own stochastic kernel or by the ODE on the same schedule."""
    return policy.with_sampler(ODE()) if sampler == "ode" else policy


def describe(policy: DiffusionPolicy) -> str:
    """The sampler in words, e.g. "ode(8 steps)"."""
    name = type(policy.kernel).__name__.lower()
    how = "stochastic" if policy.kernel.stochastic else "deterministic"
    return f"{name}({policy.schedule.steps} steps, shift {policy.schedule.shift:g}, {how})"


def draw(policy: DiffusionPolicy, parts: Parts, captions: Sequence[str], *, seed: int) -> Drawn:
    """One image per caption."""
    cond = encode_captions(parts.tokenizer, parts.text_encoder, captions)
    return Drawn(images_of(policy, parts, cond, seed=seed), list(captions))


def images_of(policy: Policy, parts: Parts, cond: Cond, *, seed: int) -> Float[Tensor, "N 3 H W"]:
    """One image per row of an encoded condition."""
    generator = torch.Generator().manual_seed(seed)
    latents = [policy.act(select_rows(cond, rows), generator=generator).action for rows in _blocks(num_rows(cond))]
    return decode_latents(parts.autoencoder, torch.cat(latents))


def over_prompts(values: Float[Tensor, "N"], images_per_prompt: int) -> dict[str, Any]:
    """Mean of a reward with its 95 % interval over the means of the prompts."""
    mean, low, high = mean_interval(values.double().reshape(-1, images_per_prompt).mean(1).tolist())
    return {"mean": mean, "interval": [low, high]}


def evaluate(policy: DiffusionPolicy, parts: Parts, spec: Evaluation, *, sampler: Sampler = "ode",
             reference: Denoiser | None = None) -> dict[str, Any]:
    """Rewards by name with 95 % intervals over prompt means, and the exact KL to the reference in nats per image."""
    captions = pick_captions(spec)
    chosen = sampler_policy(policy, sampler)
    drawn = draw(chosen, parts, [c for c in captions for _ in range(spec.images_per_prompt)], seed=spec.seed)
    result = {**summary(drawn, spec), "sampler": describe(chosen)}
    if reference is not None and (policy.kernel.stochastic or isinstance(policy.denoiser, Steers)):
        some = [captions[i % len(captions)] for i in range(spec.kl_images)]
        result |= kl_summary(policy, reference, encode_captions(parts.tokenizer, parts.text_encoder, some), spec.seed)
    return result


def summary(drawn: Drawn, spec: Evaluation) -> dict[str, Any]:
    """Rewards by name with 95 % intervals over prompt means, and what was evaluated."""
    rewards = {name: over_prompts(values, spec.images_per_prompt)
               for name, values in measure(drawn.images, drawn.captions).items()}
    return {"rewards": rewards, "split": spec.split, "prompts": spec.prompts, "images": len(drawn.captions),
            "seed": spec.seed}


def kl_summary(policy: DiffusionPolicy, reference: Denoiser, cond: Cond, seed: int) -> dict[str, Any]:
    """Mean of `path_kl` with its 95 % interval, and the sampler whose chain it is."""
    mean, low, high = mean_interval(path_kl(policy, reference, cond, seed=seed).tolist())
    return {"kl_nats": mean, "kl_interval": [low, high], "kl_sampler": describe(policy)}


@torch.no_grad()
def path_kl(policy: DiffusionPolicy, reference: Denoiser, cond: Cond, *, seed: int) -> Float[Tensor, "N"]:
    """KL(policy || reference) of the whole chain in nats, one estimate per row of cond [N].

    Sum over the start and the stochastic steps of the exact Gaussian KL at the states that the policy visits; its
    mean over trajectories is the exact KL of the path distributions (chain rule) and bounds that of the images.
    """
    device = next(iter(cond.values())).device
    generator, anchor = torch.Generator(device).manual_seed(seed), replace(policy, denoiser=reference)
    everywhere = torch.ones(policy.schedule.steps, dtype=torch.bool)
    totals = []
    for rows in _blocks(num_rows(cond)):
        some = select_rows(cond, rows)
        trajectory = policy.act(some, generator=generator, trained=everywhere.clone()).trajectory
        total = policy.start(some).kl(anchor.start(some))
        for k in trajectory.trained.nonzero().flatten().tolist():
            x, t, t_next = trajectory.x[:, k], *(trajectory.times[k + i].expand(len(rows)) for i in (0, 1))
            steps = [p.step(x, t, t_next, *p.predict(x, t, some), some) for p in (policy, anchor)]
            total += steps[0].kl(steps[1])
        totals.append(total)
    return torch.cat(totals)


def save_grid(drawn: Drawn, target: Path, *, columns: int = 8) -> Path:
    """Write the images as a PNG with captions below; small ones are enlarged, large ones reduced to 192 pixels.

    A clip becomes a row of at most `columns` frames.
    """
    if drawn.images.ndim == 5:
        columns = min(columns, drawn.images.shape[1])
        drawn = contact_sheet(drawn, columns)
    pictures = [_thumbnail(Image.fromarray(pixels)) for pixels in to_bytes(drawn.images)]
    width, height = pictures[0].size
    rows, text = -(-len(pictures) // columns), 44
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, drawn.captions, strict=True)):
        corner = (i % columns) * (width + 4), (i // columns) * (height + text)
        sheet.paste(picture, corner)
        below = corner[0] + 1, corner[1] + height + 1
        pen.multiline_text(below, _wrapped(caption, width), fill="black", font_size=10, spacing=1)
    sheet.save(target)
    return target


def save_film(drawn: Drawn, target: Path, *, frame_rate: int) -> Path:
    """Write the clips side by side as one MP4 (H.264), all their frames in their own size."""
    import imageio.v2 as imageio

    clips = to_bytes(drawn.images)
    # no padding to blocks of 16: what plays is what the model made
    writer: Any = imageio.get_writer(target, fps=frame_rate, codec="libx264", macro_block_size=1)
    with writer as film:
        for frame in range(clips.shape[1]):
            film.append_data(np.concatenate(clips[:, frame], axis=1))
    return target


def contact_sheet(drawn: Drawn, frames: int) -> Drawn:
    """Evenly spaced frames, the first and the last among them, of one clip after another; numbered after the first."""
    picked = torch.linspace(0, drawn.images.shape[1] - 1, frames).round().long().tolist()
    captions = [caption if i == 0 else f"frame {i}" for caption in drawn.captions for i in picked]
    return Drawn(drawn.images[:, picked].flatten(0, 1), captions)


def _thumbnail(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    if side > _THUMBNAIL:
        return picture.resize((picture.width * _THUMBNAIL // side, picture.height * _THUMBNAIL // side))
    zoom = max(1, _CELL // side)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def _wrapped(caption: str, width: int) -> str:
    """At most three lines of about 5 pixels a letter."""
    return "\n".join(textwrap.wrap(caption, max(12, width // 5), max_lines=3, placeholder=" ..."))


def _blocks(rows: int) -> Iterator[Tensor]:
    yield from torch.arange(rows).split(_BATCH)
