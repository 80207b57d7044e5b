"""The model: a diffusers U-Net on space-to-depth pixels, seen by the core as a flow-predicting denoiser.

Legend: N images, L tokens, C text channels. Events are [3, 32, 32]; the U-Net works on [12, 16, 16] (each 2x2 patch of
pixels is one position), a mere reordering of the numbers that makes it several times cheaper than on single pixels. Two
more input channels hold the row and the column of a position: in pure noise nothing else tells above from below.
"""

from __future__ import annotations

import math

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from diffalign.diffusion import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.spec import spec
from diffalign_image.shapes import SIZE
from diffalign_image.text import build_text_encoder, build_tokenizer, encode

EVENT = (3, SIZE, SIZE)
TIME_SCALE = 1000.0  # path time 1 is diffusers' timestep 1000


@spec
class ShapesModel:
    """Sizes of the model. patch: side of the pixel square that is one position of the U-Net."""

    channels: tuple[int, ...] = (32, 64)
    blocks_per_level: int = 1
    patch: int = 2
    text_channels: int = 64
    text_layers: int = 2

    def __post_init__(self) -> None:
        if not self.channels or any(c < 8 or c % 8 for c in self.channels):
            raise ValueError(f"channels must be multiples of 8 (the group norms have 8 groups), got {self.channels}")
        smallest = self.patch * 2 ** (len(self.channels) - 1)
        if self.patch < 1 or SIZE % smallest:
            raise ValueError(f"patch={self.patch} with {len(self.channels)} levels needs images divisible by "
                             f"{smallest}; {SIZE}x{SIZE} is not")


class TextUNet(nn.Module):
    """The denoiser that is aligned: cond = {"text": [N, L, C], "pooled": [N, C]} from the frozen text encoder."""

    prediction: Prediction = "flow"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.patch = math.isqrt(unet.config.out_channels // 3)
        line = torch.linspace(-1, 1, SIZE // self.patch)
        self.register_buffer("place", torch.stack(torch.meshgrid(line, line, indexing="ij")), persistent=False)

    def forward(self, x: Float[Tensor, "N 3 32 32"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N 3 32 32"]:
        """The velocity eps - x0."""
        place = self.get_buffer("place").expand(x.shape[0], -1, -1, -1)
        placed = torch.cat([pixel_unshuffle(x, self.patch), place], 1)
        velocity = self.unet(placed, t * TIME_SCALE, encoder_hidden_states=cond["text"], class_labels=cond["pooled"],
                             return_dict=False)[0]
        return pixel_shuffle(velocity, self.patch)


class JointDenoiser(nn.Module):
    """The denoiser that is pre-trained: cond = {"tokens": [N, L]}; text encoder and U-Net learn together."""

    prediction: Prediction = "flow"

    def __init__(self, denoiser: TextUNet, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder

    def forward(self, x: Float[Tensor, "N 3 32 32"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N 3 32 32"]:
        """The velocity eps - x0."""
        velocity: Tensor = self.denoiser(x, t, encode(self.text_encoder, cond["tokens"]))
        return velocity


def build(model: ShapesModel, seed: int) -> tuple[JointDenoiser, PreTrainedTokenizerFast]:
    """Untrained denoiser and its tokenizer, initialised from the seed without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        encoder = build_text_encoder(tokenizer, channels=model.text_channels, layers=model.text_layers)
        return JointDenoiser(TextUNet(_build_unet(model)), encoder), tokenizer


def _build_unet(model: ShapesModel) -> UNet2DConditionModel:
    levels, pixels = len(model.channels), 3 * model.patch**2
    return UNet2DConditionModel(
        sample_size=SIZE // model.patch, in_channels=pixels + 2, out_channels=pixels,
        block_out_channels=model.channels, layers_per_block=model.blocks_per_level,
        down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn", cross_attention_dim=model.text_channels,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=8, resnet_time_scale_shift="scale_shift",
        class_embed_type="projection", projection_class_embeddings_input_dim=model.text_channels)
