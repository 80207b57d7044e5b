"""ImageReward, a preference model on BLIP (Xu et al. 2023), on transformers' BLIP: its own package no longer imports.

Legend: N images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, CLIPImageProcessor
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffalign.spec import spec
from diffalign_image.rewards.protocol import Metadata, to_pictures

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the authors' data
_TOKENS, _HEAD, _BLOCK = 35, 64, 32
_LAYERS = (0, 2, 4, 6, 7)  # the linear ones of the head; dropout between them
_VISION = (("attn.proj", "self_attn.projection"), ("attn.qkv", "self_attn.qkv"), ("norm1", "layer_norm1"),
           ("norm2", "layer_norm2"), ("blocks", "encoder.layers"), ("patch_embed.proj", "embeddings.patch_embedding"),
           ("pos_embed", "embeddings.position_embedding"), ("cls_token", "embeddings.class_embedding"))


@spec
class ImageReward:
    """ImageReward v1.0: the authors' score, 0 on average and 1 in spread over their data.

    weights: the file ImageReward.pt of the repository zai-org/ImageReward. tokenizer: folder or hub id of BERT's.
    """

    type: Literal["image_reward"] = "image_reward"
    weights: str
    tokenizer: str = "google-bert/bert-base-uncased"
    device: str = "cpu"

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """One score an image. Raises: ValueError without the weights or the tokenizer."""
        blip = load_blip(self.weights, self.device)
        words = load_tokenizer(self.tokenizer)(list(captions), padding="max_length", truncation=True,
                                               max_length=_TOKENS, return_tensors="pt").to(self.device)
        rows = torch.arange(len(captions)).split(_BLOCK)
        return torch.cat([blip(to_pictures(images[r]), words["input_ids"][r], words["attention_mask"][r])
                          for r in rows])


@dataclass(frozen=True)
class Blip:
    """The image encoder, the text encoder that looks at the image, and the linear layers (weight, bias) after it."""

    vision: Any
    text: Any
    head: tuple[tuple[Tensor, Tensor], ...]
    pictures: Any

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Any], tokens: Tensor, mask: Tensor) -> Float[Tensor, "N"]:
        """Scores on the CPU."""
        pixels = self.pictures(images=list(pictures), return_tensors="pt")["pixel_values"].to(tokens.device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        x = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
                      ).last_hidden_state[:, 0].float()
        for weight, bias in self.head:
            x = torch.nn.functional.linear(x, weight, bias)
        scores: Tensor = (x[:, 0] - _MEAN) / _STD
        return scores.cpu()


@lru_cache(maxsize=2)
def load_blip(file: str, device: str) -> Blip:
    """The model of an ImageReward checkpoint. Raises: ValueError saying what to download or what does not fit."""
    if not Path(file).is_file():
        raise ValueError(f"reward.weights: {file} does not exist; where there is a network, `hf download "
                         "zai-org/ImageReward ImageReward.pt --local-dir models/image-reward` and give the file's path")
    stored = torch.load(file, map_location=device, weights_only=True)
    try:
        return from_state(stored, device)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise ValueError(f"reward.weights: {file} is no ImageReward checkpoint ({str(error).splitlines()[0]}); "
                         "expected blip.visual_encoder.*, blip.text_encoder.* and mlp.layers.*") from None


def from_state(stored: Mapping[str, Tensor], device: str) -> Blip:
    """The model with the sizes that the tensors have; heads are 64 wide. Raises: KeyError, RuntimeError."""
    image, text = (_below(stored, f"blip.{name}.") for name in ("visual_encoder", "text_encoder"))
    patch, positions = image["patch_embed.proj.weight"], image["pos_embed"].shape[1]
    width, side = patch.shape[0], patch.shape[2] * round((positions - 1) ** 0.5)
    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=width, intermediate_size=image["blocks.0.mlp.fc1.weight"].shape[0], image_size=side,
        patch_size=patch.shape[2], num_hidden_layers=_count(image, "blocks."), num_attention_heads=width // _HEAD,
        layer_norm_eps=1e-6))
    vision.load_state_dict({_renamed(name): tensor for name, tensor in image.items()})
    words = text["embeddings.word_embeddings.weight"]
    reader = BlipTextModel(BlipTextConfig(
        vocab_size=words.shape[0], hidden_size=words.shape[1], encoder_hidden_size=width,
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(text, "encoder.layer."), num_attention_heads=words.shape[1] // _HEAD,
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0]), add_pooling_layer=False)
    reader.load_state_dict({name: tensor for name, tensor in text.items() if name != "embeddings.position_ids"},
                           strict=False)
    missing = set(dict(reader.named_parameters())) - set(text)
    if missing:
        raise KeyError(f"{sorted(missing)[0]} is missing")
    head = tuple((stored[f"mlp.layers.{i}.weight"].float(), stored[f"mlp.layers.{i}.bias"].float()) for i in _LAYERS)
    pictures = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    seeing, reading = (one.eval().requires_grad_(False).to(device) for one in (vision, reader))
    return Blip(seeing, reading, head, pictures)


@lru_cache(maxsize=2)
def load_tokenizer(name: str) -> Any:
    """BERT's tokenizer. Raises: ValueError saying what to download."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"reward.tokenizer: {name} cannot be read ({str(error).strip().splitlines()[0]}); where there "
                         f"is a network, `hf download {name} --local-dir models/{Path(name).name}` and give the folder"
                         ) from None


def _below(stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def _count(stored: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in stored if name.startswith(prefix))


def _renamed(name: str) -> str:
    """timm's name of a vision transformer's tensor as transformers' BLIP calls it."""
    for old, new in _VISION:
        name = name.replace(old, new)
    return name.replace("norm.", "post_layernorm.") if name.startswith("norm.") else name
