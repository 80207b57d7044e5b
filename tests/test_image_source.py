"""Rollouts of pretrained pipelines: rewards in the background, several processes, guards, services that fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import train_until
from safetensors.torch import load_file
from test_image_finetune import GROUP, PROMPTS, loaded, result, start
from test_image_finetune import job as longer_job
from tiny_pipelines import save

from diffalign import config
from diffalign.algorithms import AWM, FlowGRPO
from diffalign.cli.main import main
from diffalign.diffusion import ODE, FlowSDE, Schedule, TrainedSteps
from diffalign.rl.likelihoods import Matching
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.state import TrainState
from diffalign_image.evaluate import path_kl
from diffalign_image.finetuning import ImageFinetune, PromptEvaluation
from diffalign_image.geometry import solve
from diffalign_image.guards import Guard, Stop, Watch, diversity, drift, features
from diffalign_image.pipeline_source import PipelineSource, scored_steps
from diffalign_image.prompts import Prompt
from diffalign_image.rewards import Constrained, Constraint, Jpeg, JpegIncompressibility, PythonFunction, Remote
from diffalign_image.runs import newest_checkpoint
from diffalign_image.scoring import Block, score_all
from diffalign_image.throughput import Stopwatch

TESTS = Path(__file__).parent
SHORT = PromptEvaluation(count=2, images_per_prompt=2, kl_images=0)


def job(folder: Path, family: str, iterations: int, **changes: object) -> ImageFinetune:
    """With an evaluation of four images."""
    return longer_job(folder, family, iterations, **{"evaluation": SHORT, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save("sd3", folder / "sd3")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text("def brightness(images, prompts, metadata):\n"
                                    "    return images.float().mean((1, 2, 3))\n")
    return folder


# In the background


def blocks(count: int, seconds: float, log: list[str]) -> Iterator[Block]:
    for i in range(count):
        time.sleep(seconds)
        log.append(f"drawn {i}")
        yield Block(torch.full((2, 3, 4, 4), i / 10), [Prompt(f"{i}")] * 2)


def test_rewards_are_measured_while_the_next_block_is_drawn() -> None:
    def slow(images: torch.Tensor, texts: list[str], metadata: list) -> torch.Tensor:
        time.sleep(0.1)
        return images.mean((1, 2, 3))

    def measured(workers: int) -> tuple[torch.Tensor, float]:
        begun = time.perf_counter()
        values = score_all(blocks(6, 0.1, []), {"slow": slow}, workers, Stopwatch())["slow"]
        return values, time.perf_counter() - begun

    found = [measured(workers)[0] for workers in (0, 1, 3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert found[0].tolist() == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5])
    # one after the other they take 6 x (0.1 + 0.1) s at least; a busy machine may spoil a try
    assert measured(0)[1] >= 1.2
    for workers in (1, 3):
        assert any(measured(workers)[1] < 1.1 for _ in range(5))

def test_a_failing_reward_ends_the_drawing_of_blocks() -> None:
    def fails(images: torch.Tensor, texts: list[str], metadata: list) -> list[float]:
        raise ValueError("no")

    for workers in (0, 1):
        log: list[str] = []
        with pytest.raises(ValueError, match="no"):
            score_all(blocks(20, 0.05, log), {"fails": fails}, workers, Stopwatch())
        assert len(log) < 10


def test_threads_change_no_bit_of_a_run(folder: Path, tmp_path: Path) -> None:
    runs = [start(tmp_path / str(workers), job(folder, "sd3", 2, prompts_per_update=4, reward_workers=workers)).path
            for workers in (0, 2)]
    lines = [(path / "metrics.jsonl").read_text() for path in runs]
    assert lines[0] == lines[1]
    weights = [load_file(path / "lora" / "pytorch_lora_weights.safetensors") for path in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for path in runs:
        records = [json.loads(line) for line in (path / "throughput.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2]
        for record in records:
            stages = {"sample_ms", "decode_ms", "reward_ms", "reward_wait_ms", "update_ms", "guard_ms"}
            assert stages <= record.keys()
            parts = sum(record[name] for name in ("sample_ms", "decode_ms", "reward_wait_ms", "update_ms"))
            assert parts == pytest.approx(record["iteration_ms"], rel=1e-3)
            assert record["images_per_s"] == pytest.approx(32 / record["iteration_ms"] * 1000, rel=1e-2)
            assert ("peak_memory_gb" in record) == torch.cuda.is_available()


# Geometry


def test_the_geometry_of_an_update() -> None:
    settings = {"images_per_prompt": 24, "batch_rows": 60, "microbatch_rows": 32, "rows_per_image": 9, "epochs": 1,
                "minibatches": 2}
    one, four = solve(prompts=48, processes=1, **settings), solve(prompts=48, processes=4, **settings)
    assert (one.images, one.rows_per_step, one.optimizer_steps) == (1152, 5184, 2)
    assert (four.images, four.rows_per_step, four.optimizer_steps) == (1152, 5184, 2)
    assert (one.block_prompts, one.blocks_per_process, one.microbatches_per_step) == (2, 24, 162)
    assert (four.prompts_per_process, four.blocks_per_process, four.microbatches_per_step) == (12, 6, 41)
    assert solve(prompts=3, processes=1, **{**settings, "batch_rows": 1}).block_prompts == 1
    assert "48 prompts x 24 images = 1152 images an update, on 4 processes" in str(four)
    with pytest.raises(ValueError, match="must be a multiple of the 4 processes; the nearest is 44 or 48"):
        solve(prompts=46, processes=4, **settings)
    with pytest.raises(ValueError, match=r"the nearest is 4$"):
        solve(prompts=3, processes=4, **settings)


def test_geometry_is_said_and_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = job(folder, "sd3", 1)
    model = loaded(chosen)
    assert scored_steps(model.policy) == 2
    assert chosen.geometry(model.policy, 2).rows_per_image == 2
    assert replace(chosen, algorithm=AWM(matching=Matching(draws=5))).geometry(model.policy, 1).rows_per_image == 5
    (tmp_path / "job.yaml").write_text(config.dump(chosen))
    assert main(["train", str(tmp_path / "job.yaml"), "--run", str(tmp_path / "run")]) == 0
    assert "2 prompts x 8 images = 16 images an update, on 1 process" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "geometry.json").read_text())["rows_per_image"] == 2


# Several processes


def two_jobs(folder: Path) -> dict[str, object]:
    """A transition likelihood with constraints and extremes, and a matching one with a random window."""
    plan = Optimization(learning_rate=1e-3, minibatches=2, ema_decay=0.5, skip_zero_advantage=True)
    reward = Constrained(reward=PythonFunction(function=f"{folder / 'mine.py'}:brightness", images="float"), rate=1.0,
                         constraints=(Constraint(reward=JpegIncompressibility(), at_least=0.7),))
    grpo = FlowGRPO(advantage=replace(GROUP, extremes=2), optimization=plan, reference_kl=1e-3)
    awm = AWM(matching=Matching(draws=2), ema_velocity=1.0, optimization=replace(plan, skip_zero_advantage=False))
    return {"grpo": job(folder, "sd3", 2, algorithm=grpo, reward=reward, kernel=FlowSDE(noise_level=0.7),
                        trained=TrainedSteps(stop=2, size=1, ode_elsewhere=True), prompts_per_update=4,
                        images_per_prompt=4),
            "awm": job(folder, "sd3", 2, algorithm=awm, kernel=ODE(), prompts_per_update=4, images_per_prompt=4)}


def run_in_two(folder: str, port: str) -> None:
    """Run as a script: two forked ranks that take their number from the environment, as torchrun sets it."""
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port)
            codes = [main(["train", f"{folder}/{name}.yaml", "--run", f"{folder}/two-{name}"])
                     for name in ("grpo", "awm")]
            os._exit(max(codes))
    raise SystemExit(sum(os.waitpid(child, 0)[1] for child in children) != 0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.timeout(1800)
def test_two_processes_learn_what_one_learns(folder: Path) -> None:
    for name, chosen in two_jobs(folder).items():
        (folder / f"{name}.yaml").write_text(config.dump(chosen))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    code = ("import torch; torch.set_num_threads(1); import test_image_source as t; "
            f"t.run_in_two({str(folder)!r}, '{free_port()}')")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, chosen in two_jobs(folder).items():
        one, two = start(folder / f"one-{name}", chosen).path, folder / f"two-{name}"
        states = [load_file(newest_checkpoint_of(path) / "modules.safetensors") for path in (one, two)]
        first = {f"policy.{key}": value for key, value in loaded(chosen).trained.state_dict().items()}
        assert max(float((states[0][key] - first[key]).abs().max()) for key in states[0]) > 1e-3
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, atol=1e-5, rtol=0)
        lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
                 for path in (one, two)]
        assert [record.keys() for record in lines[0]] == [record.keys() for record in lines[1]]
        for ours, theirs in zip(*lines):
            for key in ("reward/mean", "samples/diversity", "guard/velocity_ratio", "multiplier/jpeg_incompressibility",
                        "advantage/tied_groups", "grad_norm/policy"):
                assert theirs.get(key, 0.0) == pytest.approx(ours.get(key, 0.0), rel=1e-3, abs=1e-5), key
        shares = [json.loads((path / "geometry.json").read_text())["prompts_per_process"] for path in (one, two)]
        assert shares == [4, 2]
        assert (two / "lora" / "pytorch_lora_weights.safetensors").is_file()
        assert (two / "report.html").is_file()


def newest_checkpoint_of(path: Path) -> Path:
    return newest_checkpoint(Run(path))


def test_other_jobs_refuse_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "configs/image/shapes_pretrain.yaml", "--run", str(tmp_path / "run")]) == 2
    assert "a image_pretrain job runs in one process, got WORLD_SIZE=2" in capsys.readouterr().err


# Constraints


def test_multipliers_survive_a_kill(folder: Path, tmp_path: Path) -> None:
    reward = Constrained(reward=Jpeg(), rate=1.0, constraints=(Constraint(reward=JpegIncompressibility(), name="kb",
                                                                          at_least=0.9),))
    chosen = job(folder, "sd3", 3, reward=reward)
    whole = start(tmp_path / "whole", chosen).path

    train_until(tmp_path / "killed", chosen, 2)
    resumed = start(tmp_path / "killed", chosen, resume=True).path
    assert (resumed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["phase"] == "train"]
    now = 0.0
    for record in found:
        expected = record["reward/jpeg"] + now * (record["reward/kb"] - 0.9)
        assert record["reward/mean"] == pytest.approx(expected, abs=1e-4)
        now += 0.9 - record["reward/kb"]
        assert record["multiplier/kb"] == pytest.approx(now, abs=1e-5)
    assert now > 0


# Guards


def test_drift_is_the_exact_kl_along_the_chain(folder: Path) -> None:
    model = loaded(job(folder, "sd3", 1))
    with torch.no_grad():
        for name, parameter in model.trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    cond = model.embeddings(PROMPTS)
    expected = path_kl(model.sampler, model.references[0], cond, seed=7)
    everywhere = torch.ones(model.policy.schedule.steps, dtype=torch.bool)
    path = model.sampler.act(cond, generator=torch.Generator().manual_seed(7), trained=everywhere).trajectory
    found = drift(model.sampler, model.references[0], path)
    torch.testing.assert_close(found.kl_nats, expected, rtol=1e-4, atol=1e-4)
    assert found.kl_nats.min() > 0
    norms = [torch.stack([(lambda pair: (pair[1] - pair[0]).flatten(1).norm(dim=1))(
        replace(model.sampler, denoiser=denoiser).predict(path.x[:, k], path.times[k].expand(4), cond))
        for k in range(3)]).mean(0) for denoiser in (model.sampling, model.references[0])]
    torch.testing.assert_close(found.velocity, norms[0].detach())
    torch.testing.assert_close(found.reference_velocity, norms[1].detach())
    still = drift(replace(model.sampler, denoiser=model.references[0]), model.references[0], path)
    assert still.kl_nats.abs().max() == 0
    torch.testing.assert_close(still.velocity, still.reference_velocity)


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    found = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    assert diversity(found, group) == pytest.approx(((5 + 0 + 5) / 3 + 0) / 2)
    assert diversity(found[:1], group[:1]) == 0
    black, white = -torch.ones(1, 3, 40, 64), torch.ones(1, 3, 40, 64)
    pair = features(torch.cat([black, white]), None)
    assert diversity(pair, torch.zeros(2, dtype=torch.long)) == pytest.approx(2, abs=1e-4)


def guarded(folder: Path, **changes: object) -> ImageFinetune:
    return job(folder, "sd3", 4, evaluate_every=1, guard=Guard(**changes))


def test_a_run_stops_when_it_is_too_far_from_the_base_and_stays_stopped(folder: Path, tmp_path: Path) -> None:
    chosen = guarded(folder, stop=Stop(kl_nats=1e-6), held_out={"kb": Jpeg()})
    run = start(tmp_path / "run", chosen)
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["phase"] == "train"]
    assert len(trained) == 2  # the first rollout is the base's own
    assert trained[0]["guard/kl_nats"] == 0
    assert trained[0]["guard/velocity_ratio"] == 1
    assert trained[1]["guard/kl_nats"] > 1e-6
    stopped = json.loads((run.path / "stopped.json").read_text())
    assert stopped["step"] == 2
    assert "above stop.kl_nats=1e-06" in stopped["reason"]
    assert {"reward", "kb"} == result(run, "after")["rewards"].keys()
    assert result(run, "after")["diversity"] > 0
    assert (run.path / "lora").is_dir()
    start(tmp_path / "run", chosen, resume=True)
    again = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["phase"] == "train" for record in again) == 2


def test_what_ends_a_run() -> None:
    before = {"rewards": {"gold": {"mean": 1.0}}, "diversity": 0.5}

    def reason(stop: Stop, gold: float = 1.0, diversity: float = 0.5, ratio: float = 1.0) -> str | None:
        watch = Watch(stop, ["gold"], None)
        watch.evaluation(before)
        watch.iteration({"guard/velocity_ratio": ratio, "guard/kl_nats": 0.0})
        assert watch.reason is None or ratio != 1
        watch.evaluation({"rewards": {"gold": {"mean": gold}}, "diversity": diversity})
        return watch.reason

    assert reason(Stop(held_out_drop=0.2), gold=0.81) is None
    assert "gold fell from 1 to 0.79" in reason(Stop(held_out_drop=0.2), gold=0.79)
    assert reason(Stop(diversity_drop=0.5), diversity=0.26) is None
    assert "diversity fell from 0.5 to 0.24" in reason(Stop(diversity_drop=0.5), diversity=0.24)
    assert reason(Stop(velocity_ratio=1.1), ratio=1.09) is None
    assert "above stop.velocity_ratio=1.1" in reason(Stop(velocity_ratio=1.1), ratio=1.11)
    assert reason(Stop(), gold=-9, diversity=0, ratio=9) is None


def test_the_penalty_follows_its_target(folder: Path, tmp_path: Path) -> None:
    chosen = guarded(folder, kl_target=1e-9)
    records = [json.loads(line) for line in (start(tmp_path / "run", chosen).path / "metrics.jsonl").read_text()
               .splitlines()]
    scales = [record["reference_scale"] for record in records if record["phase"] == "train"]
    assert scales == [2, 4, 8, 16]
    wide = guarded(folder, kl_target=1e9)
    records = [json.loads(line) for line in (start(tmp_path / "wide", wide).path / "metrics.jsonl").read_text()
               .splitlines()]
    assert [record["reference_scale"] for record in records if record["phase"] == "train"] == [0.5, 0.25, 0.125, 0.0625]


def test_guards_are_checked(folder: Path) -> None:
    for wrong, message in (({"images": -1}, "at least 0"), ({"images": 0, "stop": Stop(kl_nats=1.0)}, "got 0"),
                           ({"stop": Stop(held_out_drop=1.0)}, "needs rewards in guard.held_out"),
                           ({"held_out": {"reward": Jpeg()}}, "are taken")):
        with pytest.raises(ValueError, match=message):
            Guard(**wrong)
    with pytest.raises(ValueError, match=r"stop\.kl_nats must be positive or null, got -1"):
        Stop(kl_nats=-1.0)
    with pytest.raises(ValueError, match="needs a penalty to adapt"):
        job(folder, "sd3", 1, algorithm=AWM(), guard=Guard(kl_target=0.1))
    with pytest.raises(ValueError, match="needs a sampler with noise"):
        job(folder, "sd3", 1, algorithm=AWM(), kernel=ODE(), guard=Guard(stop=Stop(kl_nats=1.0)))
    with pytest.raises(ValueError, match="reward_workers must be at least 0"):
        job(folder, "sd3", 1, reward_workers=-1)


def test_images_of_a_prompt_may_share_their_noise(folder: Path) -> None:
    model = loaded(job(folder, "sd3", 1))
    state = TrainState.create({"policy": model.trained}, {"policy": 1e-3}, seed=0)
    plan = solve(prompts=2, images_per_prompt=3, processes=1, batch_rows=8, microbatch_rows=4, rows_per_image=1,
                 epochs=1, minibatches=1)
    source = PipelineSource(model, [Prompt(text) for text in PROMPTS], lambda i, t, m: [0.0] * len(t), plan, state, 0,
                            shared_noise=True)
    path = source.collect(model.policy, generator=torch.Generator()).trajectory
    assert torch.equal(path.x[0, 0], path.x[2, 0])
    assert not torch.equal(path.x[0, 0], path.x[3, 0])
    assert not torch.equal(path.x[0, 1], path.x[2, 1])


# A service that fails in the middle of a run

SERVER = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
how, port, good = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
asked = 0
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        global asked
        asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps({"rewards": [float(len(one)) for one in body["images"]]})
        if asked > good:
            if how == "dies": os._exit(1)
            if how == "hangs": time.sleep(60)
            text = {"garbage": "<html>oops</html>", "nan": '{"rewards": [NaN]}'}.get(how, text)
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *args): pass
server = HTTPServer(("127.0.0.1", port), Handler)
print("ready", flush=True)
server.serve_forever()
"""


@pytest.fixture
def server() -> Iterator[Callable[..., None]]:
    """Starts a real server process: serve(how it fails, port, requests that it answers before)."""
    started: list[subprocess.Popen[str]] = []

    def serve(how: str, port: int, good: int) -> None:
        started.append(subprocess.Popen([sys.executable, "-c", SERVER, how, str(port), str(good)], text=True,
                                        stdout=subprocess.PIPE))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "ready\n"

    yield serve
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("how", "message"), [
    ("dies", "failed 2 times"), ("hangs", "TimeoutError"), ("garbage", "an answer that is not JSON"),
    ("nan", "shape (8,), got (1,)")])
def test_a_run_ends_with_its_last_checkpoint_and_goes_on_later(
        folder: Path, tmp_path: Path, server: Callable[..., None], capsys: pytest.CaptureFixture[str], how: str,
        message: str) -> None:
    port = free_port()
    remote = Remote(url=f"http://127.0.0.1:{port}/", timeout_s=1.0 if how == "hangs" else 30.0, retries=1,
                    backoff_s=0.1)
    chosen = job(folder, "sd3", 2, reward=remote, model=replace(job(folder, "sd3", 1).model, batch_rows=1),
                 guard=Guard(images=0),
                 schedule=Schedule(steps=2), trained=TrainedSteps())
    (tmp_path / "job.yaml").write_text(config.dump(chosen))
    server(how, port, 4)  # the evaluation before, an update of two blocks, and the first block of the next
    command = ["train", str(tmp_path / "job.yaml"), "--run", str(tmp_path / "run")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    if how != "nan":  # wrong numbers are a fault to mend, not one to wait for
        assert "The last checkpoint is kept" in said
    assert newest_checkpoint_of(tmp_path / "run").name == "step_00000001"
    assert not (tmp_path / "run" / "finished.json").exists()
    if how == "dies":
        server("works", port, 0)
        assert main([*command, "--resume"]) == 0
        whole = free_port()
        server("works", whole, 0)
        start(tmp_path / "whole", replace(chosen, reward=replace(remote, url=f"http://127.0.0.1:{whole}/")))
        lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "whole")]
        assert lines[0] == lines[1]
