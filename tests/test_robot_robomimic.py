"""robomimic's diffusion policies: its own actions before, while and after ours train them. robomimic 0.5 is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.algorithms import DPPO
from diffalign.cli.main import main
from diffalign.diffusion import DDIM, DDPM, ODE, TrainedSteps
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign_robot.choices import Gymnasium, Robosuite
from diffalign_robot.data import formats as data_formats
from diffalign_robot.data.dataset import assemble
from diffalign_robot.evaluation import Evaluation
from diffalign_robot.importing import RobotImport
from diffalign_robot.jobs import RobotAlign
from diffalign_robot.native import formats, robomimic
from diffalign_robot.runs import load_policy

SLOW = Gymnasium(id="toy_env:ToySlowPoint-v0")
SIZES = (16, [16, 32], 3, 4)  # robomimic gives its U-Net no sizes: it had 66 million numbers by its defaults


@contextmanager
def small():
    from robomimic.models.diffusion_policy_nets import ConditionalUnet1D as Net

    before, Net.__init__.__defaults__ = Net.__init__.__defaults__, SIZES
    try:
        yield
    finally:
        Net.__init__.__defaults__ = before


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("robomimic")
    pytest.importorskip("robomimic.algo.diffusion_policy")  # PyPI's 0.3 has none
    with small():
        yield


def data(parts, limits):
    generator = np.random.default_rng(0)
    lengths = (12, 15)
    obs = [{key: generator.normal(1, 2, (length, width)).astype(np.float32) for key, width in parts.items()}
           for length in lengths]
    action = [generator.uniform(*limits, (length, 2)).astype(np.float32) for length in lengths]
    return assemble(obs, action=action, reward=[np.zeros(length, np.float32) for length in lengths],
                    success=[False, False], environment={"env_name": "toy", "type": 2, "env_kwargs": {}})


PARTS = {"b_state": 1, "a_world": 1}


def saved(folder, *, averaged=True, sampler="ddim", steps=5, table=20, normalization="min_max", normalize_obs=True,
          parts=PARTS, horizon=(2, 3, 8), **options):
    """A checkpoint that robomimic itself trained for three steps, on a file that we wrote, and saved."""
    from diffusers.training_utils import EMAModel
    from robomimic.algo import algo_factory
    from robomimic.config import config_factory
    from robomimic.utils import file_utils, obs_utils, train_utils
    from torch.utils.data import DataLoader

    torch.manual_seed(0)
    limits = ((-0.9, 0.2), (0.9, 0.5)) if normalization is None else ((-3, 0.2), (1, 0.5))
    path = data_formats.write(data(parts, limits), f"robomimic:{folder / 'data.hdf5'}")
    said = config_factory("diffusion_policy")
    native_ema = "model" in signature(EMAModel.__init__).parameters  # that of diffusers 0.11
    with said.values_unlocked():
        said.train.data, said.train.hdf5_normalize_obs = [{"path": str(path)}], normalize_obs
        said.observation.modalities.obs.low_dim = list(parts)
        said.train.action_config = {"actions": {"normalization": normalization}}
        said.train.frame_stack, _, said.train.seq_length = horizon
        said.algo.horizon.observation_horizon, said.algo.horizon.action_horizon, _ = horizon
        said.algo.horizon.prediction_horizon = horizon[2]
        said.algo.ddpm.enabled, said.algo.ddim.enabled = sampler == "ddpm", sampler == "ddim"
        used = said.algo[sampler]
        used.num_train_timesteps, used.num_inference_timesteps = table, steps
        for key, value in options.items():
            used[key] = value
        said.algo.ema.enabled = averaged and native_ema
        said.algo.optim_params.policy["num_train_batches"], said.algo.optim_params.policy["num_epochs"] = 3, 1
        said.algo.optim_params.policy.learning_rate.warmup_steps = 0
        said.algo.optim_params.policy.learning_rate.initial = 1e-2
    obs_utils.initialize_obs_utils_with_config(said)
    shape = file_utils.get_shape_metadata_from_dataset({"path": str(path)}, ["actions"], list(parts))
    windows, _ = train_utils.load_data_for_training(said, obs_keys=list(parts))
    algo = algo_factory("diffusion_policy", said, shape["all_shapes"], shape["ac_dim"], torch.device("cpu"))
    statistics = windows.get_obs_normalization_stats() if normalize_obs else None
    train_utils.run_epoch(algo, DataLoader(windows, batch_size=8, drop_last=True), 1, num_steps=3,
                          obs_normalization_stats=statistics)
    file = folder / "model.pth"
    train_utils.save_model(algo, said, {"env_name": "toy"}, shape, str(file),
                           {"epoch": 1, "best_return": {"toy": np.float64(0.5)}}, statistics,
                           windows.get_action_normalization_stats())
    if averaged and not native_ema:  # newer diffusers: the averaged weights by hand, in their place
        changed(file, ema=True)
    return file


def described(folder, **parts):
    """A checkpoint that says what it holds, without weights: what is refused is refused before robomimic is asked."""
    none = {"core_class": None, "obs_randomizer_class": None}
    sampler = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    said = {"algo": {"unet": {"enabled": True}, "ddpm": {"enabled": False, **sampler},
                     "ddim": {"enabled": True, **sampler, "set_alpha_to_one": True, "steps_offset": 0}},
            "train": {"action_config": {"actions": {"normalization": None}}},
            "observation": {"modalities": {"obs": {"low_dim": ["object", "eef"], "rgb": []}},
                            "encoder": {"low_dim": none}}}
    file = folder / "described.pth"
    torch.save({"algo_name": "diffusion_policy", "config": json.dumps(said), "model": {"nets": {}, "ema": None},
                "shape_metadata": {"all_shapes": {"eef": [2], "object": [3]}},
                "variable_state": {"best_return": {"toy": np.float64(0.5)}}}, file)
    return changed(file, **parts)


def changed(file, *, ema=False, algo_name=None, **parts):
    """The checkpoint with another config, e.g. algo={"unet": {"enabled": False}}."""
    stored = torch.load(file, weights_only=False)
    said = json.loads(stored["config"])
    if ema:
        said["algo"]["ema"]["enabled"] = True
        stored["model"]["ema"] = {name: value * 0.9 for name, value in stored["model"]["nets"].items()}
    merge(said, parts)
    stored["config"], stored["algo_name"] = json.dumps(said), algo_name or stored["algo_name"]
    torch.save(stored, file)
    return file


def merge(said, parts):
    for key, value in parts.items():
        if isinstance(value, dict) and isinstance(said.get(key), dict):
            merge(said[key], value)
        else:
            said[key] = value


def observations(rows, history=2, width=2):
    return 1 + 2 * torch.randn(rows, history * width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [
    {}, {"averaged": False}, {"sampler": "ddpm", "steps": 20}, {"normalization": None},
    {"normalize_obs": False}, {"beta_schedule": "linear", "clip_sample": False}, {"horizon": (3, 6, 8)},
    {"horizon": (1, 8, 8), "steps": 7}, {"horizon": (2, 8, 8)}],
    ids=["ddim", "raw", "ddpm", "real", "real_obs", "unclipped", "history", "markov", "cut"])
def test_actions_equal_those_of_robomimic(theirs, tmp_path, options):
    file = saved(tmp_path, **options)
    history, executed, horizon = options.get("horizon", (2, 3, 8))
    policy = robomimic.read(file)
    assert policy.executed == (history - 1, min(history - 1 + executed, horizon))
    assert isinstance(policy.kernel, DDPM if options.get("sampler") == "ddpm" else ODE)
    assert robomimic.difference(policy, file, observations(100, history)) < 1e-5
    if policy.executed[1] - policy.executed[0] < horizon:  # the comparison can tell
        moved = replace(policy, executed=(0, policy.executed[1] - policy.executed[0]))
        if moved.executed != policy.executed:
            assert robomimic.difference(moved, file, observations(20, history)) > 1e-3


def test_the_averaged_weights_are_those_that_act(theirs, tmp_path):
    file = saved(tmp_path)
    averaged = robomimic.read(file)
    raw = robomimic.read(changed(file, algo={"ema": {"enabled": False}}))
    assert robomimic.difference(averaged, file, observations(20)) > 1e-4
    assert robomimic.difference(raw, file, observations(20)) < 1e-5


def test_the_parts_of_an_observation_come_in_the_checkpoints_order(theirs, tmp_path):
    file = saved(tmp_path, parts={"object": 3, "eef": 2})
    assert robomimic.observed(file) == ("eef", "object")
    assert robomimic.difference(robomimic.read(file), file, observations(20, width=5)) < 1e-5


def test_an_environment_with_another_order_is_refused(tmp_path):
    file = described(tmp_path)
    assert formats.observed("robomimic", file) == ("eef", "object")
    assert formats.observed("lerobot", file) == ()
    job = RobotImport(source=f"robomimic:{file}", environment=Robosuite(keys=("object", "eef")))
    run = Run.create(tmp_path / "run", config.dump(job), resume=False)
    with pytest.raises(ValueError, match=r"sees eef, object in this order.*set environment.keys to \[eef, object\]"):
        job.train(run)


def test_fewer_steps_and_the_other_sampler_are_written_back(theirs, tmp_path):
    file = saved(tmp_path, sampler="ddpm", steps=20)
    policy = robomimic.read(file, 4)
    assert isinstance(policy.kernel, ODE)
    robomimic.write(policy, file, tmp_path / "ddim.pth")
    said = json.loads(torch.load(tmp_path / "ddim.pth", weights_only=False)["config"])["algo"]
    assert (said["ddpm"]["enabled"], said["ddim"]["enabled"]) == (False, True)
    assert said["ddim"]["num_inference_timesteps"], said["ddim"]["num_train_timesteps"] == (4, 20)
    assert robomimic.difference(policy, tmp_path / "ddim.pth", observations(20)) < 1e-5
    every = robomimic.read(tmp_path / "ddim.pth", 20).with_sampler(DDPM())
    robomimic.write(every, tmp_path / "ddim.pth", tmp_path / "ddpm.pth")
    assert robomimic.difference(every, tmp_path / "ddpm.pth", observations(20)) < 1e-5
    for wrong, what in ((policy.with_sampler(ODE(), zero_noise=True), "from zero noise"),
                        (policy.with_sampler(DDIM(eta=0.5)), "by DDIM"), (policy.with_sampler(DDPM()), "in 4 steps")):
        with pytest.raises(ValueError, match=rf"this policy .*{what}.*; export with --sampler ode"):
            robomimic.write(wrong, file, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"takes 5 of the 20 steps of its ddpm.*set denoising_steps=5"):
        robomimic.read(changed(file, algo={"ddpm": {"num_inference_timesteps": 5}}))


@pytest.mark.parametrize(("parts", "said"), [
    ({"algo_name": "bc"}, "holds a policy of robomimic's 'bc'; only diffusion"),
    ({"algo": {"unet": {"enabled": False}, "transformer": {"enabled": True}}}, "has no unet enabled"),
    ({"observation": {"modalities": {"obs": {"rgb": ["agentview_image"]}}}}, r"sees \['agentview_image'\]; only"),
    ({"observation": {"encoder": {"low_dim": {"core_class": "MLP"}}}}, "encodes low_dim observations by MLP"),
    ({"train": {"action_config": {"actions": {"format": "rot_6d"}}}}, r"converts its actions.*'actions': 'rot_6d'"),
    ({"algo": {"ddim": {"prediction_type": "sample"}}}, "has the prediction_type 'sample'; one of"),
    ({"algo": {"ddim": {"beta_schedule": "sigmoid"}}}, "has the beta_schedule 'sigmoid'; one of"),
    ({"algo": {"ddim": {"set_alpha_to_one": False}}}, "has the set_alpha_to_one False; one of"),
    ({"algo": {"ddim": {"steps_offset": 1}}}, "has the steps_offset 1; one of")])
def test_other_policies_of_robomimic_are_refused(tmp_path, parts, said):
    file = described(tmp_path, **parts)
    with pytest.raises(ValueError, match=said):
        robomimic.read(file)
    with pytest.raises(ValueError, match=said):
        robomimic.copy(file, tmp_path / "copy")


def test_weights_of_another_network_are_refused(theirs, tmp_path, monkeypatch):
    from robomimic.models.diffusion_policy_nets import ConditionalUnet1D as Net

    file = saved(tmp_path)
    monkeypatch.setattr(Net.__init__, "__defaults__", (16, [16, 24], 3, 4))
    with pytest.raises(ValueError, match="do not fit the network that the installed robomimic builds"):
        robomimic.read(file)


class Harmful:
    def __reduce__(self):
        return print, ("it ran",)


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="is no file; a checkpoint of robomimic is needed"):
        robomimic.read(tmp_path)
    file = tmp_path / "other.pth"
    torch.save({"model": {}}, file)
    with pytest.raises(ValueError, match=r"is no checkpoint of robomimic's train.py: it has no \['algo_name'"):
        robomimic.read(file)
    torch.save({"model": Harmful()}, file)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of numbers and texts"):
        robomimic.read(file)
    assert "it ran" not in capsys.readouterr().out


def test_without_robomimic_one_is_told_where_it_is(tmp_path, monkeypatch, capsys):
    file = described(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "robomimic"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "robomimic", None)
    (tmp_path / "job.yaml").write_text(f"type: robot_import\nsource: robomimic:{file}\n"
                                       "environment: {type: gymnasium, id: 'toy_env:ToySlowPoint-v0'}\n")
    assert main(["train", str(tmp_path / "job.yaml"), "--run", str(tmp_path / "run")]) == 2
    assert "PyPI's 0.3 has none, docs/robomimic.md says how to install 0.5" in capsys.readouterr().err


FRESH = """
import json, sys
import numpy as np, torch
from robomimic.models.diffusion_policy_nets import ConditionalUnet1D
ConditionalUnet1D.__init__.__defaults__ = (16, [16, 32], 3, 4)
from robomimic.utils import file_utils
checkpoint, file = sys.argv[1:]
stored = torch.load(checkpoint, weights_only=False)
if sys.modules["diffusers"].__version__ != "0.11.1":  # robomimic's own averaging needs that one
    said = json.loads(stored["config"])
    said["algo"]["ema"]["enabled"], stored["model"]["ema"] = False, None
    stored["config"] = json.dumps(said)
policy, _ = file_utils.policy_from_checkpoint(ckpt_dict=stored, device=torch.device("cpu"))
assert not [name for name in sys.modules if name.startswith("diffalign")]
actions = []
for robot, episode in enumerate(np.load(file)):
    policy.start_episode()
    torch.manual_seed(robot)
    for frames in episode:
        actions.append(policy({"a_world": frames[:, :1], "b_state": frames[:, 1:]}))
np.save(file + ".out.npy", np.stack(actions))
"""


def test_a_policy_is_imported_improved_exported_and_reloaded_by_robomimic_alone(theirs, tmp_path, capsys):
    file = saved(tmp_path)
    evaluation = Evaluation(episodes=8, sampler="ode", videos=0, every=5)
    imported = RobotImport(source=f"robomimic:{file}", environment=SLOW, evaluation=evaluation, num_envs=4, workers=1)
    base = Run.create(tmp_path / "base", config.dump(imported), resume=False)
    imported.train(base)
    assert "optimizers" not in torch.load(base.path / "native" / "policy.pth", weights_only=False)["model"]
    file.unlink()  # the run is complete without it
    before = load_policy(base.path)
    job = RobotAlign(base=str(base.path), environment=SLOW, iterations=1, num_envs=32, workers=1, evaluation=evaluation,
                     algorithm=DPPO(optimization=Optimization(epochs=1, minibatches=2, learning_rate=1e-3)))
    job = replace(job, exploration=replace(job.exploration, trained=TrainedSteps(start=-2)))
    run = Run.create(tmp_path / "run", config.dump(job), resume=False)
    job.train(run)
    out = tmp_path / "written.pth"
    capsys.readouterr()
    assert main(["export", str(run.path), "--to", f"robomimic:{out}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_difference"] < 1e-5
    policy = load_policy(run.path).with_sampler(ODE())
    obs = 1 + torch.randn(4, 3, 2, 2)  # 3 control steps of 4 robots: one chunk of 3
    noise = torch.cat([torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(robot)) for robot in range(4)])
    np.save(tmp_path / "obs.npy", obs.numpy())
    subprocess.run([sys.executable, "-c", FRESH, str(out), str(tmp_path / "obs.npy")], check=True)
    theirs = torch.from_numpy(np.load(tmp_path / "obs.npy.out.npy")).float().reshape(4, 3, 2)

    def decided(policy):
        found = policy.act({"obs": obs[:, 0].flatten(1)}, generator=torch.Generator(), noise=noise).action
        return policy.denoiser.action_normalizer.unnormalize(found)

    torch.testing.assert_close(decided(policy), theirs, rtol=0, atol=1e-5)
    assert (decided(before.with_sampler(ODE())) - theirs).abs().max() > 1e-4  # it was trained
    assert main(["export", str(run.path), "--to", f"robomimic:{out}"]) == 2
    assert "is already there" in capsys.readouterr().err


def test_nothing_is_left_of_a_checkpoint_that_would_act_otherwise(theirs, tmp_path, monkeypatch):
    from diffalign_robot.native import saving

    job = RobotImport(source=f"robomimic:{saved(tmp_path)}", environment=SLOW, num_envs=2, workers=1,
                      evaluation=Evaluation(episodes=2, videos=0))
    run = Run.create(tmp_path / "base", config.dump(job), resume=False)
    job.train(run)
    monkeypatch.setattr(saving, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="robomimic's own actions from the written policy differ"):
        saving.write("robomimic", load_policy(run.path), run.path, tmp_path / "out" / "a.pth")
    assert list((tmp_path / "out").iterdir()) == []
