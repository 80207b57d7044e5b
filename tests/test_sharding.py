"""Weights spread over processes: what one process learns, in slices, on tiny pipelines and local processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from test_image_finetune import GROUP, job, result, start
from test_image_source import free_port
from tiny_pipelines import save

from diffalign import config
from diffalign.algorithms import AWM, FlowGRPO
from diffalign.cli import launch
from diffalign.cli.main import main
from diffalign.diffusion import ODE, Schedule
from diffalign.rl.likelihoods import Matching
from diffalign.train import checkpoint, distributed, sharding
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.state import TrainState
from diffalign_image import pretrained
from diffalign_image.families import FAMILIES, trunk
from diffalign_image.finetuning import ImageFinetune, PromptEvaluation
from diffalign_image.lora import Lora
from diffalign_image.pretrained import Pretrained
from diffalign_image.runs import newest_checkpoint

TESTS = Path(__file__).parent
PLAN = Optimization(learning_rate=1e-3, minibatches=2, ema_decay=0.5, skip_zero_advantage=True, microbatch_rows=3)
REWARD = """
def dogs(images, prompts, metadata):  # all images of the other prompt score alike: its process has no row to learn from
    return [float(image.float().mean()) if "dog" in prompt else 0.0 for image, prompt in zip(images, prompts)]
"""


def jobs(folder: Path) -> dict[str, ImageFinetune]:
    """All weights by a matching method that is held near its average; LoRA by a transition method with guidance."""
    evaluation = PromptEvaluation(count=2, images_per_prompt=1, kl_images=0)
    awm = AWM(matching=Matching(draws=2), ema_velocity=1.0, optimization=PLAN, advantage=GROUP)
    grpo = FlowGRPO(advantage=GROUP, optimization=PLAN, reference_kl=1e-3)
    lora = job(folder, "sd3", 1, algorithm=grpo, images_per_prompt=4, evaluation=evaluation, schedule=Schedule(steps=2))
    lora = replace(lora, model=replace(lora.model, batch_rows=3),
                   reward=replace(lora.reward, function=f"{folder / 'mine.py'}:dogs"))
    full = replace(lora, algorithm=awm, kernel=ODE(), iterations=2, model=replace(lora.model, lora=None, guidance=None))
    return {"full": full, "lora": replace(lora, peak_tflops=1.0)}


def sharded(job: ImageFinetune) -> ImageFinetune:
    return replace(job, model=replace(job.model, shard=True))


def in_processes(work: str, folder: Path, count: int, seconds: float) -> None:
    """Run a function of this file in forked ranks of a new Python."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    code = (f"import torch; torch.set_num_threads(1); import test_sharding as t; "
            f"t.fork(t.{work}, {str(folder)!r}, {count})")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False,
                          timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]


def fork(work, folder: str, count: int) -> None:
    import torch.distributed.fsdp  # noqa: F401 - once, before the fork

    launch._PATIENCE = timedelta(seconds=60)  # one that waits for another's call in vain fails then
    ports, children = [free_port() for _ in range(6)], []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
            os._exit(work(Path(folder), rank, ports))
    raise SystemExit(any(os.waitpid(child, 0)[1] for child in children))


def train(folder: Path, name: str, run: str, *more: str) -> int:
    return main(["train", str(folder / f"{name}.yaml"), "--run", str(folder / run), *more])


def work(folder: Path, rank: int, ports: list[int]) -> int:
    """Both jobs; the first one again from its checkpoint of step 1; what a rank holds of it."""
    pretrained._GRID = 2
    codes = []
    for name, run in (("full", "two-full"), ("lora", "two-lora"), ("full", "again")):
        os.environ["MASTER_PORT"] = str(ports.pop())
        if run == "again" and rank == 0:
            shutil.copytree(folder / "two-full", folder / run)
            shutil.rmtree(folder / run / "checkpoints" / "step_00000002")
        codes.append(train(folder, name, run, *(["--resume"] if run == "again" else [])))
    os.environ["MASTER_PORT"] = str(ports.pop())
    with launch.processes("image_finetune", shards=True):
        measure(folder, rank)
    return max(codes)


def memory(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages; several tensors may lie in one."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure(folder: Path, rank: int) -> None:
    """The bytes that a rank holds after a step on all weights; the checkpoint of one process is read and written."""
    chosen = sharded(jobs(folder)["full"])
    model = Pretrained.load(chosen.model, chosen.schedule, chosen.kernel, chosen.trained, seed=0, keep_reference=True)
    state = TrainState.create({"policy": model.trained}, {"policy": 1e-3}, ema_decay=0.5, seed=0)
    cond = model.embeddings(["a dog", "a dog"])
    model.trained(torch.ones(2, *model.family.event), torch.tensor([0.3, 0.9]), cond).square().sum().backward()
    weights = list(model.trained.parameters())
    held = {"weights": weights, "gradients": [weight.grad for weight in weights if weight.grad is not None],
            "references": list(model.references[1].parameters()), "average": list(state.ema.weights.values())}
    state.optimizer.step()
    checkpoint.load(newest_checkpoint(Run(folder / "one-full")), state)
    checkpoint.save(folder / "back" / "checkpoints", state)
    for name in ("exp_avg", "exp_avg_sq"):
        held[name] = [entry[name] for entry in state.optimizer.state.values()]
    blocks = trunk(model.family).transformer_blocks
    sizes: dict[str, object] = {"whole": []}
    blocks[1].register_forward_pre_hook(lambda module, args: sizes["whole"].append(
        [not sharding.any_sharded(block) for block in blocks]))
    with torch.no_grad():
        model.trained(torch.ones(2, *model.family.event), torch.tensor([0.3, 0.9]), cond)
    sizes["left"] = sum(not sharding.is_sharded(weight) for weight in model.trained.parameters())
    sizes |= {name: [memory([tensor.to_local() for tensor in tensors]), memory([torch.empty_like(tensor.full_tensor())
                                                                               for tensor in tensors])]
              for name, tensors in held.items()}
    (folder / f"sizes-{rank}.json").write_text(json.dumps(sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two that share the model."""
    folder = tmp_path_factory.mktemp("sharding")
    save("sd3", folder / "sd3")
    (folder / "prompts.txt").write_text("a dog\ndark blue sky\n")
    (folder / "mine.py").write_text(REWARD)
    for name, chosen in jobs(folder).items():
        (folder / f"{name}.yaml").write_text(config.dump(sharded(chosen)))
        start(folder / f"one-{name}", chosen)
    in_processes("work", folder, 2, 250)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_grids() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "_GRID", 2)
        yield


def tensors(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(Run(run)) / f"{name}.safetensors")


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def agree(one: Path, other: Path) -> None:
    for name in ("modules", "training"):
        found, expected = tensors(other, name), tensors(one, name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_slices_learn_what_one_process_learns(folder: Path, name: str) -> None:
    """Weights, averages, moments and the logged numbers; in every update one process has no row to learn from."""
    one, two = folder / f"one-{name}", folder / f"two-{name}"
    agree(one, two)
    assert json.loads((two / "geometry.json").read_text())["processes"] == 2
    trained, moved = tensors(one, "modules"), tensors(one, "training")
    start = Pretrained.load(jobs(folder)[name].model, *(getattr(jobs(folder)[name], part) for part in (
        "schedule", "kernel", "trained")), seed=0, keep_reference=False).trained.state_dict()
    assert max(float((trained[f"policy.{key}"] - value).abs().max()) for key, value in start.items()) > 1e-3
    assert any(key.startswith("ema.") for key in moved)
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        assert ours.keys() == theirs.keys()
        for key in set(ours) - {"phase", "ratio_drift", "log_ratio/mean", "log_ratio/std", "kl/old"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-5), key
    for phase in ("before", "after"):
        ours, theirs = (json.loads((run / "evaluations" / f"{phase}.json").read_text()) for run in (one, two))
        assert theirs["rewards"]["reward"]["mean"] == pytest.approx(ours["rewards"]["reward"]["mean"], abs=1e-5)
    assert {file.name for file in (two / "samples").iterdir()} == {"before.png", "after.png"}


def test_a_stopped_run_goes_on_to_the_same_bits(folder: Path) -> None:
    whole, again = folder / "two-full", folder / "again"
    assert (again / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    for name in ("modules", "training"):
        for key, tensor in tensors(whole, name).items():
            assert torch.equal(tensors(again, name)[key], tensor), key


def test_checkpoints_are_whole(folder: Path, tmp_path: Path) -> None:
    """Two processes read and write those of one; one evaluates and draws from those of two."""
    for name in ("modules", "training"):
        written, read = tensors(folder / "back", name), tensors(folder / "one-full", name)
        assert written.keys() == read.keys()
        assert all(torch.equal(written[key], value) for key, value in read.items())
    chosen = jobs(folder)["full"]
    found = sharded(chosen).evaluate(Run(folder / "two-full"), seed=1000, episodes=None, sampler=None)
    expected = result(Run(folder / "two-full"), "after")
    assert found["rewards"]["reward"]["mean"] == pytest.approx(expected["rewards"]["reward"]["mean"], abs=1e-6)
    pictures = sharded(chosen).sample(Run(folder / "two-full"), tmp_path, seed=1, count=2)
    assert [path.name for path in pictures] == ["before.png", "after.png"]


def test_plain_diffusers_loads_the_pipeline(folder: Path) -> None:
    old, new, one = (DiffusionPipeline.from_pretrained(path) for path in (
        folder / "sd3", folder / "two-full" / "pipeline", folder / "one-full" / "pipeline"))
    assert type(new.transformer) is type(old.transformer)
    weights, first = new.transformer.state_dict(), old.transformer.state_dict()
    assert weights.keys() == first.keys()
    average = tensors(folder / "two-full", "training")
    for key, value in weights.items():
        stored = average.get(f"ema.network.transformer.{key}")
        assert stored is None or torch.equal(stored, value)
        torch.testing.assert_close(value, one.transformer.state_dict()[key], atol=1e-5, rtol=0)
    assert max(float((weights[key] - first[key]).abs().max()) for key in first) > 1e-4
    old.load_lora_weights(folder / "two-lora" / "lora", weight_name="pytorch_lora_weights.safetensors")
    files = [load_file(folder / f"{run}-lora" / "lora" / "pytorch_lora_weights.safetensors") for run in ("one", "two")]
    for key, value in files[0].items():
        torch.testing.assert_close(files[1][key], value, atol=1e-5, rtol=0)


def test_a_rank_holds_half(folder: Path) -> None:
    """Weights, gradients, both moments as they were read, the average and the reference: bytes of memory."""
    sizes = [json.loads((folder / f"sizes-{rank}.json").read_text()) for rank in range(2)]
    for name in ("weights", "gradients", "references", "average", "exp_avg", "exp_avg_sq"):
        for rank in range(2):
            assert sizes[rank][name][0] / sizes[rank][name][1] == pytest.approx(0.5, abs=0.01), name


def test_one_block_is_whole_at_a_time(folder: Path) -> None:
    """While the second one computes the first one is in slices again, and in the end all are."""
    for rank in range(2):
        seen = json.loads((folder / f"sizes-{rank}.json").read_text())
        assert seen["whole"] == [[False, True]]
        assert seen["left"] == 0


def test_one_process_cannot_share(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "full", str(tmp_path / "run")) == 2
    assert "model.shard: true spreads the weights over several processes, got 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_accelerate_may_say_fsdp_where_the_recipe_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (tmp_path / "whole.yaml").write_text(config.dump(jobs(folder)["full"]))
    assert train(tmp_path, "whole", "run") == 2
    assert "leaves the whole model on every process. Set model.shard: true" in capsys.readouterr().err
    assert train(folder, "full", str(tmp_path / "run")) == 2  # accepted; one process is what is refused
    assert "over several processes, got 1" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert train(folder, "full", str(tmp_path / "run")) == 2
    assert "DeepSpeed, which is not used here" in capsys.readouterr().err


def test_whole_tensors_pass_through() -> None:
    weight = torch.nn.Linear(2, 2).weight
    assert not sharding.is_sharded(weight)
    assert sharding.whole(weight) is weight
    assert sharding.placed(weight, torch.zeros(2, 2)) is weight
    assert torch.equal(sharding.gathered({"a": weight})["a"], weight)


# Every family


def every_family(folder: Path, rank: int, ports: list[int]) -> int:
    """Prediction and gradients of a sharded network on 3 ranks, of which the last has no row, beside the whole one.

    Predictions are the same bits. Gradients are added up in another order, which bfloat16 shows (in UNets, where one
    activation is used in many places).
    """
    os.environ["MASTER_PORT"] = str(ports.pop())
    with launch.processes("image_finetune", shards=True):
        for name in FAMILIES:
            for settings in ({"lora": None}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}):
                compare(folder, name, settings, rank)
        distributed.barrier()
    return 0


def compare(folder: Path, name: str, settings: dict[str, object], rank: int) -> None:
    chosen = job(folder, "sd15" if name in ("sd15", "sdxl") else "sd3", 1)
    size = {"wan": (3, 8, 8), "ltx": (3, 32, 32)}.get(name, (8, 8))
    plan = replace(chosen.model, path=str(folder / name), size=size, batch_rows=1, **{"lora": Lora(rank=2), **settings})
    found, shares = [], (slice(0, 2), slice(2, 3), slice(0, 0))
    for shard in (True, False):
        model = Pretrained.load(replace(plan, shard=shard), chosen.schedule, chosen.kernel, chosen.trained, seed=0,
                                keep_reference=False)
        generator = torch.Generator().manual_seed(0)
        x, t = torch.randn(3, *model.family.event, generator=generator), torch.tensor([0.1, 0.3, 0.9])
        cond = model.embeddings(["a dog", "a", "dark blue sky"])
        own = shares[rank] if shard else slice(0, 3)
        out = model.trained(x[own], t[own], {key: leaf[own] for key, leaf in cond.items()})
        assert len(out) == len(x[own])
        out.square().sum().backward()
        assert sharding.any_sharded(model.trained) == shard
        state = TrainState.create({"policy": model.trained}, {"policy": 1e-3}, seed=0)
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        if shard:
            distributed.sum_gradients(p for p in parameters if not sharding.is_sharded(p))
        found.append([out.detach(), *(sharding.whole(p.grad) for p in parameters if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1
    assert torch.equal(found[0][0], found[1][0][shares[rank]])
    for ours, theirs in zip(found[0][1:], found[1][1:]):
        scale = (1e-5 if plan.dtype == "float32" else 0.1) * max(float(theirs.abs().max()), 1e-3)
        torch.testing.assert_close(ours, theirs, atol=scale, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_family_can_be_sharded(tmp_path: Path) -> None:
    for name in FAMILIES:
        save(name, tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    (tmp_path / "mine.py").write_text(REWARD)
    in_processes("every_family", tmp_path, 3, 1700)
