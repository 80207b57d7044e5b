"""Exported controllers: the same numbers and the same success as the torch policy, or refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_robot_jobs import QUICK, TOY, open_run, wandering_expert
from test_robot_policy import small_policy

import diffalign_controller
from diffalign.algorithms import DSRL, ResidualRL
from diffalign.cli.main import main
from diffalign.diffusion import ODE, FlowSDE, NoisyODE
from diffalign.policy.actors import BoundedActor
from diffalign.policy.compose import compose
from diffalign.policy.improved import ImprovedPolicy
from diffalign.policy.normalize import Normalizer
from diffalign.policy.operators import OnActions, OnNoise
from diffalign.rl.ensembles import QEnsemble
from diffalign.train.off_policy_pieces import Learning
from diffalign.train.run import Run
from diffalign.train.statistics import wilson
from diffalign.train.supervised import Pretraining
from diffalign_controller import policy as runtime
from diffalign_controller import rehearsal
from diffalign_controller.inference import Plan
from diffalign_controller.log import read
from diffalign_controller.loop import Exit
from diffalign_robot import export
from diffalign_robot.choices import ChunkMLP, ChunkTransformer, ChunkUNet, Gymnasium
from diffalign_robot.demos import Demonstrations, collect, join
from diffalign_robot.evaluate import evaluate, evaluation_policy, seeds_for
from diffalign_robot.export import Packing
from diffalign_robot.exported import ExportedPolicy
from diffalign_robot.formats import open_graph, write_graph
from diffalign_robot.graphs import record
from diffalign_robot.jobs import RobotBC, RobotOffPolicy
from diffalign_robot.parity import difference, random_observations
from diffalign_robot.queued import QueuedBase
from diffalign_robot.recordings import episodes as episodes_of
from diffalign_robot.rehearsal import rehearse
from diffalign_robot.runs import add_noise, build_policy, steer
from diffalign_robot.vector import ChunkVectorEnv

TA, DA, DO, K = 2, 2, 2, 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A cloned policy that does half of its task, and its package."""
    root = tmp_path_factory.mktemp("export")
    episodes = list(collect(TOY, wandering_expert, seeds=list(range(30)), action_noise=0.6, noise_seed=0))
    join(episodes).save(root / "demos", {})
    job = RobotBC(base=str(root / "demos"), environment=TOY, network=ChunkMLP(width=32, blocks=1), chunk=TA,
                  denoising_steps=K, num_envs=32, workers=1, evaluation=QUICK,
                  pretraining=Pretraining(steps=300, batch_size=64, learning_rate=3e-3, time="grid", ema_decay=0.95))
    job.train(open_run(root / "bc", job))
    report = export.export_run(Run(root / "bc"), job, root / "package", Packing(archive=True, samples=150, calls=30))
    return root, job, report


@pytest.fixture(scope="module")
def base(runs):
    """The cloned policy; an untrained one would hide differences, for nearly all of its actions are clipped."""
    root, job, _ = runs
    return job.trained_policy(Run(root / "bc"))


def stirred(module, by=0.3):
    """Every parameter moved: last layers that start at zero would hide a part that is not in the graph."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module


def improved(base, operator, *, takes_action=True):
    torch.manual_seed(1)
    normalizer = base.denoiser.observation_normalizer
    actor = BoundedActor((TA, DA), DO, (16,), takes_action=takes_action, normalizer=normalizer)
    critic = QEnsemble(2, (TA, DA), DO, (16,), normalizer=normalizer)
    return ImprovedPolicy(base, operator, stirred(actor), stirred(critic))


def composed(base):
    torch.manual_seed(2)
    normalizers = base.denoiser.observation_normalizer, base.denoiser.action_normalizer
    other = build_policy(ChunkMLP(width=12, blocks=1), TA, DO, DA, K, normalizers=normalizers)
    return compose([base, other], [0.7, 0.3])


def another_network(base, spec, **choices):
    torch.manual_seed(3)
    normalizers = base.denoiser.observation_normalizer, base.denoiser.action_normalizer
    policy = build_policy(spec, TA, DO, DA, K, normalizers=normalizers, **choices)
    stirred(policy.denoiser.net, 0.1)
    return policy


def injecting(base):
    """A flow that learned how much noise its steps add (ReinFlow)."""
    policy = add_noise(another_network(base, ChunkMLP(width=12, blocks=1), prediction="flow"), (16,), seed=0)
    stirred(policy.denoiser.noise)
    return replace(policy, kernel=NoisyODE())


def steered(base):
    policy = steer(base, (16,), seed=0)
    stirred(policy.denoiser.noise)
    return policy


NOISE, STEPS = {"noise": (1, TA, DA)}, {"step_noise": (1, K, TA, DA)}
POLICIES = {
    "stochastic": (lambda base: base, "stochastic", NOISE | STEPS),
    "ode": (lambda base: base, "ode", NOISE),
    "zero_noise": (lambda base: base, "zero_noise", {}),
    "unet": (lambda base: another_network(base, ChunkUNet(widths=(8, 16), groups=4)), "stochastic", NOISE | STEPS),
    "transformer": (lambda base: another_network(base, ChunkTransformer(width=8, blocks=1, heads=2)), "ode", NOISE),
    "flow": (lambda base: replace(another_network(base, ChunkMLP(width=12, blocks=1), prediction="flow"),
                                  kernel=FlowSDE()), "stochastic", NOISE | STEPS),
    "reinflow": (injecting, "stochastic", NOISE),
    "steered": (steered, "ode", NOISE),
    "composed": (composed, "stochastic", NOISE | STEPS),
    "residual": (lambda base: improved(base, OnActions(scale=0.5)), "stochastic", NOISE | STEPS),
    "expo": (lambda base: improved(base, OnActions(samples=3, scale=0.5, keep_base=True)), "ode",
             {"noise": (3, TA, DA)}),
    "rerank": (lambda base: improved(base, OnActions(samples=4, scale=None, keep_base=True)), "stochastic",
               {"noise": (4, TA, DA), "step_noise": (4, K, TA, DA)}),
    "dsrl-sac": (lambda base: improved(base, OnNoise(), takes_action=False), "stochastic", {}),
    "dsrl-na": (lambda base: improved(base, OnNoise(scores="actions", steps=3), takes_action=False), "stochastic", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_the_graph_is_the_policy(name, base, tmp_path) -> None:
    build, sampler, noise = POLICIES[name]
    policy = ExportedPolicy(evaluation_policy(build(base), sampler))
    assert policy.shapes == {"obs": (1, DO), **noise}
    write_graph(policy, tmp_path / "policy.onnx")
    decide = open_graph(tmp_path / "policy.onnx")
    generator = torch.Generator().manual_seed(0)
    obs = random_observations(policy, 200, generator)
    assert difference(policy, decide, obs, generator)["max_abs_difference"] <= 1e-4
    draws = policy.draw(200, generator)
    assert float(policy(obs, **draws).std(0).min()) > 0.01  # it is no constant


def test_a_chain_with_real_time_chunking_is_pulled_towards_the_old_chunk(base, tmp_path) -> None:
    plain = ExportedPolicy(evaluation_policy(base, "ode"))
    policy = ExportedPolicy(plain.policy, chunking=True)
    assert policy.shapes == {"obs": (1, DO), **NOISE, "previous": (1, TA, DA), "weight": (1, TA)}
    write_graph(policy, tmp_path / "policy.onnx")
    generator = torch.Generator().manual_seed(0)
    obs = random_observations(policy, 200, generator)
    decide = open_graph(tmp_path / "policy.onnx")
    assert difference(policy, decide, obs, generator)["max_abs_difference"] <= 1e-4
    drawn = policy.draw(200, generator)
    free = plain(obs, drawn["noise"])
    shapes = {name: list(shape) for name, shape in policy.shapes.items()}
    write_manifest(tmp_path, shapes, [1, TA, DA])
    package, noise = runtime.Policy(tmp_path, seed=4), np.random.default_rng(4).standard_normal((1, TA, DA), np.float32)
    plan = Plan(drawn["previous"][0].numpy(), drawn["weight"][0].numpy())
    for told, wanted in ((None, plain(obs[:1], torch.from_numpy(noise))),
                         (plan, policy(obs[:1], torch.from_numpy(noise), previous=drawn["previous"][:1],
                                       weight=drawn["weight"][:1]))):
        package.reset(4)
        np.testing.assert_allclose(package.decide(obs[0].numpy(), told), wanted[0], atol=1e-4)
    torch.testing.assert_close(policy(obs, **{**drawn, "weight": torch.zeros(200, TA)}), free, atol=1e-5, rtol=0)
    first = torch.tensor([1.0, 0.0]).repeat(200, 1)  # the first action will be executed, the second is free
    held = policy(obs, **{**drawn, "weight": first})
    apart, before = ((chunk - drawn["previous"]).abs().mean((0, 2)) for chunk in (held, free))
    assert apart[0] < 0.4 * before[0]
    assert apart[1] > 0.6 * before[1]


def write_manifest(folder, inputs, output) -> None:
    """Beside a graph that was written without a run."""
    content = {"format": runtime.FORMAT, "inputs": [{"name": name, "shape": shape} for name, shape in inputs.items()],
               "outputs": [{"name": "chunk", "shape": output}], "action": {"low": [None] * DA, "high": [None] * DA},
               "sha256": {"policy.onnx": hashlib.sha256((folder / "policy.onnx").read_bytes()).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps(content))


def test_given_noise_is_the_chain_that_act_draws(base) -> None:
    """The same numbers as `act` when the noise is what its generator would have drawn."""
    unnormalize = base.denoiser.action_normalizer.unnormalize
    for policy in (evaluation_policy(base, "stochastic"), evaluation_policy(steered(base), "ode")):
        obs = torch.randn(3, DO)
        wanted = policy.act({"obs": obs}, generator=torch.Generator().manual_seed(7)).action
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(3, TA, DA, generator=generator)
        steps = torch.zeros(3, K, TA, DA)
        for k in range(K - 1):  # the last step has no noise
            steps[:, k] = torch.randn(3, TA, DA, generator=generator)
        stochastic = policy.kernel.stochastic
        found = ExportedPolicy(policy)(obs, noise, steps if stochastic else None)
        torch.testing.assert_close(found, unnormalize(wanted), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"step_noise must be \(3, 4, 2, 2\)"):
        policy.act({"obs": obs}, generator=generator, step_noise=steps[:2])


def test_what_no_graph_can_hold_is_refused_by_name(tmp_path) -> None:
    queued = replace(improved(small_policy(), OnActions(scale=0.5)), base=QueuedBase(small_policy()))
    with pytest.raises(ValueError, match=r"a policy on a QueuedBase cannot be exported.*per_step: false"):
        ExportedPolicy(queued)
    with pytest.raises(ValueError, match="only mode exploit"):
        ExportedPolicy(improved(small_policy(), OnActions(scale=0.5)).with_mode("explore"))
    with pytest.raises(ValueError, match="branches on the values of its inputs"):  # how much noise, it learned
        write_graph(ExportedPolicy(injecting(small_policy())), tmp_path / "policy.onnx")
    with pytest.raises(ValueError, match=r"real-time chunking is of a chain alone.*export the base run"):
        ExportedPolicy(improved(small_policy(), OnActions(scale=0.5)), chunking=True)
    with pytest.raises(ValueError, match="inpainting needs a deterministic sampler, got DDPM"):
        ExportedPolicy(small_policy(), chunking=True)
    with pytest.raises(ValueError, match="a steered policy chooses its chunk by the start"):
        ExportedPolicy(evaluation_policy(steered(small_policy()), "ode"), chunking=True)
    examples = {"x": torch.ones(2)}
    with pytest.raises(ValueError, match="draws random numbers inside"):
        record(lambda x: x + torch.randn(2), examples)
    with pytest.raises(ValueError, match="branches on the values of its inputs"):
        record(lambda x: x if bool(x.sum() > 0) else -x, examples)
    with pytest.raises(ValueError, match="in place"):
        record(lambda x: (x + 1).mul_(2), examples)


def test_what_depends_on_no_input_is_no_operation_of_the_graph() -> None:
    weight = torch.arange(4.0).reshape(2, 2)

    def function(x):
        scale = torch.linspace(0, 1, 3).exp()
        for k in range(3):
            x = x @ weight.t() * (scale[k] if bool(scale[k] > 0) else 0)
        return x

    module = record(function, {"x": torch.ones(1, 2)})
    calls = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert len(calls) == 6
    assert sum(tuple(buffer.shape) == (2, 2) for buffer in module.buffers()) == 1  # shared by the three steps
    x = torch.randn(1, 2)
    torch.testing.assert_close(module(x), function(x))


# --- whole packages -------------------------------------------------------------------------------------------------


def test_a_package_is_complete_and_says_what_it_is(runs) -> None:
    root, _, report = runs
    folder = root / "package"
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "policy.onnx", "policy.pt2",
                                                               "report.json"]
    assert json.loads((folder / "report.json").read_text()) == report
    demonstrations = Demonstrations.load(root / "demos")
    assert report["parity"]["recorded"]["observations"] == min(150, len(demonstrations.obs))
    assert report["parity"]["random"]["observations"] == 150
    for parity in (report["parity"], report["archive_parity"]):
        assert parity["tolerance"] == 1e-4
        for name in ("random", "recorded"):
            assert 0 <= parity[name]["mean_abs_difference"] <= parity[name]["max_abs_difference"] <= 1e-4
    assert report["archive_parity"]["random"]["observations"] == 100
    assert report["graph"]["bytes"] == (folder / "policy.onnx").stat().st_size
    assert report["graph"]["load_ms"] > 0
    assert report["latency"]["onnxruntime"]["p50_ms"] < report["latency"]["torch"]["p50_ms"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == export.FORMAT == runtime.FORMAT
    assert manifest["precision"] == report["precision"] == "fp32"
    assert set(manifest["sha256"]) == {"policy.onnx", "policy.pt2"}
    assert [entry["shape"] for entry in manifest["inputs"]] == [[1, DO], [1, TA, DA], [1, K, TA, DA]]
    assert manifest["outputs"][0]["shape"] == [1, TA, DA]
    assert manifest["action"] == {"low": [-1.0, -1.0], "high": [1.0, 1.0]}
    assert manifest["sampler"] == "ddpm (4 steps, stochastic)"
    assert manifest["control_rate_hz"] is None
    assert manifest["provenance"]["run"] == "bc"
    assert manifest["provenance"]["checkpoint"] == "step_00000300"
    fitted = Normalizer.fit(demonstrations.obs)
    np.testing.assert_allclose(manifest["normalizers"]["observation"]["scale"], fitted.scale, rtol=1e-5)
    assert str(root) not in (folder / "manifest.json").read_text()


def test_the_controller_succeeds_as_often_as_the_torch_policy(runs, base) -> None:
    root, _, _ = runs
    episodes, wins = 1000, 0
    policy = runtime.Policy(root / "package", seed=3)
    env = ChunkVectorEnv(TOY, 1)
    for seed in seeds_for(11, episodes):
        obs, over, won = env.reset([seed]), False, False
        while not over:
            step = env.step(policy.decide(obs[0])[None])
            obs, won = step.obs, won or bool(step.success[0])
            over = bool(step.terminated[0] or step.truncated[0])
        wins += won
    wide = ChunkVectorEnv(TOY, 32)
    torch_policy = evaluate(base, wide, seed=11, episodes=episodes, sampler="stochastic")
    low, high = torch_policy["interval"]
    assert 0.15 < torch_policy["success_rate"] < 0.95  # there is room on both sides
    assert low <= wins / episodes <= high
    own_low, own_high = wilson(wins, episodes)
    assert own_low <= torch_policy["success_rate"] <= own_high


def test_the_same_seed_gives_the_same_chunks(runs) -> None:
    policy = runtime.Policy(runs[0] / "package", seed=1)
    obs = np.array([0.5, -0.5], np.float32)
    first, second = policy.decide(obs), policy.decide(obs)
    assert first.shape == (policy.chunk, policy.action_dim) == (TA, DA)
    assert not np.array_equal(first, second)
    policy.reset(1)
    np.testing.assert_array_equal(policy.decide(obs), first)
    policy.reset(2)
    assert not np.array_equal(policy.decide(obs), first)
    with pytest.raises(ValueError, match=r"reads observations of shape \(2,\), got \(3,\)"):
        policy.decide(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="without real-time chunking and cannot be told a plan"):
        policy.decide(obs, Plan(first, np.ones(TA, np.float32)))
    with pytest.raises(ValueError, match="feature 1 of the observation is not finite"):
        policy.decide(np.array([0, np.nan], np.float32))


def test_a_damaged_package_is_refused(runs, tmp_path) -> None:
    def package(name):
        return Path(shutil.copytree(runs[0] / "package", tmp_path / name))

    changed = package("changed")
    content = bytearray((changed / "policy.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (changed / "policy.onnx").write_bytes(content)
    with pytest.raises(ValueError, match="is not what was exported"):
        runtime.Policy(changed)
    newer = package("newer")
    (newer / "manifest.json").write_text((newer / "manifest.json").read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="has format 2, this runtime reads 1"):
        runtime.Policy(newer)
    part = package("part")
    (part / "policy.onnx").unlink()
    with pytest.raises(ValueError, match=r"has no policy\.onnx"):
        runtime.Policy(part)
    cut = package("cut")
    (cut / "manifest.json").write_text((cut / "manifest.json").read_text()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        runtime.Policy(cut)
    with pytest.raises(ValueError, match="is no controller package"):
        runtime.Policy(tmp_path)


def test_the_runtime_runs_without_torch(runs) -> None:
    code = """import sys
for name in ("torch", "diffalign", "diffalign_robot", "yaml", "pydantic"):
    sys.modules[name] = None  # importing it raises
from pathlib import Path
import numpy as np
from diffalign_controller import chunks, inference, log, loop, policy, rehearsal, robot, safety, timing, watchdog
print(policy.Policy(Path(sys.argv[1])).decide(np.zeros(2, np.float32)).shape)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(diffalign_controller.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(runs[0] / "package")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=runs[0])
    assert done.stdout.strip() == "(2, 2)", done.stderr


def test_a_rehearsal_measures_the_real_loop_at_two_rates(runs) -> None:
    script = Path(__file__).parents[1] / "scripts/controller_timing.py"
    env = {**os.environ, "PYTHONPATH": str(Path(diffalign_controller.__file__).parents[1])}
    command = [sys.executable, str(script), str(runs[0] / "package"), "--seconds", "0.5", "--scheme", "blend"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    slow, fast = json.loads(done.stdout)
    assert [slow["command_hz"], fast["command_hz"]] == [50, 200]
    assert fast["ticks"] + fast["left_out"] >= 100 > slow["ticks"]
    for run in (slow, fast):
        assert set(run["milliseconds"]) == {"decision", "delay", "tick", "wake", "period"}
        assert 0 < run["milliseconds"]["decision"]["p50"] <= run["milliseconds"]["decision"]["p99"]
    refused = subprocess.run([*command[:2], str(runs[0])], capture_output=True, text=True, env=env)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "is no controller package" in refused.stderr
    with pytest.raises(ValueError, match=r"names no control rate; say it with --rate-hz"):
        rehearsal.rehearse(runs[0] / "package", seconds=0.1)
    found = rehearsal.rehearse(runs[0] / "package", rate_hz=50, seconds=0.2, scheme="ensemble", in_line=True)
    assert found["decisions"] > 2
    assert "   50 Hz  decision" in rehearsal.table([found])


@pytest.mark.slow
def test_the_runtime_installs_and_runs_where_there_is_no_torch(runs, tmp_path) -> None:
    """A new environment with nothing but the controller and what it asks for; needs a package index."""
    root = Path(__file__).parents[1]
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert uv is not None, "install uv"
    sources = tmp_path / "controller"
    shutil.copytree(root / "robot/controller", sources, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    python = tmp_path / "venv/bin/python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), str(sources)], check=True)
    code = """import importlib.util, sys
from pathlib import Path
from diffalign_controller.rehearsal import rehearse
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("diffalign") is None
found = rehearse(Path(sys.argv[1]), rate_hz=50, servo_hz=200, seconds=1)
print(found["exit"], found["decisions"] > 5)
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(python), "-c", code, str(runs[0] / "package")], capture_output=True, text=True, env=env,
                          cwd=tmp_path)
    assert done.stdout.strip() == "0 True", done.stderr


def test_the_documented_controller_runs(runs, tmp_path, monkeypatch) -> None:
    document = (Path(__file__).parents[1] / "docs/deploy.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    short = block.replace("seconds=2.0", "seconds=0.5")
    assert short != block
    shutil.copytree(runs[0] / "package", tmp_path / "controllers/point")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        exec(compile(short, "docs/deploy.md", "exec"), {"__name__": "document"})
    assert end.value.code == Exit.DONE
    assert len(list(read(tmp_path / "log"))) > 20
    for code in Exit:
        assert f"\n| {code.value} |" in document or code is Exit.DONE


def test_a_graph_that_is_not_the_policy_leaves_nothing_behind(runs, tmp_path, monkeypatch) -> None:
    root, job, _ = runs
    other = small_policy()

    def another(policy, file, precision):
        write_graph(ExportedPolicy(evaluation_policy(other, "stochastic")), file, precision)

    monkeypatch.setattr(export, "write_graph", another)
    with pytest.raises(ValueError, match=r"differs from the torch policy by .* at most 0.0001 is allowed"):
        export.export_run(Run(root / "bc"), job, tmp_path / "deep/package", Packing(samples=5, calls=2))
    assert list((tmp_path / "deep").iterdir()) == []


def test_the_command_writes_a_package_or_one_paragraph(runs, tmp_path, capsys, monkeypatch) -> None:
    root, _, _ = runs
    assert main(["export", str(root / "bc"), "--to", str(root / "package")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["export", str(root / "demos"), "--to", str(tmp_path / "x")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(root / "bc"), "--to", str(tmp_path / "x")]) == 2
    assert "extra [export]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert main(["export", str(root / "bc"), "--to", str(tmp_path / "empty"), "--sampler", "ode", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parity"]["recorded"]["max_abs_difference"] <= 1e-4
    assert "ode (4 steps, ode)" in (tmp_path / "empty/manifest.json").read_text()
    assert not (tmp_path / "empty/policy.pt2").exists()


@pytest.mark.parametrize(("precision", "worst"), [("fp16", 0.01), ("int8", 0.5)])
def test_a_lower_precision_is_smaller_and_says_how_far_it_is(precision, worst, runs, tmp_path, capsys) -> None:
    root, _, full = runs
    command = ["export", str(root / "bc"), "--to", str(tmp_path / "package"), "--precision", precision, "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == json.loads((tmp_path / "package/manifest.json").read_text())["precision"] == precision
    assert report["parity"]["tolerance"] is None
    for name in ("random", "recorded"):
        assert 1e-4 < report["parity"][name]["max_abs_difference"] < worst  # in units of a box of width 2
        assert report["parity"][name]["mean_abs_difference"] < worst / 10
    assert report["graph"]["bytes"] < full["graph"]["bytes"]
    graph = onnx.load(tmp_path / "package/policy.onnx").graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read  # the weights that were replaced are gone
    chunk = runtime.Policy(tmp_path / "package", seed=1).decide(np.zeros(DO, np.float32))
    np.testing.assert_allclose(chunk, runtime.Policy(root / "package", seed=1).decide(np.zeros(DO, np.float32)),
                               atol=worst)
    command[command.index("--to") + 1] = str(tmp_path / "strict")
    assert main([*command, "--tolerance", "1e-4"]) == 2
    assert "differs from the torch policy by" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["package"]


def test_a_packing_that_makes_no_sense_is_refused(runs, tmp_path, capsys) -> None:
    root, _, _ = runs
    command = ["export", str(root / "bc"), "--to", str(tmp_path / "x"), "--tolerance"]
    assert main([*command, "0.1"]) == 2
    assert "fp32 is always held to 0.0001, got a tolerance of 0.1" in capsys.readouterr().err
    assert main([*command, "-1", "--precision", "int8"]) == 2
    assert "a tolerance must be above 0, got -1" in capsys.readouterr().err
    policy = ExportedPolicy(evaluation_policy(small_policy(), "ode"))
    with pytest.raises(ValueError, match="decides NaN or infinity"):
        difference(policy, lambda inputs: np.full((1, TA, DA), np.nan, np.float32), torch.zeros(3, DO),
                   torch.Generator())


def test_the_archive_needs_torch_alone(runs, base, tmp_path) -> None:
    """Loaded in a fresh process without this project, it decides what the policy decides."""
    policy = ExportedPolicy(evaluation_policy(base, "stochastic"))
    generator = torch.Generator().manual_seed(0)
    obs, noise = torch.randn(20, DO, generator=generator), policy.draw(20, generator)
    torch.save([obs, *noise.values()], tmp_path / "inputs.pt")
    code = """import sys
for name in ("diffalign", "diffalign_robot", "onnx", "onnxruntime"):
    sys.modules[name] = None  # importing it raises
import torch
policy = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2])
torch.save(torch.cat([policy(*(values[i : i + 1] for values in inputs)) for i in range(20)]), sys.argv[3])
"""
    files = [str(runs[0] / "package/policy.pt2"), str(tmp_path / "inputs.pt"), str(tmp_path / "chunks.pt")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(files[2]), policy(obs, **noise), atol=1e-5, rtol=0)


def test_a_controller_is_played_beside_its_run(runs, tmp_path, capsys, monkeypatch) -> None:
    root, _, _ = runs
    command = ["evaluate", str(root / "bc"), "--controller", str(root / "package"), "--episodes", "40", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["max_abs_difference"] <= 1e-4
    assert result["same_outcome"] == result["episodes"] == 40
    assert result["success_rate"] == result["torch"]["success_rate"]
    assert result["interval"] == result["torch"]["interval"]
    assert result["sampler"] == result["torch"]["sampler"] == "ddpm (4 steps, stochastic)"
    assert 0.15 < result["success_rate"] < 0.95
    assert main([*command, "--sampler", "ode"]) == 2
    assert "the controller has sampler ddpm (4 steps, stochastic), the run ode" in capsys.readouterr().err
    shutil.copytree(root / "bc", tmp_path / "bc")
    (tmp_path / "bc/checkpoints/step_00000300").rename(tmp_path / "bc/checkpoints/step_00000301")
    assert main(["evaluate", str(tmp_path / "bc"), *command[2:]]) == 2
    assert "the controller has checkpoint step_00000300, the run step_00000301" in capsys.readouterr().err
    (tmp_path / "image").mkdir()
    shutil.copy(Path(__file__).parents[1] / "configs/image/shapes_pretrain.yaml", tmp_path / "image/config.yaml")
    for image in (["evaluate", str(tmp_path / "image"), *command[2:]],
                  ["export", str(tmp_path / "image"), "--to", str(tmp_path / "x")]):
        assert main(image) == 2
        assert "image is no robot run; a controller is of a run with a robot policy" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "diffalign_controller.policy", None)
    assert main(command) == 2
    assert "pip install ./robot/controller" in capsys.readouterr().err


def test_a_dict_observation_is_exported_as_its_keys_in_order(tmp_path, capsys, monkeypatch) -> None:
    goal = Gymnasium(id="toy_env:ToyGoalPoint-v0", horizon=10, keys=("desired_goal", "achieved_goal"))
    episodes = list(collect(goal, lambda: lambda obs: 0.1 * (1 - obs[3:]), seeds=[0, 1, 2], action_noise=0.3,
                            noise_seed=0))
    join(episodes).save(tmp_path / "demos", {})
    job = RobotBC(base=str(tmp_path / "demos"), environment=goal, network=ChunkMLP(width=8, blocks=1), chunk=TA,
                  denoising_steps=2, num_envs=2, workers=1, evaluation=replace(QUICK, episodes=2),
                  pretraining=Pretraining(steps=5, batch_size=8))
    job.train(open_run(tmp_path / "bc", job))
    report = export.export_run(Run(tmp_path / "bc"), job, tmp_path / "package", Packing(samples=20, calls=2))
    assert report["parity"]["recorded"]["observations"] == 20
    manifest = json.loads((tmp_path / "package/manifest.json").read_text())
    assert manifest["inputs"][0]["shape"] == [1, 5]
    assert manifest["environment"]["keys"] == ["desired_goal", "achieved_goal"]
    chunking = ["--real-time-chunking", "--sampler", "ode"]
    assert main(["export", str(tmp_path / "bc"), "--to", str(tmp_path / "chunking"), *chunking]) == 0
    monkeypatch.chdir(tmp_path)
    deployed = ["chunking", "--robot", "twin", "--rate", "5", "--max-age", "2", "--max-inference", "2"]
    rtc = ["--scheme", "rtc", "--execute", "1", "--servo-hz", "20", "--seconds", "1"]
    assert main(["deploy", *deployed, *rtc]) == 0
    assert main(["deploy", *deployed, "--servo-hz", "20", "--between", "spread"]) == 2
    assert "spread would move it 0.25 times as far" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds commands between the actions of a policy of 5 Hz"):
        list(episodes_of(read(Path("logs/chunking"))))
    again = rehearse(Run(tmp_path / "bc"), job, tmp_path / "chunking", seed=0, episodes=3, sampler="ode")
    assert again["same_outcome"] == 3
    inputs = json.loads((tmp_path / "chunking/manifest.json").read_text())["inputs"]
    assert [entry["name"] for entry in inputs] == ["obs", "noise", "previous", "weight"]
    assert "1 (will be executed) to 0 (free)" in inputs[-1]["meaning"]
    played = rehearse(Run(tmp_path / "bc"), job, tmp_path / "package", seed=0, episodes=3, sampler=None)
    assert played["same_outcome"] == 3


def test_demonstrations_are_found_through_a_chain_of_runs(runs, tmp_path) -> None:
    root, _, _ = runs
    fast = Learning(batch_size=8, heads=2)
    job = RobotOffPolicy(base=str(root / "bc"), environment=TOY, algorithm=ResidualRL(learning=fast))
    assert export.demonstrations_of(open_run(tmp_path / "a", job).path) == root / "demos"
    other = replace(job, demonstrations=(str(root / "demos"),))
    assert export.demonstrations_of(open_run(tmp_path / "b", other).path) == root / "demos"
    gone = replace(job, algorithm=DSRL(learning=fast), base=str(tmp_path / "none"))
    assert export.demonstrations_of(open_run(tmp_path / "c", gone).path) is None


def test_a_deterministic_chain_takes_no_step_noise() -> None:
    policy = ExportedPolicy(small_policy().with_sampler(ODE()))
    assert set(policy.shapes) == {"obs", "noise"}
    obs, noise = torch.randn(1, DO), torch.randn(1, TA, DA)
    assert torch.equal(policy(obs, noise), policy(obs, noise))
