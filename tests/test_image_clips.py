"""Clips and Qwen-Image through whole jobs: training, exporting, rewards of frames and of clips, contact sheets."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import geometry, save

from diffalign import config
from diffalign.algorithms import AWM, DiffusionNFT, FlowGRPO, GRPOGuard, SePPO
from diffalign.cli import report
from diffalign.diffusion import ODE, FlowSDE, Schedule, TrainedSteps
from diffalign.policy.protocols import select_rows
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.likelihoods import Matching
from diffalign.train.on_policy import optimize
from diffalign.train.pieces import Optimization
from diffalign.train.preferences import Pairs, prefer
from diffalign.train.run import Run
from diffalign.train.state import TrainState
from diffalign.train.supervised import Pretraining, fresh_state
from diffalign_image.evaluate import Drawn, contact_sheet, save_film, save_grid
from diffalign_image.families import FAMILIES
from diffalign_image.finetuning import ImageFinetune, PipelineSource, PromptEvaluation
from diffalign_image.guidance import Guidance
from diffalign_image.lora import Lora
from diffalign_image.pretrained import Model, Pretrained
from diffalign_image.prompts import Prompt
from diffalign_image.rewards import Frames, Jpeg, PythonFunction, Term, WeightedSum

PROMPTS = ["a red cat", "dog"]  # of different lengths
SIZES = {"qwen_image": (8, 8), "wan": (3, 8, 8), "ltx": (3, 32, 32)}
GROUP, PLAN = GroupNormalized(scale="batch"), Optimization(learning_rate=1e-2, ema_decay=0.5)
ALGORITHMS = {
    "flow_grpo": FlowGRPO(advantage=GROUP, reference_kl=1e-4, optimization=PLAN),
    "grpo_guard": GRPOGuard(advantage=GROUP, optimization=PLAN),
    "awm": AWM(matching=Matching(draws=2), ema_velocity=1.0, optimization=PLAN),
    "nft": DiffusionNFT(optimization=PLAN),
}
REWARDS = """
def still(clips, prompts, metadata):
    assert clips.ndim == 5 and clips.shape[1:3] == (3, 3), clips.shape
    return -(clips[:, 1:] - clips[:, :-1]).abs().mean((1, 2, 3, 4))


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name in SIZES:
        save(name, folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(REWARDS)
    return folder


def python(folder: Path, name: str) -> PythonFunction:
    return PythonFunction(function=f"{folder / 'mine.py'}:{name}", images="float")


def model_of(folder: Path, name: str) -> Model:
    return Model(path=str(folder / name), size=SIZES[name], device="cpu", lora=Lora(rank=2, alpha=4.0),
                 guidance=Guidance(scale=2.0), batch_rows=4)


def loaded(folder: Path, name: str) -> Pretrained:
    return Pretrained.load(model_of(folder, name), Schedule(steps=3, terminal=0.1), FlowSDE(noise_level=0.7),
                           TrainedSteps(stop=2), seed=0, keep_reference=True)


def adapters(model: Pretrained) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.trained.parameters() if p.requires_grad])


@pytest.mark.parametrize(("name", "algorithm"), [
    pytest.param(name, algorithm, marks=() if algorithm == "flow_grpo" or (name, algorithm) == ("wan", "nft") else
                 pytest.mark.slow)
    for name in SIZES for algorithm in ALGORITHMS])
def test_two_updates_move_the_adapters(folder: Path, name: str, algorithm: str) -> None:
    model = loaded(folder, name)
    state = TrainState.create({"policy": model.trained}, {"policy": 1e-2}, ema_decay=0.5, seed=0)
    reward = python(folder, "brightness")
    source = PipelineSource(model, [Prompt(text) for text in PROMPTS],
                            reward if name == "qwen_image" else Frames(reward=reward), geometry(2, 4), state, 0)
    before = adapters(model)
    loop = optimize(ALGORITHMS[algorithm].compose(), model.policy, source, state, reference=model.references[1])
    for iteration in islice(loop, 2):
        assert iteration.metrics.get("ratio_drift", 0.0) < 1e-2
    moved = adapters(model) - before
    assert torch.isfinite(moved).all()
    assert moved.abs().max() > 1e-4


@pytest.mark.parametrize("name", SIZES)
def test_seppo_prefers_given_latents_to_its_own_samples(folder: Path, name: str) -> None:
    model = loaded(folder, name)
    plan = SePPO(snapshot_every=1, fitting=Pretraining(steps=2, batch_size=2, learning_rate=1e-2, warmup_steps=1,
                                                       ema_decay=None)).compose()
    state, before = fresh_state(plan.fitting, model.trained, seed=0), adapters(model)
    cond = model.embeddings(PROMPTS)

    def pairs(generator: torch.Generator) -> Pairs:
        return Pairs(torch.randn(2, *model.family.event, generator=generator), None, select_rows(cond, torch.arange(2)))

    steps = [iteration.step for iteration in prefer(plan, model.policy.with_sampler(ODE()), pairs, state)]
    assert steps == [1, 2]
    assert (adapters(model) - before).abs().max() > 1e-4


def test_a_clip_job_scores_clips_and_frames_and_draws_contact_sheets(folder: Path, tmp_path: Path) -> None:
    frames = Frames(reward=Jpeg(), take=(0, -1))
    reward = WeightedSum(terms=(Term(weight=1.0, reward=python(folder, "still")), Term(weight=0.1, reward=frames)))
    job = ImageFinetune(
        model=model_of(folder, "wan"), prompts=str(folder / "prompts.txt"), reward=reward,
        algorithm=ALGORITHMS["flow_grpo"], kernel=FlowSDE(noise_level=0.7), schedule=Schedule(steps=2),
        trained=TrainedSteps(stop=1), prompts_per_update=2, images_per_prompt=2, iterations=1,
        evaluation=PromptEvaluation(count=2, images_per_prompt=1, kl_images=2))
    run = Run.create(tmp_path / "run", config.dump(job), resume=False)
    job.train(run)
    assert (run.path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((run.path / "evaluations/after.json").read_text())["kl_nats"] > 0
    with Image.open(run.path / "samples" / "after.png") as sheet:
        assert sheet.size == (3 * (96 + 4), 4 * (96 + 44))  # 3 frames of 8 pixels, enlarged, of 4 clips
    assert played(run.path / "samples" / "after.mp4")[:2] == (3, (4 * 8, 8))
    made = job.sample(run, tmp_path, seed=1, count=2)
    assert [path.name for path in made] == ["before.png", "before.mp4", "after.png", "after.mp4"]
    assert played(made[-1])[:2] == (3, (2 * 8, 8))
    assert "data:video/mp4;base64," in report.write(run.path).read_text()


def played(film: Path) -> tuple[int, tuple[int, int], float, np.ndarray]:
    """(frames, (width, height), frames a second, pixels [frames, height, width, 3]) as a player decodes them."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(film), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    width, height, rate = re.search(r"Video: h264.* (\d+)x(\d+).*?([\d.]+) fps", done.stderr.decode()).groups()
    pixels = np.frombuffer(done.stdout, np.uint8).reshape(-1, int(height), int(width), 3)
    return len(pixels), (int(width), int(height)), float(rate), pixels


@pytest.mark.parametrize("rate", [16, 25])
def test_a_film_plays_every_frame_of_the_clips_side_by_side(tmp_path: Path, rate: int) -> None:
    """Two clips of 5 frames of 24 x 40 pixels, each of one gray: 40, 60, ... and 200, 180, ..."""
    bright, dark = 40 + 20 * torch.arange(5.0), 200 - 20 * torch.arange(5.0)
    gray = torch.stack([bright, dark]) / 127.5 - 1
    drawn = Drawn(gray[:, :, None, None, None].expand(2, 5, 3, 24, 40), ["one", "two"])
    frames, size, fps, pixels = played(save_film(drawn, tmp_path / "film.mp4", frame_rate=rate))
    assert (frames, size, fps) == (5, (80, 24), rate)
    seen = torch.tensor(pixels[:, 12, [20, 60], 0].copy()).float()
    torch.testing.assert_close(seen, torch.stack([bright, dark], 1), atol=4.0, rtol=0)


def test_rows_do_not_depend_on_the_lengths_of_others(folder: Path) -> None:
    model = loaded(folder, "qwen_image")
    some = [PROMPTS[i] for i in (1, 0, 1, 1, 0)]  # sorted by length, either way, this is no permutation of order two
    cond, x, t = model.embeddings(some), torch.randn(5, 4, 4, 4), torch.tensor([0.2, 0.5, 0.9, 0.4, 0.7])
    assert len(set(cond["length"].tolist())) == 2
    with torch.no_grad():
        together = model.family.network(x, t, cond)
        for i in range(5):
            alone = model.family.network(x[i:i + 1], t[i:i + 1], select_rows(cond, torch.tensor([i])))
            torch.testing.assert_close(together[i:i + 1], alone, atol=1e-5, rtol=1e-5)


def clips() -> torch.Tensor:
    """Two clips of three frames [2, 3, 3, 4, 4]; frame f of clip n is -1 + 0.31 (3 n + f) everywhere."""
    return (-1 + 0.31 * torch.arange(6.0)).reshape(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 4)


def test_frames_average_an_image_reward(folder: Path, tmp_path: Path) -> None:
    inner = python(folder, "brightness")
    assert Frames(reward=inner)(clips(), ["a", "b"]).tolist() == pytest.approx([-0.69, 0.24])
    assert Frames(reward=inner, take=(-1,))(clips(), ["a", "b"]).tolist() == pytest.approx([-0.38, 0.55])
    (tmp_path / "named.py").write_text(
        "def named(images, prompts, metadata):\n"
        "    assert prompts == ['a', 'a', 'b', 'b'] and [m['n'] for m in metadata] == [0, 0, 1, 1]\n"
        "    assert images.shape == (4, 3, 4, 4) and str(images.dtype) == 'torch.uint8'\n"
        "    return images[:, 0, 0, 0]\n")
    named = PythonFunction(function=f"{tmp_path / 'named.py'}:named")
    found = Frames(reward=named, take=(0, 1))(clips(), ["a", "b"], [{"n": 0}, {"n": 1}])
    assert found.tolist() == [20.0, 138.5]  # bytes of -1, -0.69 and of -0.07, 0.24: 0, 40 and 119, 158


def test_a_clip_reward_gets_whole_clips(tmp_path: Path) -> None:
    (tmp_path / "last.py").write_text("def last(clips, prompts, metadata):\n    return clips[:, -1, 2, 1, 3].float()\n")
    found = PythonFunction(function=f"{tmp_path / 'last.py'}:last")(clips(), ["a", "b"])
    assert found.tolist() == [79, 198]  # -0.38 and 0.55


def test_a_contact_sheet_is_a_row_a_clip(tmp_path: Path) -> None:
    sheet = contact_sheet(Drawn(clips(), ["one", "two"]), 2)
    assert sheet.captions == ["one", "frame 2", "two", "frame 2"]
    assert sheet.images[:, 0, 0, 0].tolist() == pytest.approx([-1, -0.38, -0.07, 0.55])
    with Image.open(save_grid(Drawn(clips(), ["one", "two"]), tmp_path / "sheet.png")) as image:
        assert image.size == (3 * 100, 2 * 140)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: Jpeg()(clips(), ["a", "b"]), "this reward scores images, and the model makes clips of 3 frames"),
    (lambda: Frames(reward=Jpeg())(clips()[:, 0], ["a", "b"]), "scores clips, and the model makes images"),
    (lambda: Frames(reward=Jpeg(), take=(3,))(clips(), ["a", "b"]), r"\[3\] names frames that clips of 3 frames"),
    (lambda: Frames(reward=Jpeg(), take=(-4,))(clips(), ["a", "b"]), r"\[-4\] names frames"),
    (lambda: Frames(reward=Jpeg(), take=()), "take must name frames"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_models_that_would_be_trained_in_part_are_refused(folder: Path) -> None:
    wan = loaded(folder, "wan").family.pipe
    wan.transformer_2 = wan.transformer
    with pytest.raises(ValueError, match="has a transformer_2"):
        FAMILIES["wan"].of(wan, None, None)
