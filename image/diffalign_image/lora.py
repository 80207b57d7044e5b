"""LoRA on a pipeline's trunk through peft: added, switched off for the reference, checkpointed alone, exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from diffalign.diffusion import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.spec import spec
from diffalign_image.guidance import GuidedDenoiser


@spec
class Lora:
    """W + alpha / rank * B A with A [rank, in] Gaussian and B [out, rank] zero at the start (Hu et al. 2021).

    targets: name endings of the linear layers that get one; null takes the attention projections of the family.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"need rank >= 1 and alpha > 0, got {self.rank} and {self.alpha}")
        if self.targets is not None and not self.targets:
            raise ValueError("targets must name layers, e.g. [to_q, to_v], or be null for the family's own; got []")


def add_lora(trunk: Any, plan: Lora, targets: Sequence[str], *, seed: int) -> None:
    """Freeze the trunk and add trainable float32 adapters to it; the seed fixes A and the global generator is left.

    Raises: ValueError if no layer is named so.
    """
    chosen = list(plan.targets or targets)
    names = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    lost = [target for target in plan.targets or () if not any(name.endswith(f".{target}") for name in names)]
    if lost:
        raise ValueError(f"lora.targets {lost} name no linear layer; this model has e.g. {names[:6]}")
    trunk.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk.add_adapter(LoraConfig(r=plan.rank, lora_alpha=plan.alpha, init_lora_weights="gaussian",
                                     target_modules=chosen))
    for parameter in trunk.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_layers(trunk: nn.Module, plan: Lora) -> dict[str, Tensor]:
    """The adapters with alpha / rank multiplied into B, so that every loader, told alpha or not, scales them right."""
    scale = plan.alpha / plan.rank
    return {name: (scale * tensor if "lora_B" in name else tensor).detach().cpu().contiguous()
            for name, tensor in get_peft_model_state_dict(trunk).items()}


@dataclass(frozen=True)
class WithoutAdapters:
    """The denoiser as it was before training: the same weights with the adapters of its trunk switched off."""

    denoiser: GuidedDenoiser
    trunk: Any

    @property
    def prediction(self) -> Prediction:
        """The denoiser's."""
        return self.denoiser.prediction

    def __call__(self, x: Float[Tensor, "N *E"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N *E"]:
        """The base model's prediction, without gradient."""
        self.trunk.disable_adapters()
        try:
            with torch.no_grad():
                base: Tensor = self.denoiser(x, t, cond)
            return base
        finally:
            self.trunk.enable_adapters()


def checkpoint_trainable_only(module: nn.Module) -> None:
    """From now on the module's state_dict holds its trainable parameters alone, and loading asks for no others."""
    frozen = set(module.state_dict()) - {
        name for name, parameter in module.named_parameters() if parameter.requires_grad}

    def drop(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    def excuse(module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in frozen]

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_post_hook(excuse)
