"""DDPO on the variance-preserving path improves a reward of UNets that were trained to predict noise.

A random UNet does not predict noise, and 1 / alpha = 14.6 at t = 1 makes of its error a sample that is all initial
noise; so the tiny pipelines are pre-trained first, on latents of one color each.

Legend: N latents [4, 4, 4].
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny_pipelines import geometry, save

from diffalign.algorithms import DDPO
from diffalign.diffusion import DDIM, ODE, Schedule, TrainedSteps
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import select_rows
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.surrogates import PPOClip
from diffalign.train.on_policy import optimize
from diffalign.train.pieces import Optimization
from diffalign.train.state import TrainState
from diffalign.train.supervised import Pretraining, fit, fresh_state
from diffalign_image.families import decode, load, trunk
from diffalign_image.finetuning import PipelineSource
from diffalign_image.lora import Lora
from diffalign_image.pretrained import Model, Pretrained
from diffalign_image.prompts import Prompt
from diffalign_image.rewards import PythonFunction

PROMPTS = ["a red cat", "dark blue sky", "bright dog", "a dog"]
REWARDS = """
def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))
"""
SCHEDULE = Schedule(steps=4)
FITTING = Pretraining(steps=120, batch_size=32, learning_rate=1e-2, warmup_steps=10, ema_decay=None, time="grid")


def pretrain(name: str, folder: Path) -> list[float]:
    """Save a tiny pipeline and train its UNet to predict noise; the losses [steps]."""
    family = load(str(save(name, folder)), None, torch.float32, torch.device("cpu"), size=(8, 8))
    trunk(family).requires_grad_(True)
    policy = DiffusionPolicy(family.network, family.path, ODE(), SCHEDULE, family.event)
    rows = [family.encode(prompt) for prompt in PROMPTS]
    cond = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        count = FITTING.batch_size
        color = 0.5 * torch.randn(count, 4, 1, 1, generator=generator)
        chosen = torch.randint(len(PROMPTS), (count,), generator=generator)
        return color + 0.1 * torch.randn(count, *family.event, generator=generator), select_rows(cond, chosen)

    state = fresh_state(FITTING, family.network, seed=0)
    losses = [iteration.metrics["loss"] for iteration in fit(FITTING, policy, batch, state)]
    family.pipe.save_pretrained(folder)
    return losses


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_ddpo_makes_images_brighter_once_the_unet_predicts_noise(tmp_path: Path, name: str) -> None:
    losses = pretrain(name, tmp_path / name)
    assert sum(losses[-10:]) / 10 < 0.2 < 0.8 < losses[0]
    (tmp_path / "mine.py").write_text(REWARDS)
    reward = PythonFunction(function=f"{tmp_path / 'mine.py'}:brightness", images="float")
    plan = Model(path=str(tmp_path / name), size=(8, 8), device="cpu", lora=Lora(rank=4, alpha=8.0), batch_rows=64)
    model = Pretrained.load(plan, SCHEDULE, DDIM(eta=1.0), TrainedSteps(), seed=0, keep_reference=False)
    state = TrainState.create({"policy": model.trained}, {"policy": 0.03}, seed=0)
    source = PipelineSource(model, [Prompt(text) for text in PROMPTS], reward, geometry(4, 16), state, 0)
    captions = PROMPTS * 16

    def brightness() -> torch.Tensor:
        """Of 64 images by the sampler that is trained, always from the same noise, which no rollout saw."""
        sampled = model.policy.act(model.embeddings(captions), generator=torch.Generator().manual_seed(1))
        return reward(decode(model.family, sampled.action), captions)

    before = brightness()
    algorithm = DDPO(advantage=GroupNormalized(scale="batch"), surrogate=PPOClip(low=10.0, high=10.0),
                     optimization=Optimization(learning_rate=0.03, microbatch_rows=192))
    for _ in islice(optimize(algorithm.compose(), model.policy, source, state), 10):
        pass
    gain = brightness() - before
    assert gain.mean() > 0.01
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
