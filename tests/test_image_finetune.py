"""Fine-tuning real diffusers pipelines with LoRA: learning, resuming, exporting, refusing, on tiny random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from killing import train_until
from safetensors.torch import load_file
from tiny_pipelines import save

from diffalign import config
from diffalign.algorithms import AWM, DDPO, DPPO, DiffusionNFT, FlowGRPO, NoisePPO
from diffalign.diffusion import CPS, DDIM, FlowSDE, Schedule, TrainedSteps
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.likelihoods import Matching
from diffalign.rl.surrogates import PPOClip
from diffalign.train import checkpoint
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.state import TrainState
from diffalign_image.families import FAMILIES, encoders_on, trunk
from diffalign_image.finetuning import ImageFinetune, PromptEvaluation
from diffalign_image.geometry import solve
from diffalign_image.guidance import Guidance
from diffalign_image.lora import Lora
from diffalign_image.pipeline_source import PipelineSource
from diffalign_image.pretrained import Model, Pretrained
from diffalign_image.prompts import Embeddings, Prompt, positions, read_prompts
from diffalign_image.rewards import PythonFunction
from diffalign_image.runs import newest_checkpoint

PROMPTS = ["a red cat", "dark blue sky", "bright dog", "a dog"]
REWARDS = """
def brightness(images, prompts, metadata):
    return images.float().mean((1, 2, 3))
"""
GROUP = GroupNormalized(scale="batch")
CLIP = PPOClip(low=0.2, high=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of each family, a prompt file and a reward."""
    folder = tmp_path_factory.mktemp("finetune")
    for name in FAMILIES:
        save(name, folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(REWARDS)
    return folder


def job(folder: Path, family: str, iterations: int, **changes) -> ImageFinetune:
    plan = Optimization(learning_rate=1e-2, minibatches=2, ema_decay=0.5)
    if family == "sd15":
        parts = {"algorithm": DDPO(advantage=GROUP, surrogate=CLIP, optimization=plan), "kernel": DDIM(eta=1.0)}
    else:
        parts = {"algorithm": FlowGRPO(advantage=GROUP, surrogate=CLIP, reference_kl=1e-4, optimization=plan),
                 "kernel": FlowSDE(noise_level=0.7)}
    model = Model(path=str(folder / family), size=(8, 8), device="cpu", lora=Lora(rank=4, alpha=8.0),
                  guidance=Guidance(scale=2.0))
    settings = {"model": model, "prompts": str(folder / "prompts.txt"),
                "reward": PythonFunction(function=f"{folder / 'mine.py'}:brightness", images="float"),
                "schedule": Schedule(steps=3), "trained": TrainedSteps(stop=2), "prompts_per_update": 2,
                "images_per_prompt": 8, "iterations": iterations, "checkpoint_every": 1,
                "evaluation": PromptEvaluation(count=4, images_per_prompt=2, kl_images=2), **parts, **changes}
    return ImageFinetune(**settings)


def start(path: Path, job: ImageFinetune, *, resume: bool = False) -> Run:
    run = Run.create(path, config.dump(job), resume=resume)
    job.train(run)
    return run


def result(run: Run, name: str) -> dict:
    return json.loads((run.path / "evaluations" / f"{name}.json").read_text())


def loaded(job: ImageFinetune) -> Pretrained:
    return Pretrained.load(job.model, job.schedule, job.kernel, job.trained, seed=job.seed, keep_reference=True)


def brighter(folder: Path) -> ImageFinetune:
    """Settings that move the mean brightness by a standard deviation of a batch's images in a few updates."""
    chosen = job(folder, "sd3", 4, prompts_per_update=4)
    plan = Optimization(learning_rate=0.1, ema_decay=0.5)
    algorithm = replace(chosen.algorithm, optimization=plan, surrogate=PPOClip(low=10.0, high=10.0), reference_kl=0.0)
    return replace(chosen, algorithm=algorithm)


def test_images_become_brighter_within_a_few_updates(folder: Path, tmp_path: Path) -> None:
    run = start(tmp_path / "run", brighter(folder))
    before, after = result(run, "before"), result(run, "after")
    assert after["rewards"]["reward"]["mean"] > before["rewards"]["reward"]["mean"] + 0.006
    assert before["kl_nats"] == 0
    assert after["kl_nats"] > 0
    assert after["split"] == "training prompts"
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["ratio_drift"] < 1e-2 for record in records if record["phase"] == "train")
    assert {path.name for path in (run.path / "samples").iterdir()} == {"before.png", "after.png"}
    stored = checkpoint.shapes(newest_checkpoint(run))
    assert stored
    assert all("lora" in name for name in stored)


def randomized(model: Pretrained) -> Pretrained:
    """The model as if it had been trained."""
    with torch.no_grad():
        for name, parameter in model.trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_diffusers_loads_what_was_learned(folder: Path, tmp_path: Path, family: str) -> None:
    chosen = job(folder, "sd15" if family in ("sd15", "sdxl") else "sd3", 1)
    size = {"wan": (3, 8, 8), "ltx": (3, 32, 32)}.get(family, (8, 8))
    model = randomized(loaded(replace(chosen, model=replace(chosen.model, path=str(folder / family), size=size))))
    state = TrainState.create({"policy": model.trained}, {"policy": 1e-3}, seed=0)
    model.save(Run(tmp_path), state)
    plain = DiffusionPipeline.from_pretrained(folder / family)
    plain_trunk = plain.unet if "unet" in plain.components else plain.transformer
    adapted = {name.replace(".base_layer", ""): tensor for name, tensor in trunk(model.family).state_dict().items()}
    for name, tensor in plain_trunk.state_dict().items():
        assert torch.equal(adapted[name], tensor), name  # the base is untouched, to the bit
    cond = model.embeddings(PROMPTS[:2])
    x, t = torch.randn(2, *model.family.event), torch.tensor([0.3, 0.9])
    network = type(model.family).of(plain, model.plan.size, None).network
    with torch.no_grad():
        learned, untouched = model.family.network(x, t, cond), network(x, t, cond)
        plain.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
        exported = network(x, t, cond)
    assert (exported - learned).abs().max() <= 1e-5
    assert (exported - untouched).abs().max() > 1e-2


def test_the_reference_ignores_the_adapters_and_leaves_them_trainable(folder: Path) -> None:
    model = loaded(job(folder, "sd3", 1))
    cond = model.embeddings(PROMPTS[:2])
    x, t = torch.randn(2, *model.family.event), torch.tensor([0.3, 0.9])
    start = model.trained(x, t, cond).detach()
    torch.testing.assert_close(start, model.references[1](x, t, cond), atol=0, rtol=0)
    randomized(model)
    moved = model.trained(x, t, cond)
    base = model.references[1](x, t, cond)
    torch.testing.assert_close(base, start, atol=0, rtol=0)
    assert not base.requires_grad
    moved.square().sum().backward()  # the graph from before the reference was asked still reaches the adapters
    trained = {name: p for name, p in model.trained.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name and p.grad is not None for name, p in trained.items())
    assert (moved - base).abs().max() > 1e-2


def test_a_killed_run_resumes_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    chosen = job(folder, "sd15", 3)
    whole = start(tmp_path / "whole", chosen).path

    train_until(tmp_path / "killed", chosen, 2)
    resumed = start(tmp_path / "killed", chosen, resume=True).path
    assert (resumed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    weights = [load_file(path / "lora" / "pytorch_lora_weights.safetensors") for path in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    found = chosen.evaluate(Run(resumed), seed=1000, episodes=None, sampler=None)
    assert found["rewards"] == json.loads((whole / "evaluations/after.json").read_text())["rewards"]
    pictures = chosen.sample(Run(resumed), tmp_path, seed=1, count=2)
    assert [path.name for path in pictures] == ["before.png", "after.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_all_weights_are_trained_and_saved_as_a_pipeline(folder: Path, tmp_path: Path) -> None:
    chosen = job(folder, "sd3", 1)
    chosen = replace(chosen, model=replace(chosen.model, lora=None, guidance=None))
    run = start(tmp_path / "run", chosen)
    assert not (run.path / "lora").exists()
    assert result(run, "after")["kl_nats"] > 0
    old, new = (DiffusionPipeline.from_pretrained(path) for path in (folder / "sd3", run.path / "pipeline"))
    assert any(not torch.equal(a, b) for a, b in zip(old.transformer.parameters(), new.transformer.parameters()))
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        pairs = zip(old.components[part].parameters(), new.components[part].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part


def test_guidance_in_sampling_alone_draws_guided_images_and_matches_unguided_ones(folder: Path, tmp_path: Path) -> None:
    plan = Optimization(learning_rate=1e-3, ema_decay=0.5)
    awm = AWM(matching=Matching(draws=2), ema_velocity=1.0, optimization=plan)
    chosen = job(folder, "sd3", 1, algorithm=awm)
    chosen = replace(chosen, model=replace(chosen.model, guidance=Guidance(scale=3.0, likelihood=False)))
    model = loaded(chosen)
    assert (model.sampling.scale, model.trained.scale) == (3.0, 1.0)
    assert model.sampling.network is model.trained.network
    run = start(tmp_path / "run", chosen)
    assert result(run, "after")["kl_nats"] > 0
    same = loaded(job(folder, "sd3", 1))
    assert (same.sampling.scale, same.trained.scale) == (2.0, 2.0)
    with pytest.raises(ValueError, match=r"model\.guidance\.likelihood must be the same, got True and False"):
        replace(job(folder, "sd3", 1), model=chosen.model)
    replace(chosen, algorithm=DiffusionNFT())


def test_a_rollout_is_drawn_with_the_sampling_guidance_for_the_next_prompts(folder: Path) -> None:
    chosen = job(folder, "sd3", 1, algorithm=AWM())
    model = loaded(replace(chosen, model=replace(chosen.model, guidance=Guidance(scale=3.0, likelihood=False))))
    prompts = [Prompt(text, {"bonus": i}) for i, text in enumerate(PROMPTS)]
    state = TrainState.create({"policy": model.trained}, {"policy": 1e-3}, seed=0)
    state.step = 1

    def reward(images: torch.Tensor, texts: list[str], metadata: list[dict[str, int]]) -> list[float]:
        assert texts == [PROMPTS[one["bonus"]] for one in metadata]
        return [float(one["bonus"]) for one in metadata]

    plan = solve(prompts=2, images_per_prompt=3, processes=1, batch_rows=4, microbatch_rows=4, rows_per_image=1,
                 epochs=1, minibatches=1)
    assert plan.block_prompts == 1
    source = PipelineSource(model, prompts, reward, plan, state, seed=5)
    rollout = source.collect(model.policy, generator=torch.Generator().manual_seed(1))
    expected = [i for i in positions(2, 2, 4, 5) for _ in range(3)]
    assert rollout.prompt.tolist() == expected
    assert rollout.reward[0].tolist() == expected
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1]
    cond = model.embeddings([PROMPTS[i] for i in expected])
    seeds = [5 * 1_000_003 + place for place in (2, 3)]  # of the endless sequence of prompts
    noise = torch.cat([torch.randn(3, 4, *model.family.event, generator=torch.Generator().manual_seed(seed))
                       for seed in seeds])
    guided, plain = (policy.act(cond, generator=torch.Generator(), noise=noise[:, 0], step_noise=noise[:, 1:]).action
                     for policy in (model.sampler, model.policy))
    torch.testing.assert_close(rollout.trajectory.sample, guided, atol=1e-5, rtol=1e-5)
    assert (guided - plain).abs().max() > 1e-3


def test_batch_rows_change_memory_and_not_what_is_drawn(folder: Path) -> None:
    chosen = job(folder, "sd15", 1)
    noise, drawn = torch.randn(5, 4, 4, 4), []
    for rows in (1, 8):
        model = loaded(replace(chosen, model=replace(chosen.model, batch_rows=rows)))
        sizes: list[int] = []
        trunk(model.family).register_forward_pre_hook(lambda module, args, sizes=sizes: sizes.append(len(args[0])))
        cond = model.embeddings([PROMPTS[i % 4] for i in range(5)])
        drawn.append(model.sampler.act(cond, generator=torch.Generator().manual_seed(0), noise=noise).action)
        assert max(sizes) == (2 if rows == 1 else 10)  # with and without the prompt
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)


def test_checkpointed_activations_give_the_same_gradients(folder: Path) -> None:
    chosen, gradients = job(folder, "sd3", 1), []
    for saving in (False, True):
        model = loaded(replace(chosen, model=replace(chosen.model, gradient_checkpointing=saving)))
        x, t = torch.ones(2, *model.family.event), torch.tensor([0.3, 0.9])
        model.trained(x, t, model.embeddings(PROMPTS[:2])).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.trained.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_prompts_come_once_before_any_comes_again() -> None:
    whole = positions(0, 12, 4, seed=3)
    assert all(sorted(whole[i:i + 4]) == [0, 1, 2, 3] for i in (0, 4, 8))
    assert len({tuple(whole[i:i + 4]) for i in (0, 4, 8)}) > 1
    assert positions(0, 5, 4, 3) + positions(5, 7, 4, 3) == whole
    assert positions(0, 100, 100, 3) != positions(0, 100, 100, 4)


def test_prompt_files(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one\n\n  two \n")
    assert read_prompts(str(text)) == [Prompt("one"), Prompt("two")]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"prompt": "one", "metadata": {"count": 3}}\n{"prompt": "two"}\n')
    assert read_prompts(str(lines)) == [Prompt("one", {"count": 3}), Prompt("two")]
    for bad, message in (("nope", "line 1: not JSON"), ('{"text": "a"}', "line 1: expected"),
                         ('{"prompt": "a", "metadata": 3}', "metadata must be an object, got int"),
                         ('{"prompt": "a", "target": 3}', r"unknown fields \['target'\]; put them into metadata")):
        lines.write_text(bad)
        with pytest.raises(ValueError, match=message):
            read_prompts(str(lines))
    text.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(str(text))
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(str(tmp_path / "b.txt"))


def test_embeddings_are_computed_once() -> None:
    asked: list[str] = []

    def encode(prompt: str) -> dict[str, torch.Tensor]:
        asked.append(prompt)
        return {"text": torch.full((1, 2), float(len(prompt)))}

    embeddings = Embeddings(encode)
    assert embeddings(["aa", "b", "aa"])["text"].tolist() == [[2, 2], [1, 1], [2, 2]]
    assert embeddings(["b"])["text"].tolist() == [[1, 1]]
    assert asked == ["aa", "b"]


def test_text_encoders_come_to_the_device_for_new_prompts_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = job(folder, "sd3", 1)
    plain = loaded(chosen)
    offloaded = loaded(replace(chosen, model=replace(chosen.model, offload_encoders=True)))
    texts = ["red cat", "dog"]
    assert torch.equal(offloaded.embeddings(texts)["text"], plain.embeddings(texts)["text"])

    events: list[str] = []
    move, encode = torch.nn.Module.to, plain.family.encode

    def moved(module: torch.nn.Module, device: object) -> torch.nn.Module:
        events.append(str(device))
        return move(module, device)

    def encoded(prompt: str) -> dict[str, torch.Tensor]:
        events.append(prompt)
        return encode(prompt)

    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        monkeypatch.setattr(type(getattr(plain.family.pipe, name)), "to", moved)
    embeddings = Embeddings(encoded, partial(encoders_on, plain.family, torch.device("cpu:0")))
    for asked in (["red cat", "dog", "red cat"], ["dog"], ["dog", "blue cat"]):
        embeddings(asked)
    there, back = ["cpu:0"] * 3, ["cpu"] * 3
    assert events == [*there, "red cat", "dog", *back, *there, "blue cat", *back]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch, about its own use of it
def test_a_compiled_network_learns_the_same(folder: Path, tmp_path: Path) -> None:
    chosen = job(folder, "sd3", 2)
    for name, compiled in (("eager", False), ("compiled", True)):
        start(tmp_path / name, replace(chosen, model=replace(chosen.model, compile=compiled)))
    eager, compiled = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors")
                       for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name, weight in eager.items():
        torch.testing.assert_close(compiled[name], weight, rtol=0, atol=1e-5)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a value critic"):
        job(folder, "sd15", 1, algorithm=DPPO())
    with pytest.raises(ValueError, match="learned initial noise"):
        job(folder, "sd15", 1, algorithm=NoisePPO())
    with pytest.raises(ValueError, match="images_per_prompt must be at least 1, got 0"):
        job(folder, "sd15", 1, images_per_prompt=0)
    with pytest.raises(ValueError, match="exceeds the 4 prompts"):
        start(tmp_path / "many", job(folder, "sd15", 1, prompts_per_update=5))
    with pytest.raises(ValueError, match="derived for the flow path"):
        start(tmp_path / "path", job(folder, "sd15", 1, kernel=FlowSDE()))
    with pytest.raises(ValueError, match="all weights, whose updates bfloat16 rounds away"):
        Model(path="x", lora=None, dtype="bfloat16")
    with pytest.raises(ValueError, match="batch_rows must be at least 1"):
        Model(path="x", batch_rows=0)
    with pytest.raises(ValueError, match="compile: true was never tried"):
        Model(path="x", shard=True, compile=True)
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": ()}):
        with pytest.raises(ValueError, match="got"):
            Lora(**wrong)
    chosen = job(folder, "sd15", 1)
    lost = replace(chosen, model=replace(chosen.model, lora=Lora(targets=("to_q", "to_w"))))
    with pytest.raises(ValueError, match=r"lora.targets \['to_w'\] name no linear layer"):
        loaded(lost)
    for wrong in ({"count": 1}, {"images_per_prompt": 0}, {"kl_images": 1}):
        with pytest.raises(ValueError, match="got"):
            PromptEvaluation(**wrong)
    (tmp_path / "bad.py").write_text("def score(images, prompts, metadata):\n    return [1e999 - 1e999] * 8\n")
    with pytest.raises(ValueError, match="returned nan for image 0"):
        start(tmp_path / "nan", job(folder, "sd3", 1, kernel=CPS(), reward=PythonFunction(
            function=f"{tmp_path / 'bad.py'}:score")))


def test_every_problem_of_a_config_is_listed_at_its_path(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "type: image_finetune\nprompts: a.txt\niterations: 1\nmodel: {path: x, lora: {rank: 0}, dtype: int8}\n"
        "reward: {type: remote, url: ftp://x}\nalgorithm: {type: awm}\nkernel: {type: ode}\nschedule: {step: 3}\n")
    with pytest.raises(config.ConfigError) as caught:
        config.load(ImageFinetune, tmp_path / "bad.yaml")
    text = str(caught.value)
    for path in ("model.lora: need rank", "model.dtype:", "reward: url must be", "schedule.step: unknown setting",
                 "schedule.steps: required"):
        assert path in text, text
