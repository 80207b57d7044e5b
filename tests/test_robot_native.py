"""Policies of other programs: their samplers, and LeRobot's own actions before, while and after ours train it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from toys import MLPDenoiser

from diffalign import config
from diffalign.algorithms import DPPO
from diffalign.cli.main import main
from diffalign.diffusion import DDIM, DDPM, ODE, Schedule, TrainedSteps, VPPath
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign_robot.choices import ChunkMLP, Gymnasium
from diffalign_robot.cloning import normalized_windows
from diffalign_robot.demos import join
from diffalign_robot.evaluation import Evaluation
from diffalign_robot.exported import ExportedPolicy
from diffalign_robot.importing import RobotImport
from diffalign_robot.jobs import RobotAlign
from diffalign_robot.native import saving
from diffalign_robot.runs import build_policy, load_policy, steer

SLOW = Gymnasium(id="toy_env:ToySlowPoint-v0")


@pytest.mark.parametrize(("steps", "table"), [(10, 100), (100, 100), (7, 20), (1, 5)])
def test_leading_times_are_those_of_diffusers(steps, table):
    theirs = DDPMScheduler(num_train_timesteps=table)
    theirs.set_timesteps(steps)
    times = Schedule(steps=steps, leading=table).times()
    assert (VPPath(train_steps=table).index(times[:-1]) - 1).tolist() == theirs.timesteps.tolist()
    assert times[-1] == 0


@pytest.mark.parametrize("options", [{"leading": 3}, {"leading": 8, "shift": 2.0}, {"leading": 8, "grid": 8},
                                     {"leading": 8, "terminal": 0.1}])
def test_leading_times_come_alone_and_fit_their_table(options):
    with pytest.raises(ValueError, match="leading must be at least the 4 steps and comes without"):
        Schedule(steps=4, **options)


@pytest.mark.parametrize("prediction", ["eps", "x0"])
@pytest.mark.parametrize(("kernel", "scheduler"), [(DDPM(), DDPMScheduler), (ODE(), DDIMScheduler)])
def test_clipped_chains_equal_diffusers(kernel, scheduler, prediction, generator):
    torch.manual_seed(0)
    net = MLPDenoiser(prediction=prediction)
    for parameter in net.parameters():
        parameter.data *= 3  # far beyond the limits, so that the clamp matters
    policy = DiffusionPolicy(net, VPPath(train_steps=100), kernel, Schedule(steps=10, leading=100), (2,), clip_x0=1.0,
                             clipped_eps=False)
    noise, seen = torch.randn(50, 2, generator=generator), {"obs": torch.zeros(50, 1)}
    steps = torch.randn(50, 10, 2, generator=generator)
    theirs = scheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True,
                       prediction_type="epsilon" if prediction == "eps" else "sample")
    theirs.set_timesteps(10)
    x, draws = noise, iter(steps.unbind(1))
    with torch.no_grad():
        for t in theirs.timesteps:
            output = net(x, torch.full((50,), (int(t) + 1) / 100), seen)
            if scheduler is DDIMScheduler:
                x = theirs.step(output, t, x).prev_sample
            else:  # its mean, and the noise that is ours to give
                mean = theirs.step(output, t, x, generator=torch.Generator().manual_seed(int(t))).prev_sample
                drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(t)))
                std = theirs._get_variance(t) ** 0.5 if t > 0 else 0.0
                x = mean + std * (next(draws) - drawn) if t > 0 else mean
    ours = policy.act(seen, generator=generator, noise=noise, step_noise=steps).action
    assert x.abs().max() > 0.5
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)
    if scheduler is DDIMScheduler and prediction == "eps":  # what DPPO does is something else
        other = replace(policy, clipped_eps=True).act(seen, generator=generator, noise=noise).action
        assert (other - x).abs().max() > 1e-3


def test_a_part_of_what_is_denoised_is_the_action(generator):
    policy = replace(build_policy(ChunkMLP(width=16, blocks=1), 6, 3, 2, 4), executed=(1, 4))
    decision = policy.act({"obs": torch.zeros(5, 3)}, generator=generator)
    assert decision.action.shape == (5, 3, 2)
    assert torch.equal(decision.action, decision.trajectory.sample[:, 1:4])
    for executed in ((0, 7), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match=r"executed entries .* do not lie in an event of 6"):
            replace(policy, executed=executed)
    with pytest.raises(ValueError, match="executes a part of what it denoises"):
        ExportedPolicy(policy)


def test_its_windows_begin_before_the_observation():
    steps = np.arange(6, dtype=np.float32)[:, None]
    data = join([(steps, 10 + steps, True), (100 + steps[:3], 200 + steps[:3], True)])
    obs, action = data.windows(4, 1)
    assert obs[:, 0].tolist() == [1, 2, 3]  # the short episode has no window
    assert action[:, :, 0].tolist() == [[10, 11, 12, 13], [11, 12, 13, 14], [12, 13, 14, 15]]
    policy = build_policy(ChunkMLP(width=16, blocks=1), 4, 2, 1, 4, history=2)
    seen, chunks = normalized_windows(replace(policy, executed=(1, 3)), data)
    assert seen["obs"].tolist() == [[0, 1], [1, 2], [2, 3]]
    assert torch.equal(chunks, action)


@pytest.mark.parametrize("source", ["lerobot", "lerobot:", "other:x", "x"])
def test_a_source_names_format_and_path(source):
    with pytest.raises(ValueError, match="source must be FORMAT:PATH with FORMAT one of lerobot"):
        RobotImport(source=source, environment=SLOW)


def test_a_run_that_was_not_imported_has_no_other_format(tmp_path):
    (tmp_path / "config.yaml").write_text("type: robot_bc\nbase: runs/nowhere\n")
    with pytest.raises(ValueError, match="does not go back to a robot_import run"):
        saving.origin(tmp_path)


# Below, lerobot itself is asked. Its import takes 20 s.

@pytest.fixture(scope="module")
def lerobot():
    pytest.importorskip("lerobot")
    from diffalign_robot.native import lerobot as module
    return module


STATISTICS = {"observation.state": {"min": [-1.0, 0.6, 5.0], "max": [3.0, 0.60003, 5.0], "mean": [0.5, 0.60002, 5.0],
                                    "std": [1.5, 1e-5, 0.0]},
              "observation.environment_state": {"min": [-1.0, 0.0], "max": [2.0, 8.0], "mean": [0.1, 3.0],
                                                "std": [1.0, 2.0]},
              "action": {"min": [-2.0, 0.0], "max": [1.0, 0.5], "mean": [-0.3, 0.2], "std": [0.7, 0.1]}}


def saved(folder, *, modes="MIN_MAX", world=2, state=3, **options):
    """A folder as lerobot's own save_pretrained leaves it."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as LeRobotPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    options = {"n_obs_steps": 2, "horizon": 8, "n_action_steps": 3, "num_inference_steps": 5, **options}
    mode = NormalizationMode[modes]
    said = DiffusionConfig(
        down_dims=(16, 32), n_groups=4, diffusion_step_embed_dim=16, device="cpu",
        normalization_mapping=dict.fromkeys(("STATE", "ACTION") if world == 2 else ("STATE", "ENV", "ACTION"), mode),
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (state,)),
                        "observation.environment_state": PolicyFeature(FeatureType.ENV, (world,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))}, **options)
    stats = {key: {name: torch.tensor(value[:world] if key.endswith("environment_state") else
                                      value[:state] if key.endswith("state") else value)
                   for name, value in each.items()} for key, each in STATISTICS.items()}
    for part in (LeRobotPolicy(said), *make_pre_post_processors(said, dataset_stats=stats)):
        part.save_pretrained(folder)
    return folder


def observations(rows, history=2, constant=True):
    obs = torch.randn(rows, history, 5)
    obs[:, :, 1] = 0.6 + 3e-5 * torch.rand(rows, history)  # a narrow range far from 0
    if constant:
        obs[:, :, 2] = 5.0
    return obs.flatten(1)


@pytest.mark.parametrize("options", [
    {}, {"noise_scheduler_type": "DDIM"}, {"noise_scheduler_type": "DDIM", "prediction_type": "sample"},
    {"modes": "MEAN_STD"}, {"beta_schedule": "linear", "clip_sample": False, "num_train_timesteps": 20},
    {"n_obs_steps": 3, "n_action_steps": 6, "num_inference_steps": None, "num_train_timesteps": 12},
    {"clip_sample_range": 0.3, "use_film_scale_modulation": False}],
    ids=["ddpm", "ddim", "x0", "gaussian", "unclipped", "all_steps", "narrow"])
def test_actions_equal_those_of_lerobot(lerobot, tmp_path, options):
    folder = saved(tmp_path / "policy", **options)
    policy = lerobot.read(folder)
    history = options.get("n_obs_steps", 2)
    assert policy.executed == (history - 1, history - 1 + options.get("n_action_steps", 3))
    assert lerobot.difference(policy, folder, observations(200, history)) < 1e-5
    moved = replace(policy, executed=(0, policy.executed[1] - policy.executed[0]))
    assert lerobot.difference(moved, folder, observations(20, history)) > 1e-2  # the comparison can tell


def test_the_environments_state_is_normalized_where_the_policy_says_so(lerobot, tmp_path):
    folder = saved(tmp_path / "policy", world=1)
    policy = lerobot.read(folder)
    assert policy.denoiser.observation_normalizer.scale[3] == 1.5
    assert lerobot.difference(policy, folder, observations(50).unflatten(1, (2, 5))[:, :, :4].flatten(1)) < 1e-5
    assert lerobot.read(saved(tmp_path / "other")).denoiser.observation_normalizer.scale[3] == 1  # by default: not


def test_a_constant_feature_is_mended_here_and_in_what_is_written(lerobot, tmp_path):
    folder = saved(tmp_path / "policy")
    policy, obs = lerobot.read(folder), observations(50, constant=False)
    assert lerobot.difference(policy, folder, obs) > 1e-2  # lerobot divides its changes by 1e-8
    lerobot.write(policy, folder, tmp_path / "again")
    assert lerobot.difference(policy, tmp_path / "again", obs) < 1e-5
    assert lerobot.difference(policy, tmp_path / "again", observations(50)) < 1e-5


def test_more_or_fewer_steps_and_another_sampler_are_written_back(lerobot, tmp_path):
    policy = lerobot.read(saved(tmp_path / "policy"), 4).with_sampler(ODE())
    lerobot.write(policy, tmp_path / "policy", tmp_path / "ode")
    said = json.loads((tmp_path / "ode" / "config.json").read_text())
    assert (said["noise_scheduler_type"], said["num_inference_steps"]) == ("DDIM", 4)
    assert lerobot.difference(policy, tmp_path / "ode", observations(50)) < 1e-5
    for wrong, said in ((policy.with_sampler(ODE(), zero_noise=True), "from zero noise"),
                        (policy.with_sampler(DDIM(eta=0.5)), "with DDIM")):
        with pytest.raises(ValueError, match=f"this policy {said}.*export with --sampler ode"):
            lerobot.write(wrong, tmp_path / "policy", tmp_path / "wrong")


@pytest.mark.parametrize(("changed", "said"), [
    ({"type": "act"}, "of type 'act'; only diffusion"), ({"compile_model": True}, "compile_model set"),
    ({"input_features": {"observation.images.top": {"type": "VISUAL", "shape": [3, 8, 8]}}}, "only policies on states"),
    ({"beta_schedule": "sigmoid"}, "has the beta_schedule 'sigmoid'")])
def test_other_policies_of_lerobot_are_refused(lerobot, tmp_path, changed, said):
    folder = saved(tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ValueError, match=said):
        lerobot.read(folder)


def test_a_policy_of_a_newer_lerobot_is_refused(lerobot, tmp_path):
    file = saved(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": True}))
    with pytest.raises(ValueError, match=r"is not one of LeRobot \d.*of_tomorrow.*the version that wrote it"):
        lerobot.read(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "policy_preprocessor.json"])
def test_a_folder_without_a_part_of_the_policy_is_refused(lerobot, tmp_path, name):
    folder = saved(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}; a folder written by lerobot's save_pretrained"):
        lerobot.read(folder)


def test_weights_that_are_missing_are_not_made_up(lerobot, tmp_path):
    from safetensors.torch import load_file, save_file

    file = saved(tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights.pop("diffusion.unet.final_conv.1.weight")
    save_file(weights, file)
    with pytest.raises(RuntimeError, match="final_conv"):
        lerobot.read(tmp_path)


def test_unknown_processing_is_refused(lerobot, tmp_path):
    file = saved(tmp_path) / "policy_preprocessor.json"
    said = json.loads(file.read_text())
    said["steps"].append({"registry_name": "observation_processor", "config": {}})
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="are not known here"):
        lerobot.read(tmp_path)


FRESH = """
import json, sys
import numpy as np, torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
folder, file = sys.argv[1:]
policy = DiffusionPolicy.from_pretrained(folder, local_files_only=True)
before, after = make_pre_post_processors(policy.config, pretrained_path=folder)
given = np.load(file)
noise, actions = torch.from_numpy(given["noise"]), []
assert not [name for name in sys.modules if name.startswith("diffalign")]
for step, obs in enumerate(torch.from_numpy(given["obs"])):
    seen = {"observation.state": obs[:, :1], "observation.environment_state": obs[:, 1:]}
    actions.append(after(policy.select_action(before(seen), noise=noise[step])).numpy())
np.save(file.replace(".npz", ".npy"), np.stack(actions))
"""


def test_a_policy_is_imported_improved_exported_and_reloaded_by_lerobot_alone(lerobot, tmp_path, capsys):
    folder = saved(tmp_path / "policy", state=1, world=1, n_action_steps=2)
    evaluation = Evaluation(episodes=8, sampler="ode", videos=0, every=5)
    imported = RobotImport(source=f"lerobot:{folder}", environment=SLOW, evaluation=evaluation, num_envs=4, workers=1)
    base = Run.create(tmp_path / "base", config.dump(imported), resume=False)
    imported.train(base)
    shutil.rmtree(folder)  # the run is complete without it
    before = load_policy(base.path)
    job = RobotAlign(base=str(base.path), environment=SLOW, iterations=1, num_envs=32, workers=1, evaluation=evaluation,
                     algorithm=DPPO(optimization=Optimization(epochs=1, minibatches=2, learning_rate=1e-3)))
    job = replace(job, exploration=replace(job.exploration, trained=TrainedSteps(start=-2)))
    run = Run.create(tmp_path / "run", config.dump(job), resume=False)
    job.train(run)
    out = tmp_path / "written"
    assert main(["export", str(run.path), "--to", f"lerobot:{out}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_difference"] < 1e-5
    policy = load_policy(run.path).with_sampler(ODE())
    obs, noise = torch.randn(4, 3, 2), torch.randn(4, 3, 8, 2)  # 4 control steps of 3 robots: two chunks of 2
    np.savez(tmp_path / "given.npz", obs=obs.numpy(), noise=noise.numpy())
    subprocess.run([sys.executable, "-c", FRESH, str(out), str(tmp_path / "given.npz")], check=True)
    theirs = torch.from_numpy(np.load(tmp_path / "given.npy"))

    def decided(policy, step):
        seen = torch.cat([obs[max(step - 1, 0)], obs[step]], 1)
        found = policy.act({"obs": seen}, generator=torch.Generator(), noise=noise[step]).action
        return policy.denoiser.action_normalizer.unnormalize(found).transpose(0, 1)

    ours = torch.cat([decided(policy, 0), decided(policy, 2)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (decided(before.with_sampler(ODE()), 0) - ours[:2]).abs().max() > 1e-3  # it was trained
    assert main(["export", str(run.path), "--to", f"lerobot:{out}"]) == 2
    assert "is already there" in capsys.readouterr().err


def test_more_than_a_denoiser_has_no_place_in_the_format(lerobot, tmp_path):
    folder = saved(tmp_path / "policy", state=1, world=1)
    job = RobotImport(source=f"lerobot:{folder}", environment=SLOW, num_envs=2, workers=1,
                      evaluation=Evaluation(episodes=2, videos=0))
    run = Run.create(tmp_path / "base", config.dump(job), resume=False)
    job.train(run)
    steered = steer(load_policy(run.path), (8,), seed=0)
    with pytest.raises(ValueError, match="a SteeredDenoiser has no place in a policy of lerobot"):
        saving.write("lerobot", steered, run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
