"""Prompts and rewards as a rollout source with one decision per episode (H = 1).

Legend: P prompts x G images of each = B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import select_rows
from diffalign.rl.rollouts import Rollout, image_rollout
from diffalign_image.autoencoder import decode_latents
from diffalign_image.pipeline import Parts
from diffalign_image.rewards import Reward, measure
from diffalign_image.shapes import scenes
from diffalign_image.text import encode_captions


@dataclass(frozen=True)
class PromptSource:
    """Draws P prompts, makes G images of each with the policy, rewards them.

    captions and cond (one row per caption) are the prompts to train on, encoded once; a prompt's index is its
    identity for running statistics. decode turns latents into images in [-1, 1]. With shared_noise the images of a
    prompt start from the same noise, so that they differ, and are compared, by the stochastic steps alone (DanceGRPO).

    Raises: ValueError if an update would ask for more prompts than there are.
    """

    captions: Sequence[str]
    cond: Mapping[str, Tensor]
    decode: Callable[[Tensor], Tensor]
    reward: Reward
    prompts: int
    images_per_prompt: int
    shared_noise: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= len(self.captions):
            raise ValueError(f"prompts_per_update must lie in 1..{len(self.captions)} (the training captions), "
                             f"got {self.prompts}")
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt must be at least 1, got {self.images_per_prompt}")

    def collect(self, policy: DiffusionPolicy, *, generator: torch.Generator) -> Rollout:
        """One rollout of P x G images; prompts are drawn without replacement."""
        picked = torch.randperm(len(self.captions), generator=generator)[: self.prompts]
        group = torch.arange(self.prompts).repeat_interleave(self.images_per_prompt)
        prompt = picked[group]
        noise = None
        if self.shared_noise:
            noise = torch.randn(self.prompts, *policy.event, generator=generator)[group]
        decision = policy.act(select_rows(self.cond, prompt), generator=generator, noise=noise)
        images = self.decode(decision.action)
        captions = [self.captions[i] for i in prompt.tolist()]
        reward = self.reward(images, captions)
        stats = {f"samples/{name}": float(values.mean()) for name, values in measure(images, captions).items()}
        return image_rollout(decision.trajectory, reward, group, prompt, stats)


def training_prompts(parts: Parts, reward: Reward, *, prompts: int, images_per_prompt: int, shared_noise: bool = False
                     ) -> PromptSource:
    """A source over all training captions; the held-out ones never enter it."""
    captions = [scene.caption for scene in scenes("train")]
    cond = encode_captions(parts.tokenizer, parts.text_encoder, captions)
    decode = partial(decode_latents, parts.autoencoder)
    return PromptSource(captions, cond, decode, reward, prompts, images_per_prompt, shared_noise)
