"""Data sets in the formats of others: what is written is what is read, by us and by their own packages."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.cli.main import main
from diffalign_robot.choices import Gymnasium, MetaWorld, Robosuite
from diffalign_robot.data import formats
from diffalign_robot.data.check import check
from diffalign_robot.data.dataset import Dataset, assemble
from diffalign_robot.demos import Demonstrations

LENGTHS = (5, 3, 7)
KEYS = {"robot0_eef_pos": 3, "object": 2, "extra": 1}


@pytest.fixture
def data() -> Dataset:
    rng = np.random.default_rng(0)
    episodes = [{key: rng.normal(size=(length, width)) for key, width in KEYS.items()} for length in LENGTHS]
    rewards = [rng.uniform(0, 0.5, length) for length in LENGTHS]
    return assemble(episodes, action=[rng.normal(size=(length, 2)) for length in LENGTHS], reward=rewards,
                    success=[True, False, True], rate_hz=20.0, environment={"type": "robosuite", "task": "Lift"})


def same(one: Dataset, other: Dataset, *, keys: bool = True) -> None:
    for name in ("obs", "action", "lengths", "success"):
        assert torch.equal(getattr(one.episodes, name), getattr(other.episodes, name)), name
    assert (dict(one.keys) == dict(other.keys)) or not keys


def test_assembled_episodes_lie_end_to_end(data):
    assert data.episodes.spans() == [(0, 5), (5, 8), (8, 15)]
    assert data.part("object").shape == (15, 2)
    assert torch.equal(data.part("object"), data.episodes.obs[:, 3:5])
    turned = data.select(["extra", "robot0_eef_pos"])
    assert torch.equal(turned.episodes.obs, data.episodes.obs[:, [5, 0, 1, 2]])
    with pytest.raises(ValueError, match="no observation 'nothing'; it has"):
        data.select(["nothing"])


def test_without_recorded_reward_the_last_step_of_a_success_pays_one(data):
    paid = replace(data, reward=None).paid()
    assert paid.nonzero()[:, 0].tolist() == [4, 14]
    assert torch.equal(data.paid(), data.reward)


def test_success_is_a_reward_of_one_and_without_rewards_it_is_assumed(data):
    obs, action = [{"s": np.zeros((2, 1))}] * 2, [np.zeros((2, 1))] * 2
    paid = assemble(obs, action=action, reward=[np.array([0.0, 1.0]), np.array([0.9, 0.0])], success=None)
    assert paid.episodes.success.tolist() == [1, 0]
    assert paid.says_success
    silent = assemble(obs, action=action, reward=None, success=None)
    assert silent.episodes.success.tolist() == [1, 1]
    assert not silent.says_success


@pytest.mark.parametrize(("obs", "action"), [([], []), ([np.zeros((2, 1))], [np.zeros((3, 1))]),
                                             ([np.zeros((0, 1))], [np.zeros((0, 1))])])
def test_episodes_that_do_not_fit_are_refused(obs, action):
    with pytest.raises(ValueError, match=r"no episodes|equal ones above 0 are needed"):
        assemble([{"s": part} for part in obs], action=action, reward=None, success=None)


def test_a_run_folder_keeps_names_rate_and_environment(data, tmp_path):
    formats.write(data, f"run:{tmp_path / 'run'}")
    again = formats.read(tmp_path / "run")
    same(data, again)
    assert (again.rate_hz, dict(again.environment)) == (20.0, {"type": "robosuite", "task": "Lift"})
    assert torch.equal(Demonstrations.load(tmp_path / "run").obs, data.episodes.obs)


def test_robomimic_files_round_trip(data, tmp_path):
    pytest.importorskip("h5py")
    path = formats.write(data, f"robomimic:{tmp_path / 'demo.hdf5'}")
    again = formats.read(path)
    assert list(again.keys) == ["robot0_eef_pos", "object", "extra"]
    same(data, again)
    assert torch.equal(data.paid(), again.paid())
    assert again.rate_hz == 20.0


def test_robomimic_episodes_are_read_in_the_order_of_their_numbers(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for number in range(12):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"], demo["rewards"] = np.full((2, 1), number), [0.0, float(number % 2)]
            demo["obs/robot0_eef_quat"], demo["obs/object"] = np.zeros((2, 4)), np.zeros((2, 10))
            demo["obs/a_joint"], demo["obs/picture"] = np.zeros((2, 1)), np.zeros((2, 4, 4, 3))
    read = formats.read(tmp_path / "d.hdf5")
    assert read.episodes.action[::2, 0].tolist() == list(range(12))
    assert list(read.keys) == ["robot0_eef_quat", "object", "a_joint"]
    assert read.episodes.success.tolist() == [0, 1] * 6


def test_what_is_no_robomimic_file_is_refused(tmp_path, data):
    h5py = pytest.importorskip("h5py")
    h5py.File(tmp_path / "empty.hdf5", "w").close()
    with pytest.raises(ValueError, match="no episodes under /data"):
        formats.read(tmp_path / "empty.hdf5")
    with h5py.File(tmp_path / "states.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((2, 1))
    with pytest.raises(ValueError, match="holds no observations of numbers; extract them"):
        formats.read(tmp_path / "states.hdf5")
    with pytest.raises(ValueError, match=r"a file that ends in .hdf5"):
        formats.write(data, f"robomimic:{tmp_path / 'folder'}")


def test_robomimic_itself_reads_what_is_written(data, tmp_path):
    pytest.importorskip("h5py")
    pytest.importorskip("robomimic")
    from robomimic.utils import file_utils, obs_utils
    from robomimic.utils.dataset import SequenceDataset

    path = formats.write(data, f"robomimic:{tmp_path / 'demo.hdf5'}")
    said = file_utils.get_env_metadata_from_dataset(str(path))
    assert (said["env_name"], said["type"]) == ("Lift", 1)
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": list(KEYS)}})
    theirs = SequenceDataset(str(path), obs_keys=tuple(KEYS), dataset_keys=("actions", "rewards", "dones"),
                             load_next_obs=False, seq_length=2, pad_seq_length=True, hdf5_cache_mode="all")
    assert (len(theirs), theirs.n_demos) == (15, 3)
    row = theirs[5]  # the first step of the second episode
    np.testing.assert_array_equal(row["actions"], data.episodes.action[5:7])
    np.testing.assert_array_equal(row["obs"]["object"], data.part("object")[5:7])
    np.testing.assert_array_equal(row["rewards"], data.reward[5:7])
    assert theirs[7]["dones"].tolist() == [1, 1]  # the end of the episode, repeated


@pytest.mark.filterwarnings("default")  # lerobot and datasets under the pinned numpy have some of their own
def test_lerobot_itself_reads_what_is_written(data, tmp_path):
    pytest.importorskip("lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    path = formats.write(data, f"lerobot:{tmp_path / 'set'}")
    theirs = LeRobotDataset("local/set", root=path, delta_timestamps={"action": [0.0, 0.05]})
    assert (theirs.num_episodes, theirs.num_frames, theirs.fps) == (3, 15, 20)
    row = theirs[6]
    assert torch.equal(row["observation.state"], data.select(["robot0_eef_pos", "extra"]).episodes.obs[6])
    assert torch.equal(row["observation.environment_state"], data.part("object")[6])
    assert torch.equal(row["action"], data.episodes.action[6:8])
    assert row["task"] == "Lift"
    assert theirs[7]["action_is_pad"].tolist() == [False, True]
    assert [bool(theirs[i]["next.success"]) for i in (4, 7, 14)] == [True, False, True]
    np.testing.assert_allclose(theirs.meta.stats["action"]["min"], data.episodes.action.amin(0), rtol=1e-6)
    again = formats.read(path)
    same(data.select(["robot0_eef_pos", "extra", "object"]), again, keys=False)
    assert dict(again.keys) == {"observation.state": 4, "observation.environment_state": 2}
    assert torch.equal(again.paid(), data.paid())
    assert (again.rate_hz, again.task()) == (20.0, "Lift")
    with pytest.raises(ValueError, match="a whole number of control steps a second, got None"):
        formats.write(replace(data, rate_hz=None), f"lerobot:{tmp_path / 'other'}")


def zarr_array(folder, values):
    """A zarr v2 array of one uncompressed chunk, written by hand."""
    folder.mkdir(parents=True)
    said = {"zarr_format": 2, "shape": values.shape, "chunks": values.shape, "dtype": values.dtype.str, "order": "C",
            "compressor": None, "filters": None, "fill_value": 0}
    (folder / ".zarray").write_text(json.dumps(said))
    (folder / ".".join("0" * values.ndim)).write_bytes(np.ascontiguousarray(values).tobytes())


def replay_buffer(path, ends):
    rng = np.random.default_rng(1)
    arrays = {"action": rng.normal(size=(6, 2)), "state": rng.normal(size=(6, 5)),
              "keypoint": rng.normal(size=(6, 9, 2)), "img": np.zeros((6, 4, 4, 3)), "n_contacts": np.zeros((6, 1))}
    for name, values in arrays.items():
        zarr_array(path / "data" / name, values.astype(np.float32))
    zarr_array(path / "meta" / "episode_ends", np.array(ends, np.int64))
    for group in (path, path / "data", path / "meta"):
        (group / ".zgroup").write_text('{"zarr_format": 2}')
    return arrays


def test_a_diffusion_policy_zarr_is_read(tmp_path):
    pytest.importorskip("zarr")
    arrays = replay_buffer(tmp_path / "pusht.zarr", [2, 6])
    read = formats.read(tmp_path / "pusht.zarr")
    assert dict(read.keys) == {"state": 5, "keypoint": 18}
    assert read.episodes.lengths.tolist() == [2, 4]
    np.testing.assert_array_equal(read.part("state"), arrays["state"].astype(np.float32))
    np.testing.assert_array_equal(read.part("keypoint"), arrays["keypoint"].reshape(6, 18).astype(np.float32))
    np.testing.assert_array_equal(read.episodes.action, arrays["action"].astype(np.float32))
    assert not read.says_success
    replay_buffer(tmp_path / "torn.zarr", [2, 5])
    with pytest.raises(ValueError, match=r"episodes end at step \[5\], but there are 6 actions"):
        formats.read(tmp_path / "torn.zarr")


@pytest.mark.parametrize("named", [False, True])
def test_a_minari_folder_is_read(tmp_path, named):
    minari = pytest.importorskip("minari")
    h5py = pytest.importorskip("h5py")
    import gymnasium
    from gymnasium.spaces import Box, Dict
    from minari.dataset.minari_storage import MinariStorage

    box = Box(-1, 1, (3,), np.float32)
    (tmp_path / "set" / "data").mkdir(parents=True)
    storage = MinariStorage.new(tmp_path / "set" / "data", Dict(a=box, b=box) if named else box,
                                Box(-1, 1, (1,), np.float32), gymnasium.spec("Pendulum-v1"), data_format="hdf5")
    storage.update_metadata({"dataset_id": "set-v0", "minari_version": minari.__version__, "total_episodes": 2,
                             "total_steps": 7})
    rng = np.random.default_rng(0)
    obs = [rng.uniform(-1, 1, (length + 1, 3)).astype(np.float32) for length in (3, 4)]  # one more than actions
    with h5py.File(tmp_path / "set" / "data" / "main_data.hdf5", "a") as file:
        for number, seen in enumerate(obs):
            group, length = file.create_group(f"episode_{number}"), len(seen) - 1
            group.attrs.update({"id": number, "total_steps": length})
            for key in ("observations/a", "observations/b") if named else ("observations",):
                group[key] = seen
            group["actions"], group["rewards"] = np.full((length, 1), number, np.float32), [0.5] * (length - 1) + [1.0]
            group["terminations"] = group["truncations"] = np.zeros(length, bool)
            group["infos/success"] = np.arange(length) == (1 if number else length)
    read = formats.read(tmp_path / "set")
    assert dict(read.keys) == ({"a": 3, "b": 3} if named else {"obs": 3})
    assert read.episodes.lengths.tolist() == [3, 4]
    np.testing.assert_array_equal(read.episodes.obs[:, :3], np.concatenate([seen[:-1] for seen in obs]))
    assert read.episodes.action[:, 0].tolist() == [0] * 3 + [1] * 4
    assert (read.episodes.success.tolist(), read.task()) == ([0, 1], "Pendulum-v1")
    assert read.paid()[:3].tolist() == [0.5, 0.5, 1.0]


def test_unknown_paths_and_formats_name_the_known_ones(tmp_path, data):
    with pytest.raises(ValueError, match=r"is no data set of a known format; a run folder, a robomimic .hdf5"):
        formats.read(tmp_path)
    with pytest.raises(ValueError, match="it does not exist"):
        formats.read(tmp_path / "none.hdf5")
    for target in ("zarr:x", "robomimic", "run:"):
        with pytest.raises(ValueError, match="FORMAT one of run, robomimic, lerobot, got"):
            formats.write(data, target)
    formats.write(data, f"run:{tmp_path / 'run'}")
    with pytest.raises(ValueError, match="is already there; choose another path"):
        formats.write(data, f"run:{tmp_path / 'run'}")


def test_recipes_take_the_environments_keys_in_its_order(data, tmp_path):
    path = str(formats.write(data, f"run:{tmp_path / 'run'}"))
    lift = Robosuite(keys=("object", "robot0_eef_pos"))
    assert torch.equal(formats.load_demonstrations(path, lift).obs, data.episodes.obs[:, [3, 4, 0, 1, 2]])
    for other in (Gymnasium(id="Hopper-v5"), MetaWorld()):  # its keys are not those of the data set
        assert torch.equal(formats.load_demonstrations(path, other).obs, data.episodes.obs)


def test_a_check_finds_what_is_wrong(data):
    clean = check(data)
    assert clean["problems"] == []
    assert clean["length"] == {"min": 3, "mean": 5.0, "max": 7}
    assert clean["success_rate"] == pytest.approx(2 / 3)
    row = clean["action"][1]
    action = data.episodes.action[:, 1]
    assert row["shift"] == pytest.approx(float(action.max() + action.min()) / 2)
    assert row["scale"] == pytest.approx(float(action.max() - action.min()) / 2)
    assert clean["obs"][4] == {"name": "object.1", "min": pytest.approx(float(data.part("object")[:, 1].min())),
                               "max": pytest.approx(float(data.part("object")[:, 1].max())),
                               "mean": pytest.approx(float(data.part("object")[:, 1].mean()), abs=1e-6),
                               "std": pytest.approx(float(data.part("object")[:, 1].std(correction=0))),
                               "shift": clean["obs"][4]["mean"], "scale": clean["obs"][4]["std"]}


def test_a_check_names_outliers_copies_and_constants():
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(5, 40, 2)), rng.normal(size=(5, 40, 1))
    obs[3, 7, 1] = 60.0
    obs[..., 0] = 2.0
    action[4] = action[1]
    found = check(assemble([{"s": part} for part in obs], action=list(action), reward=None, success=None))
    assert [(row["name"], row["episode"], row["step"], row["steps"], row["value"]) for row in found["outliers"]] == [
        ("s.1", 3, 7, 1, 60.0)]
    assert len(found["problems"]) == 2
    assert found["problems"][0].startswith("s.1 is 1")
    assert "episode 4 has the very actions of episode 1" in found["problems"]
    assert found["notes"] == ["constant, so without information: s.0",
                              "the data set does not say which episodes succeeded; all of them count as successful"]
    obs[2, 9, 1] = np.nan
    with pytest.raises(ValueError, match=r"s.1 is nan at step 9 of episode 2"):
        check(assemble([{"s": part} for part in obs], action=list(action), reward=None, success=None))


def test_the_command_converts_and_checks(data, tmp_path, capsys):
    pytest.importorskip("h5py")
    source, target = formats.write(data, f"run:{tmp_path / 'run'}"), tmp_path / "out.hdf5"
    assert main(["data", "convert", str(source), "--to", f"robomimic:{target}", "--keys", "extra,object"]) == 0
    assert dict(formats.read(target).keys) == {"object": 2, "extra": 1}
    page = tmp_path / "page.html"
    assert main(["data", "check", str(target), "--out", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 3
    assert page.read_text().count("<svg") == 1 + 2 + 3  # lengths, actions, observations
    assert main(["data", "convert", str(source)]) == 2
    assert "convert needs --to FORMAT:PATH" in capsys.readouterr().err
    twice = replace(data, episodes=replace(data.episodes, action=torch.zeros_like(data.episodes.action),
                                           lengths=torch.tensor([5, 5, 5])))
    formats.write(twice, f"run:{tmp_path / 'twice'}")
    assert main(["data", "check", str(tmp_path / "twice"), "--out", str(page)]) == 1
    assert "problem: episode 1 has the very actions of episode 0" in capsys.readouterr().out


def test_parts_are_named_anew(data, tmp_path, capsys):
    formats.write(data, f"run:{tmp_path / 'run'}")
    convert = ["data", "convert", str(tmp_path / "run"), "--to"]
    assert main([*convert, f"run:{tmp_path / 'new'}", "--parts", "state=2,environment_state=4"]) == 0
    again = formats.read(tmp_path / "new")
    same(data, again, keys=False)
    assert dict(again.keys) == {"state": 2, "environment_state": 4}
    for parts, said in (("state=2", "do not make up 6 numbers"), ("state:6", "--parts must be NAME=WIDTH"),
                        ("=6", "--parts must be NAME=WIDTH"), ("state=2,x", "--parts must be NAME=WIDTH")):
        assert main([*convert, f"run:{tmp_path / 'wrong'}", "--parts", parts]) == 2
        assert said in capsys.readouterr().err
