"""Qwen-Image: a joint transformer over packed latents that predicts the velocity of the flow path.

Legend: N rows, Z = 16 latent channels, L text tokens, C text channels, P = h/2 * w/2 image tokens of 4 Z numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from diffalign.diffusion import FlowPath, Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.train import sharding
from diffalign_image.families.flux import pack, packed_event, unpack
from diffalign_image.families.protocol import decode_by_channel
from diffalign_image.families.sd3 import JOINT_LORA_TARGETS
from diffalign_image.families.sd15 import refuse_distilled

_TOKENS = 512  # prompts are cut here, as by the pipeline
_TAKES_LENGTHS = "txt_seq_lens" in signature(QwenImageTransformer2DModel.forward).parameters  # newer: from the mask
_NO_PROMPT = " "  # the authors' negative prompt; the pipeline has no default


@dataclass(frozen=True)
class QwenImage:
    """QwenImagePipeline; size: (height, width) in pixels, null for 1024 x 1024.

    The pipeline shifts its grid by exp(mu) with mu from the number of image tokens (schedule.shift) and stretches it to
    end at its scheduler's `shift_terminal` (schedule.terminal, 0.02).
    """

    pipe: Any
    network: nn.Module
    size: Sequence[int] | None = None
    pipeline: ClassVar[Any] = QwenImagePipeline
    left_out: ClassVar[tuple[str, ...]] = ()
    trunk_name: ClassVar[str] = "transformer"
    frame_rate: ClassVar[int | None] = None
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_LORA_TARGETS

    @classmethod
    def of(cls, pipe: Any, size: Sequence[int] | None, distilled_guidance: float | None) -> QwenImage:
        """The family around a loaded pipeline. Raises: ValueError for a guidance embedding, which it has not."""
        refuse_distilled("qwen_image", distilled_guidance)
        if pipe.transformer.config.guidance_embeds:
            raise ValueError("transformer/config.json has guidance_embeds: true, a distilled model that is not "
                             "supported; use the original Qwen-Image")
        return cls(pipe, QwenTransformer(pipe.transformer), size)

    @property
    def path(self) -> FlowPath:
        """The flow path."""
        return FlowPath()

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape (Z, h, w) of one latent before packing."""
        return packed_event(self.pipe, self.size)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """{"text" [1, 512, C], of which the first "length" [1] are tokens and the rest zeros}."""
        with torch.no_grad():
            text, _ = self.pipe.encode_prompt(prompt, device=self.pipe.device, max_sequence_length=_TOKENS)
        length = text.shape[1]
        return {"text": pad(text, (0, 0, 0, _TOKENS - length)), "length": torch.tensor([length], device=text.device)}

    def encode_empty(self) -> dict[str, Tensor]:
        """The negative prompt of the authors' examples, a blank."""
        return self.encode(_NO_PROMPT)

    def decode(self, latent: Float[Tensor, "1 Z h w"]) -> Float[Tensor, "1 3 H W"]:
        """The image of a latent: the only frame of a clip."""
        return decode_by_channel(self.pipe.vae, latent[:, :, None])[:, 0]


class QwenTransformer(nn.Module):
    """cond = {"text": [N, 512, C], "length": [N]}.

    The transformer attends to padding, so rows are asked together only with others of their length: a prompt's image
    does not depend on the other prompts of its batch (in the pipeline it does).
    """

    prediction: Prediction = "flow"

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Float[Tensor, "N Z h w"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Z h w"]:
        """The velocity eps - x0."""
        length = cond["length"]
        groups = [(length == one).nonzero().flatten() for one in length.unique().tolist()]
        asked = groups + [groups[0][:1]] * sharding.shortfall(self.transformer, len(groups))
        found = torch.cat([self._ask(x[rows], t[rows], cond["text"][rows, : int(length[rows[0]])]) for rows in asked])
        return found[torch.cat(groups).argsort()]

    def _ask(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        dtype, (rows, _, height, width) = next(self.transformer.parameters()).dtype, x.shape
        lengths = {"txt_seq_lens": [text.shape[1]] * rows} if _TAKES_LENGTHS else {}
        out: Tensor = self.transformer(
            hidden_states=pack(x).to(dtype), timestep=t, guidance=None, encoder_hidden_states=text.to(dtype),
            encoder_hidden_states_mask=torch.ones(text.shape[:2], dtype=torch.long, device=x.device),
            img_shapes=[[(1, height // 2, width // 2)]] * rows, return_dict=False, **lengths)[0]
        return unpack(out, height, width).float()

    def guided(self, without: Float[Tensor, "N Z h w"], given: Float[Tensor, "N Z h w"], scale: float
               ) -> Float[Tensor, "N Z h w"]:
        """Guidance scaled back, token by token, to the length of the prediction with the prompt, as the pipeline."""
        mixed, wanted = pack(without + scale * (given - without)), pack(given)
        kept = mixed * (wanted.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        return unpack(kept, *given.shape[2:])
