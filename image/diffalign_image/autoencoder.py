"""The autoencoder: diffusers' AutoencoderKL on the rendered shapes, 32x32 pixels to 8x8 latent positions.

Alignment in a latent space is what makes transition gradients (DDPO, Flow-GRPO) usable at a few hundred images an
update: their noise has one dimension per number of the event, 3,072 in pixels and 256 here (docs/image_signal.md).

Legend: N images, Z latent channels. Latents are scaled as in SD3: (z - shift_factor) * scaling_factor has unit std.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign.train.state import Iteration, TrainState
from diffalign.train.supervised import Metrics, Pretraining, regress
from diffalign_image.shapes import training_batch

REDUCTION = 4  # pixels per latent position, along each side
_BLOCK = 64
_SCALED_ON = 512  # images that fix shift_factor and scaling_factor


@spec
class AutoencoderTraining:
    """Mean squared error of the reconstruction plus kl_weight * KL(posterior || standard normal), a mean over latents.

    channels: of the three resolutions, 32, 16 and 8 positions a side.
    """

    latent_channels: int = 4
    channels: tuple[int, int, int] = (16, 32, 32)
    kl_weight: float = 1e-3
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if any(c < 8 or c % 8 for c in self.channels):
            raise ValueError(f"channels must be multiples of 8 (the group norms have 8 groups), got {self.channels}")
        if self.latent_channels < 1 or not self.kl_weight >= 0:
            raise ValueError(f"need latent_channels >= 1 and kl_weight >= 0, got {self.latent_channels} and "
                             f"{self.kl_weight}")


def build_autoencoder(plan: AutoencoderTraining, seed: int) -> AutoencoderKL:
    """Untrained, initialised from the seed without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=plan.latent_channels, block_out_channels=plan.channels,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
            norm_num_groups=8, mid_block_add_attention=False, sample_size=REDUCTION * 8, scaling_factor=1.0,
            shift_factor=0.0)


def autoencoder_state(plan: AutoencoderTraining, autoencoder: AutoencoderKL, seed: int) -> TrainState:
    """The fresh training state of an autoencoder."""
    return TrainState.create({"autoencoder": autoencoder}, {"autoencoder": plan.learning_rate}, beta2=0.99, seed=seed)


def train_autoencoder(plan: AutoencoderTraining, state: TrainState) -> Iterator[Iteration]:
    """Train state.modules["autoencoder"] on freshly rendered images and yield after every step up to plan.steps."""
    autoencoder = state.modules["autoencoder"]
    assert isinstance(autoencoder, AutoencoderKL)

    def loss(generator: torch.Generator) -> tuple[Tensor, Metrics]:
        images, _ = training_batch(plan.batch_size, generator)
        posterior = autoencoder.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        error = (autoencoder.decode(latents).sample - images).square().mean()
        return error + plan.kl_weight * kl, {}

    fitting = Pretraining(steps=plan.steps, batch_size=plan.batch_size, warmup_steps=50)
    yield from regress(fitting, loss, state)


def freeze(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """The trained autoencoder in evaluation mode, with scaled latents of mean 0 and std 1 over rendered images."""
    autoencoder.eval().requires_grad_(False).register_to_config(shift_factor=0.0, scaling_factor=1.0)
    images, _ = training_batch(_SCALED_ON, torch.Generator().manual_seed(0))
    latents = encode_images(autoencoder, images)
    autoencoder.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    return autoencoder


@torch.no_grad()
def encode_images(autoencoder: AutoencoderKL, images: Float[Tensor, "N 3 32 32"]) -> Float[Tensor, "N Z 8 8"]:
    """Scaled posterior means."""
    means = torch.cat([autoencoder.encode(block).latent_dist.mean for block in images.split(_BLOCK)])
    scaled: Tensor = (means - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    return scaled


@torch.no_grad()
def decode_latents(autoencoder: AutoencoderKL, latents: Float[Tensor, "N Z 8 8"]) -> Float[Tensor, "N 3 32 32"]:
    """Images in [-1, 1]."""
    raw = latents / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    return torch.cat([autoencoder.decode(block).sample for block in raw.split(_BLOCK)]).clamp(-1, 1)


@dataclass(frozen=True)
class LatentPool:
    """Rendered training images, encoded once: flow matching draws from them instead of encoding in every step."""

    latents: Float[Tensor, "N Z 8 8"]
    captions: list[str]


def render_pool(autoencoder: AutoencoderKL, images: int, generator: torch.Generator) -> LatentPool:
    """This many random training scenes."""
    latents: list[Tensor] = []
    captions: list[str] = []
    while len(captions) < images:
        pictures, texts = training_batch(min(_BLOCK, images - len(captions)), generator)
        latents.append(encode_images(autoencoder, pictures))
        captions += texts
    return LatentPool(torch.cat(latents), captions)
