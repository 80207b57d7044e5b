"""The model: a small SD3 transformer of diffusers on the latents of a small autoencoder, conditioned on a small CLIP.

Legend: N images, Z latent channels, L tokens, C text channels. Images are [3, 32, 32], events are latents [Z, 8, 8].
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from diffalign.diffusion import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.spec import spec
from diffalign_image.autoencoder import REDUCTION
from diffalign_image.shapes import SIZE
from diffalign_image.text import build_text_encoder, build_tokenizer, encode

SIDE = SIZE // REDUCTION
TIME_SCALE = 1000.0  # path time 1 is diffusers' timestep 1000
_HEAD = 32


@spec
class ShapesModel:
    """Sizes of the denoiser and the text encoder. patch: side of the square of latent positions that is one token."""

    width: int = 128
    layers: int = 4
    patch: int = 2
    text_channels: int = 64
    text_layers: int = 2

    def __post_init__(self) -> None:
        for name in ("width", "text_channels"):
            size = getattr(self, name)
            if size < _HEAD or size % _HEAD:
                raise ValueError(f"{name} must be a multiple of {_HEAD} (one attention head), got {size}")
        if self.patch < 1 or SIDE % self.patch:
            raise ValueError(f"patch must divide the {SIDE}x{SIDE} latent positions, got {self.patch}")
        for name in ("layers", "text_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class TextTransformer(nn.Module):
    """The denoiser that is aligned: cond = {"text": [N, L, C], "pooled": [N, C]} from the frozen text encoder."""

    prediction: Prediction = "flow"

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape of one latent, (Z, 8, 8)."""
        return (self.transformer.config.in_channels, SIDE, SIDE)

    def forward(self, x: Float[Tensor, "N Z 8 8"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Z 8 8"]:
        """The velocity eps - x0."""
        velocity: Tensor = self.transformer(x, encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"],
                                            timestep=t * TIME_SCALE, return_dict=False)[0]
        return velocity


class JointDenoiser(nn.Module):
    """The denoiser that is pre-trained: cond = {"tokens": [N, L]}; text encoder and transformer learn together."""

    prediction: Prediction = "flow"

    def __init__(self, denoiser: TextTransformer, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape of one latent, (Z, 8, 8)."""
        return self.denoiser.event

    def forward(self, x: Float[Tensor, "N Z 8 8"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Z 8 8"]:
        """The velocity eps - x0."""
        velocity: Tensor = self.denoiser(x, t, encode(self.text_encoder, cond["tokens"]))
        return velocity


def build(model: ShapesModel, latent_channels: int, seed: int) -> tuple[JointDenoiser, PreTrainedTokenizerFast]:
    """Untrained denoiser and its tokenizer, initialised from the seed without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        encoder = build_text_encoder(tokenizer, channels=model.text_channels, layers=model.text_layers)
        return JointDenoiser(TextTransformer(_build_transformer(model, latent_channels)), encoder), tokenizer


def _build_transformer(model: ShapesModel, latent_channels: int) -> SD3Transformer2DModel:
    """Modulations and output start at zero (DiT, sec. 3.2), which diffusers leaves to whoever trains from scratch."""
    net = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=model.patch, in_channels=latent_channels, out_channels=latent_channels,
        num_layers=model.layers, attention_head_dim=_HEAD, num_attention_heads=model.width // _HEAD,
        joint_attention_dim=model.text_channels, caption_projection_dim=model.width,
        pooled_projection_dim=model.text_channels, pos_embed_max_size=SIDE // model.patch, qk_norm="rms_norm")
    modulations = [norm.linear for block in net.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*modulations, net.norm_out.linear, net.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return net
