"""HPS v2.1, a human preference score by a fine-tuned CLIP ViT-H/14 in open_clip's format (Wu et al. 2023).

Legend: N images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.protocol import Metadata, to_pictures

_BLOCK = 32


@spec
class HPS:
    """HPS v2 or v2.1: cos(image, prompt) of the preference model, about 0.2 to 0.4; the versions do not compare.

    weights: the file HPS_v2.1_compressed.pt of the repository xswu/HPSv2. architecture: open_clip's name of the model.
    Images are resized on their shorter side and cut to a square.
    """

    type: Literal["hps"] = "hps"
    weights: str
    architecture: str = "ViT-H-14"
    device: str = "cpu"

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """One score an image. Raises: ValueError without open_clip or the weights."""
        model, prepare, tokenize = load_open_clip(self.architecture, self.weights, self.device)
        found = []
        with torch.no_grad():
            for rows in torch.arange(len(captions)).split(_BLOCK):
                pixels = torch.stack([prepare(picture) for picture in to_pictures(images[rows])])
                texts = tokenize([captions[i] for i in rows.tolist()])
                image = model.encode_image(pixels.to(self.device), normalize=True)
                text = model.encode_text(texts.to(self.device), normalize=True)
                found.append((image * text).sum(1).float().cpu())
        return torch.cat(found)


@lru_cache(maxsize=2)
def load_open_clip(architecture: str, weights: str, device: str) -> tuple[Any, Any, Any]:
    """(model, transform of a picture, tokenizer). Raises: ValueError saying what to install or to download."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(f"the hps reward needs open_clip, which is not installed or does not import ({error}); `pip "
                         "install open-clip-torch`") from None
    if not Path(weights).is_file():
        raise ValueError(f"reward.weights: {weights} does not exist; where there is a network, `hf download xswu/HPSv2 "
                         "HPS_v2.1_compressed.pt --local-dir models/hps` and give the file's path")
    if architecture not in open_clip.list_models():
        raise ValueError(f"reward.architecture: open_clip has no {architecture!r}; HPS v2 and v2.1 are ViT-H-14")
    model, _, prepare = open_clip.create_model_and_transforms(architecture, device=device)
    stored = torch.load(weights, map_location=device, weights_only=True)
    try:
        model.load_state_dict(stored.get("state_dict", stored))
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"reward.weights: {weights} does not hold a {architecture} "
                         f"({str(error).splitlines()[0]})") from None
    return model.eval().requires_grad_(False), prepare, open_clip.get_tokenizer(architecture)
