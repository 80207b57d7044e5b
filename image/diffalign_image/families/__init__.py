"""The pipelines of diffusers, of images and of clips, that can be fine-tuned, one file each behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from diffalign_image.families.flux import Flux
from diffalign_image.families.ltx import LTX
from diffalign_image.families.protocol import (
    TEXT_ENCODER,
    Family,
    Network,
    decode,
    encoders_on,
    save_lora,
    save_pipeline,
    trunk,
)
from diffalign_image.families.qwen_image import QwenImage
from diffalign_image.families.sd3 import SD3
from diffalign_image.families.sd15 import SD15
from diffalign_image.families.sdxl import SDXL
from diffalign_image.families.wan import Wan

FamilyName = Literal["sd15", "sdxl", "sd3", "flux", "qwen_image", "wan", "ltx"]
FAMILIES: dict[str, Any] = {"sd15": SD15, "sdxl": SDXL, "sd3": SD3, "flux": Flux, "qwen_image": QwenImage, "wan": Wan,
                            "ltx": LTX}
ALIASES = {"LatentConsistencyModelPipeline": "sd15"}  # the same parts in another pipeline

__all__ = ["FAMILIES", "Family", "FamilyName", "Network", "decode", "encoders_on", "family_of", "load", "save_lora",
           "save_pipeline", "trunk"]


def family_of(path: str) -> str:
    """The family that a pipeline's model_index.json names.

    Raises: ValueError if there is no such folder or hub id, or if its pipeline is of no known family.
    """
    try:
        name = str(DiffusionPipeline.load_config(path)["_class_name"])
    except (OSError, ValueError) as error:
        raise _missing(path, error) from None
    known = {cls.pipeline.__name__: family for family, cls in FAMILIES.items()} | ALIASES
    if name not in known:
        raise ValueError(f"model.path: {path} is a {name}; known are {', '.join(known)}. If its parts are those of "
                         "a known one, name the family with model.family")
    return known[name]


def load(path: str, family: str | None, dtype: torch.dtype, device: torch.device, *, size: Sequence[int] | None = None,
         distilled_guidance: float | None = None, trunk_waits: bool = False, encoders_wait: bool = False) -> Family:
    """The pipeline in a folder or on the hub, frozen, in evaluation mode, on the device; its autoencoder in float32.

    trunk_waits, encoders_wait: the UNet or transformer, the text encoders stay in main memory.

    Raises: ValueError if it cannot be found or read, or if the settings do not fit it.
    """
    cls = FAMILIES[family or family_of(path)]
    try:
        pipe = cls.pipeline.from_pretrained(path, torch_dtype=dtype, **dict.fromkeys(cls.left_out))
    except (OSError, ValueError) as error:
        raise _missing(path, error) from None
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            waits = trunk_waits if name == cls.trunk_name else encoders_wait and name.startswith(TEXT_ENCODER)
            part.eval().requires_grad_(False).to("cpu" if waits else device)
    pipe.vae.to(torch.float32)
    found: Family = cls.of(pipe, size, distilled_guidance)
    return found


def _missing(path: str, error: Exception) -> ValueError:
    first = str(error).strip().splitlines()[0]
    if Path(path).is_dir():
        return ValueError(f"model.path: {path} is no complete diffusers pipeline ({first}); give the folder that holds "
                          "model_index.json, as `save_pretrained` writes it")
    return ValueError(f"model.path: {path} is neither a folder nor a model that can be downloaded ({first}); download "
                      f"it where there is a network, e.g. `hf download {path} --local-dir models/{Path(path).name}` "
                      "(gated models need `hf auth login` first), and give that folder")
