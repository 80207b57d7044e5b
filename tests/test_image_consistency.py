"""Consistency models: our chain against diffusers' LCMScheduler, and RLCM, which is DDPO on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_pipelines import build
from torch import nn

from diffalign import config
from diffalign.algorithms import DDPO
from diffalign.diffusion import CPS, Schedule, VPPath
from diffalign.diffusion.paths import Level
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.surrogates import PPOClip
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign_image.families import FAMILIES, Family, family_of
from diffalign_image.families.consistency import Consistency
from diffalign_image.finetuning import ImageFinetune, PromptEvaluation
from diffalign_image.lora import Lora
from diffalign_image.pretrained import Model
from diffalign_image.rewards import Jpeg

PROMPTS = ["a red cat", "dark blue sky"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RLCM = CPS(noise_level=1.0)


def pipeline(name: str, *, embeds_guidance: bool, **scheduler: object):
    """A tiny pipeline with an LCMScheduler and, if asked, a UNet that takes the guidance scale as an input."""
    pipe = build(name)
    if embeds_guidance:
        settings = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
        pipe.unet = UNet2DConditionModel(**{**settings, "time_cond_proj_dim": 8})
    pipe.scheduler = LCMScheduler(**{**BETAS, "clip_sample": False, "steps_offset": 1, **scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(family: Family, steps: int, noise: torch.Tensor, step_noise: torch.Tensor) -> torch.Tensor:
    policy = DiffusionPolicy(family.network, family.path, RLCM, Schedule(steps=steps, grid=50), family.event)
    rows = [family.encode(prompt) for prompt in PROMPTS]
    cond = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return policy.act(cond, generator=torch.Generator(), noise=noise, step_noise=step_noise).action


@pytest.mark.parametrize(("name", "scale", "steps"), [("sd15", None, 4), ("sd15", 3.0, 4), ("sd15", 3.0, 1),
                                                      ("sdxl", 3.0, 8)])
def test_the_chain_is_that_of_the_lcm_scheduler(name: str, scale: float | None, steps: int) -> None:
    pipe = pipeline(name, embeds_guidance=scale is not None)
    family = FAMILIES[name].of(pipe, (16, 16), scale)
    noise, generator = torch.randn(2, *family.event), torch.Generator().manual_seed(7)
    fresh = [torch.randn(2, *family.event, generator=generator) for _ in range(steps - 1)]
    ours = drawn(family, steps, noise, torch.stack([*fresh, torch.zeros_like(noise)], 1))
    theirs = pipe(PROMPTS, height=16, width=16, num_inference_steps=steps, guidance_scale=scale or 1.0, latents=noise,
                  generator=torch.Generator().manual_seed(7), output_type="latent").images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_the_guidance_scale_reaches_the_unet() -> None:
    pipe = pipeline("sd15", embeds_guidance=True)
    nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight)
    noise, silent = torch.randn(2, 4, 8, 8), torch.zeros(2, 2, 4, 8, 8)
    low, high, default, published = (drawn(FAMILIES["sd15"].of(pipe, None, scale), 2, noise, silent)
                                     for scale in (2.0, 8.0, None, 8.5))
    assert (low - high).abs().max() > 1e-3
    assert torch.equal(default, published)


def test_a_step_is_fresh_noise_on_the_predicted_image() -> None:
    """alpha' = 0.8, sigma' = 0.6: mean 0.8 f and std 0.6, whatever x and eps are (RLCM, sec. 4)."""
    now, nxt = (Level(torch.tensor([[a]]), torch.tensor([[s]])) for a, s in ((0.6, 0.8), (0.8, 0.6)))
    for eps in (-3.0, 5.0):
        step = RLCM.moments(torch.tensor([[9.0]]), torch.tensor([[2.0]]), torch.tensor([[eps]]), now, nxt)
        assert step.mean.item() == pytest.approx(1.6, abs=1e-6)
        assert step.std.item() == pytest.approx(0.6)


def test_the_consistency_function_is_the_identity_on_clean_data() -> None:
    class Ones(nn.Module):
        prediction = "x0"

        def forward(self, x, t, cond):
            return torch.ones_like(x)

    function = Consistency(Ones(), VPPath(betas="scaled_linear", beta_start=0.00085, beta_end=0.012), 10.0)
    x = torch.full((3, 2), 5.0)
    found = function(x, torch.tensor([0.001, 0.002, 1.0]), {})
    assert found[0].tolist() == [5, 5]
    # table index 1: u = 10, c_skip = 0.25 / 100.25, c_out = 10 / sqrt(100.25)
    assert found[1].tolist() == pytest.approx([5 * 0.25 / 100.25 + 10 / 100.25**0.5] * 2)
    assert found[2].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_rlcm_trains_what_the_lcm_pipeline_loads(tmp_path: Path) -> None:
    parts = pipeline("sd15", embeds_guidance=True)
    LatentConsistencyModelPipeline(**{**parts.components, "safety_checker": None}, requires_safety_checker=False
                                   ).save_pretrained(tmp_path / "lcm")
    assert family_of(str(tmp_path / "lcm")) == "sd15"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    algorithm = DDPO(advantage=GroupNormalized(scale="batch"), surrogate=PPOClip(low=0.2, high=0.2),
                     optimization=Optimization(learning_rate=1e-2))
    job = ImageFinetune(
        model=Model(path=str(tmp_path / "lcm"), size=(8, 8), device="cpu", lora=Lora(rank=2, alpha=2.0),
                    distilled_guidance=8.0),
        prompts=str(tmp_path / "prompts.txt"), reward=Jpeg(), algorithm=algorithm, kernel=RLCM,
        schedule=Schedule(steps=2, grid=50), prompts_per_update=2, images_per_prompt=4, iterations=2,
        evaluation=PromptEvaluation(count=2, images_per_prompt=1, kl_images=2))
    run = Run.create(tmp_path / "run", config.dump(job), resume=False)
    job.train(run)
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["phase"] == "train"] == [1, 2]
    assert json.loads((run.path / "evaluations/after.json").read_text())["kl_nats"] > 0
    weights = load_file(run.path / "lora" / "pytorch_lora_weights.safetensors")
    assert max(float(w.abs().max()) for name, w in weights.items() if "lora_B" in name or "lora.up" in name) > 1e-3
    plain = LatentConsistencyModelPipeline.from_pretrained(tmp_path / "lcm")
    plain.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        return plain("a red cat", num_inference_steps=2, latents=torch.ones(1, 4, 8, 8), height=16, width=16,
                     generator=torch.Generator().manual_seed(0), output_type="latent").images

    before = latents()
    plain.load_lora_weights(run.path / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert (latents() - before).abs().max() > 1e-3


def test_refusals() -> None:
    for setting in ("clip_sample", "thresholding"):
        pipe = pipeline("sd15", embeds_guidance=False, **{setting: True})
        with pytest.raises(ValueError, match="clip_sample or thresholding: true"):
            FAMILIES["sd15"].of(pipe, None, None)
    with pytest.raises(ValueError, match="guidance-distilled FLUX and LCM"):
        FAMILIES["sd15"].of(pipeline("sd15", embeds_guidance=False), None, 8.0)
