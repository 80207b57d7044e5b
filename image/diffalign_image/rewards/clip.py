"""Rewards by a CLIP model: agreement with the prompt, human preference, aesthetics.

Legend: N images of H x W pixels, D numbers of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from diffalign.spec import spec
from diffalign_image.rewards.protocol import Metadata, to_pictures

_BLOCK = 32


@spec
class ClipScore:
    """CLIPScore: 2.5 max(cos(image, prompt), 0) (Hessel et al. 2021, eq. 1).

    model: folder or hub id of a transformers CLIPModel with its processor. device: where it runs.
    """

    type: Literal["clip_score"] = "clip_score"
    model: str = "openai/clip-vit-large-patch14"
    device: str = "cpu"

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """One score an image. Raises: ValueError without the weights."""
        clip = load_clip(self.model, self.model, self.device)
        return 2.5 * (clip.images(images) * clip.texts(captions)).sum(1).clamp(min=0)


@spec
class PickScore:
    """PickScore: the preference model's temperature times cos(image, prompt), about 20 to 24 (Kirstain et al. 2023).

    model: folder or hub id of the preference model; processor: of the CLIP whose pre-processing it uses.
    """

    type: Literal["pick_score"] = "pick_score"
    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    device: str = "cpu"

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """One score an image. Raises: ValueError without the weights."""
        clip = load_clip(self.model, self.processor, self.device)
        return clip.temperature * (clip.images(images) * clip.texts(captions)).sum(1)


@spec
class Aesthetic:
    """Aesthetics: the LAION predictor, a chain of linear layers on normalized CLIP image features, about 1 to 10.

    model: the CLIP that the head was trained on; head: its weights, a .pth or .safetensors file with entries
    layers.0.weight, layers.0.bias, layers.2.weight, ... (sac+logos+ava1-l14-linearMSE.pth).
    """

    type: Literal["aesthetic"] = "aesthetic"
    head: str
    model: str = "openai/clip-vit-large-patch14"
    device: str = "cpu"

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """One score an image; the captions do not matter. Raises: ValueError without the weights."""
        x = load_clip(self.model, self.model, self.device).images(images)
        for weight, bias in load_head(self.head, x.shape[1]):
            x = torch.nn.functional.linear(x, weight, bias)
        return x[:, 0]


class Clip:
    """Unit vectors [N, D] on the CPU for images and texts; texts are cut at the model's 77 tokens."""

    def __init__(self, model: Any, pictures: Any, tokenizer: Any) -> None:
        self._model, self._pictures, self._tokenizer = model, pictures, tokenizer

    @property
    def temperature(self) -> float:
        """exp(logit_scale), the factor of the cosine in the model's own logits."""
        return float(self._model.logit_scale.exp())

    @torch.no_grad()
    def images(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        """Unit vectors of images."""
        found = []
        for block in images.split(_BLOCK):
            pixels = self._pictures(images=to_pictures(block), return_tensors="pt")["pixel_values"]
            seen = self._model.vision_model(pixel_values=pixels.to(self._model.device))
            found.append(self._model.visual_projection(seen.pooler_output))
        return _unit(torch.cat(found))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Float[Tensor, "N D"]:
        """Unit vectors of texts."""
        most = self._model.config.text_config.max_position_embeddings
        batch = self._tokenizer(list(captions), padding=True, truncation=True, max_length=most, return_tensors="pt")
        read = self._model.text_model(**batch.to(self._model.device))
        return _unit(self._model.text_projection(read.pooler_output))


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1).cpu()


@lru_cache(maxsize=4)
def load_clip(model: str, processor: str, device: str) -> Clip:
    """A CLIP model in float32. Raises: ValueError saying what to download and where to put it."""
    try:
        net = CLIPModel.from_pretrained(model).eval().requires_grad_(False).to(device)
        return Clip(net, CLIPImageProcessor.from_pretrained(processor), AutoTokenizer.from_pretrained(processor))
    except OSError as error:
        wanted = " and ".join(f"`hf download {name} --local-dir models/{Path(name).name}`"
                              for name in dict.fromkeys((model, processor)))
        raise ValueError(f"the weights of the reward model {model} (processor {processor}) cannot be read "
                         f"({str(error).strip().splitlines()[0]}). Download them where there is a network, e.g. "
                         f"{wanted}, and name the folders in reward.model" + (
                             " and reward.processor" if processor != model else "")) from None


@lru_cache(maxsize=4)
def load_head(file: str, width: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """(weight, bias) of the layers in order. Raises: ValueError if the file is missing or no such head."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"reward.head: {file} does not exist; download sac+logos+ava1-l14-linearMSE.pth from the "
                         "repository christophschuhmann/improved-aesthetic-predictor and give its path")
    stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    order = sorted({int(name.split(".")[1]) for name in stored if name.startswith("layers.")})
    try:
        layers = tuple((stored[f"layers.{i}.weight"].float(), stored[f"layers.{i}.bias"].float()) for i in order)
    except KeyError as error:
        raise ValueError(f"reward.head: {file} lacks {error}; expected layers.<i>.weight and layers.<i>.bias") from None
    if not layers or layers[0][0].shape[1] != width or layers[-1][0].shape[0] != 1:
        found = [tuple(weight.shape) for weight, _ in layers]
        raise ValueError(f"reward.head: {file} has layers {found}, expected a chain from {width} numbers (the features "
                         "of reward.model) to 1; take the CLIP that the head was trained on")
    return layers
