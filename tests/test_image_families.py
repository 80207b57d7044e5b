"""Every family's adapter against the diffusers pipeline that it wraps, on tiny random pipelines of the real classes."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import build, save

from diffalign.diffusion import DDIM, ODE, FlowPath, FlowSDE, Schedule, VPPath
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign_image.families import FAMILIES, Family, decode, family_of, load, trunk
from diffalign_image.families.flux import pack, unpack
from diffalign_image.guidance import Guidance, GuidedDenoiser

PROMPTS = ["a red cat", "dark blue sky"]
CPU = torch.device("cpu")
STEPS = 4
CLIPS = ("wan", "ltx")
PACKED = ("flux", "qwen_image")


def schedule_of(family: Family) -> Schedule:
    """The pipeline's own grid for its latents, as the core's schedule."""
    config = family.pipe.scheduler.config
    if config.get("use_dynamic_shifting"):
        positions = math.prod(family.event[1:]) // (4 if len(family.event) == 3 else 1)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (positions - config.base_image_seq_len)
        return Schedule(steps=STEPS, shift=math.exp(mu), terminal=config.shift_terminal)
    return Schedule(steps=STEPS, shift=config.get("shift", 1.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def loaded(folders: dict[str, Path], name: str, **options) -> Family:
    size = {"flux": (16, 16), "qwen_image": (16, 16), "wan": (5, 16, 16), "ltx": (5, 32, 32)}
    return load(str(folders[name]), None, torch.float32, CPU, **{"size": size.get(name), **options})


def cond_of(family: Family) -> dict[str, torch.Tensor]:
    rows = [family.encode(prompt) for prompt in PROMPTS]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def drawn_by_pipeline(name: str, family: Family, noise: torch.Tensor, scale: float) -> torch.Tensor:
    """What the pipeline's own __call__ makes of the noise, in [-1, 1]."""
    grid = np.linspace(1, 1 / STEPS, STEPS)
    options = {"prompt": PROMPTS, "latents": noise, "output_type": "pt", "num_inference_steps": STEPS}
    options["guidance_scale"] = 3.5 if name == "flux" else scale  # FLUX: of the distilled model
    if name in CLIPS:
        options |= dict(zip(("num_frames", "height", "width"), family.size))
    else:
        options |= dict(zip(("height", "width"), (side * family.pipe.vae_scale_factor for side in family.event[1:])))
    if name in PACKED:
        options["latents"] = pack(noise)
    if name == "ltx":
        options["latents"] = noise.flatten(2).transpose(1, 2)
    if name == "qwen_image":
        options |= {"true_cfg_scale": scale, "negative_prompt": [" "] * len(PROMPTS), "guidance_scale": 1.0}
    if name in ("sd3", *PACKED):
        options["sigmas"] = grid
    if name == "wan":  # its call takes no grid
        family.pipe.scheduler.set_timesteps = partial(type(family.pipe.scheduler).set_timesteps, family.pipe.scheduler,
                                                      sigmas=grid)
    family.pipe.set_progress_bar_config(disable=True)
    drawn = family.pipe(**options)
    return (drawn.frames if name in CLIPS else drawn.images) * 2 - 1


@pytest.mark.parametrize(("name", "scale"), [("sd15", 1.0), ("sd15", 5.0), ("sdxl", 5.0), ("sd3", 1.0), ("sd3", 4.5),
                                             ("flux", 1.0), ("qwen_image", 1.0), ("qwen_image", 4.0), ("wan", 1.0),
                                             ("wan", 5.0), ("ltx", 1.0), ("ltx", 3.0)])
def test_the_core_draws_what_the_pipeline_draws(folders: dict[str, Path], name: str, scale: float) -> None:
    family = loaded(folders, name)
    denoiser = GuidedDenoiser(family.network, family.network.prediction, family.encode_empty(), scale, rows=3)
    policy = DiffusionPolicy(denoiser, family.path, ODE(), schedule_of(family), family.event)
    noise = torch.randn(2, *family.event)
    latents = policy.act(cond_of(family), generator=torch.Generator(), noise=noise).action
    images, expected = decode(family, latents), drawn_by_pipeline(name, family, noise, scale)
    assert images.shape == expected.shape
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (images.abs() == 1).float().mean() < 0.05  # the clamp hides next to nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_prediction_is_the_pipelines_own_denoiser_call(folders: dict[str, Path], name: str) -> None:
    family = loaded(folders, name)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def record(module: object, args: tuple[torch.Tensor, ...], kwargs: dict, output: tuple[torch.Tensor]) -> None:
        sample = args[0] if args else kwargs["hidden_states"]
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.append((sample.clone(), torch.as_tensor(time).clone(), output[0].clone()))

    handle = trunk(family).register_forward_hook(record, with_kwargs=True)
    drawn_by_pipeline(name, family, torch.randn(2, *family.event), scale=1.0)
    handle.remove()
    assert len(seen) == STEPS
    for sample, time, output in seen:
        if name in ("sd15", "sdxl"):
            t = (time.double() + 1) / 1000
        else:
            t = time.double() / (1 if name in PACKED else 1000)
        if name in PACKED:
            sample, output = unpack(sample, *family.event[1:]), unpack(output, *family.event[1:])
        if name == "ltx":
            sample, output = (one.transpose(1, 2).reshape(2, *family.event) for one in (sample, output))
        with torch.no_grad():
            own = family.network(sample, t.float().expand(2).reshape(2), cond_of(family))
        torch.testing.assert_close(own, output, atol=1e-5, rtol=0)


def test_guidance_mixes_the_two_predictions_in_any_block_size(folders: dict[str, Path]) -> None:
    family = loaded(folders, "sd15")
    cond, empty = cond_of(family), family.encode_empty()
    x, t = torch.randn(2, *family.event), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        given = family.network(x, t, cond)
        without = family.network(x, t, {"text": empty["text"].expand(2, -1, -1)})
        for rows in (1, 2, 5):
            guided = GuidedDenoiser(family.network, "eps", empty, 3.0, rows)(x, t, cond)
            torch.testing.assert_close(guided, without + 3.0 * (given - without), atol=1e-5, rtol=1e-5)
        assert torch.equal(GuidedDenoiser(family.network, "eps", empty, 1.0, 2)(x, t, cond), given)
    assert (given - without).abs().max() > 1e-4
    assert not any("empty" in name for name in GuidedDenoiser(family.network, "eps", empty, 3.0, 1).state_dict())
    with pytest.raises(ValueError, match="scale must be positive"):
        Guidance(scale=0.0)


def test_packing_goes_back_and_keeps_rows_apart() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(x)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31, 48, 49, 54, 55]  # channels of the first 2x2 square
    assert torch.equal(unpack(tokens, 4, 6), x)


def test_families_are_read_off_the_folder_with_their_paths_and_sizes(folders: dict[str, Path]) -> None:
    for name in FAMILIES:
        assert family_of(str(folders[name])) == name
        frames = (5,) if name in CLIPS else ()
        family = loaded(folders, name, size=(*frames, 16, 32))
        assert family.event == {"wan": (4, 3, 8, 16), "ltx": (8, 3, 4, 8)}.get(name, (4, 8, 16))
        assert not any(p.requires_grad for p in trunk(family).parameters())
        images = decode(family, torch.randn(1, *family.event))
        assert images.shape == (1, *frames, 3, 16, 32)
    assert loaded(folders, "sd15").event == (4, 8, 8)
    assert loaded(folders, "sd3").path == FlowPath()
    assert loaded(folders, "sdxl").path == VPPath(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)


def test_half_precision_weights_give_float32_predictions(folders: dict[str, Path]) -> None:
    for name in FAMILIES:
        full = loaded(folders, name)
        family = load(str(folders[name]), name, torch.bfloat16, CPU, size=full.size)
        x, t = torch.randn(2, *family.event), torch.tensor([0.4, 0.8])
        with torch.no_grad():
            half, whole = family.network(x, t, cond_of(family)), full.network(x, t, cond_of(full))
        assert half.dtype == torch.float32
        assert not torch.equal(half, whole)
        torch.testing.assert_close(half, whole, atol=0.1, rtol=0.1)
        assert next(family.pipe.vae.parameters()).dtype == torch.float32


def test_v_prediction_is_read_off_the_scheduler(tmp_path: Path) -> None:
    folder = save("sd15", tmp_path, prediction_type="v_prediction")
    family = load(str(folder), None, torch.float32, CPU)
    assert family.network.prediction == "v"
    noise = torch.randn(2, *family.event)
    policy = DiffusionPolicy(family.network, family.path, ODE(), Schedule(steps=STEPS), family.event)
    images = decode(family, policy.act(cond_of(family), generator=torch.Generator(), noise=noise).action)
    torch.testing.assert_close(images, drawn_by_pipeline("sd15", family, noise, 1.0), atol=1e-4, rtol=0)


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a model that can be downloaded"):
        family_of("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no complete diffusers pipeline"):
        family_of(str(tmp_path / "empty"))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="is a KandinskyPipeline; known are StableDiffusionPipeline"):
        family_of(str(tmp_path))
    for name in ("sd15", "sdxl", "sd3", "qwen_image", "wan", "ltx"):
        with pytest.raises(ValueError, match="guidance-distilled FLUX"):
            loaded(folders, name, distilled_guidance=3.5)
    for name, size in (("sd15", (18, 16)), ("sd3", (16, 18)), ("flux", (2, 16)),
                       ("qwen_image", (16, 18)), ("sd15", (5, 16, 16)), ("wan", (5, 16, 18)), ("ltx", (5, 16, 18))):
        with pytest.raises(ValueError, match=r"model\.size must be two multiples of 4 pixels"):
            _ = loaded(folders, name, size=size).event
    for size in ((16, 16), (4, 16, 16), (0, 16, 16)):
        with pytest.raises(ValueError, match="frames one more than a multiple of 2"):
            _ = loaded(folders, "wan", size=size).event
    family = loaded(folders, "sd15")
    with pytest.raises(ValueError, match="is derived for the flow path"):
        DiffusionPolicy(family.network, family.path, FlowSDE(), Schedule(steps=2), family.event)
    DiffusionPolicy(family.network, family.path, DDIM(), Schedule(steps=2), family.event)
    for setting, message in (({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
                             ({"num_train_timesteps": 500}, "num_train_timesteps 500"),
                             ({"trained_betas": [0.1] * 1000}, "trained_betas given")):
        with pytest.raises(ValueError, match=message):
            _ = sd15_of(setting).path


def sd15_of(scheduler: dict[str, object]) -> Family:
    return FAMILIES["sd15"].of(build("sd15", **scheduler), None, None)
