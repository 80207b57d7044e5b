"""Images in observations: rendering, encoders, and everything that must not notice whether it sees or knows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_env import ShownPoint

from diffalign import config
from diffalign.algorithms import AWM, DPPO, NoisePPO, ReinFlow, ResidualRL
from diffalign.cli.errors import paragraph
from diffalign.diffusion import NoisyODE
from diffalign.rl.likelihoods import Matching, Transition
from diffalign.train.off_policy_pieces import Learning
from diffalign.train.pieces import Optimization
from diffalign.train.run import Run
from diffalign.train.supervised import Pretraining
from diffalign_robot.alignment import Exploration
from diffalign_robot.cameras import resized
from diffalign_robot.choices import ChunkMLP, Custom, Gymnasium, MetaWorld, Robosuite
from diffalign_robot.cloning import batches_for
from diffalign_robot.data import formats
from diffalign_robot.demos import Demonstrations, collect, join
from diffalign_robot.envs import make
from diffalign_robot.evaluate import policy_actor
from diffalign_robot.evaluation import Evaluation, open_env
from diffalign_robot.exported import ExportedPolicy
from diffalign_robot.image_choices import ConvEncoder, Images, ResNetEncoder, ViTEncoder
from diffalign_robot.jobs import RobotAlign, RobotBC, RobotCompose, RobotOffPolicy
from diffalign_robot.runs import build_policy, load_policy
from diffalign_robot.source import EnvSource, chunk_denoiser, shown
from diffalign_robot.vector import ChunkVectorEnv
from diffalign_robot.vision import ImageEncoder, Keypoints, VisionValue, shifted_images

SEEN = Images(size=32, state=(0,))  # the other number is in the image
TOY = Gymnasium(id="toy_env:ToyShownPoint-v0", images=SEEN)
SMALL = ConvEncoder(channels=(4, 8), features=6, shift=2)
FAST = Evaluation(episodes=8, every=100, videos=0)


def wandering_expert():
    return lambda obs: -obs  # of the whole state: it needs both numbers


def policy_of(encoder=SMALL, images=SEEN, steps=3, prediction="eps", **others):
    torch.manual_seed(0)
    return build_policy(ChunkMLP(width=16, blocks=1), 2, 1 + encoder.features, 2, steps, prediction=prediction,
                        encoder=ImageEncoder(encoder, images), **others)


def some_cond(rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"obs": torch.randn(rows, 1, generator=generator),
            "image": torch.randint(0, 256, (rows, 1, 3, 32, 32), dtype=torch.uint8, generator=generator)}


# rendering


@pytest.mark.parametrize("workers", [1, 2])
def test_a_vector_environment_shows_what_each_simulator_renders(workers):
    env, seeds = ChunkVectorEnv(TOY, 3, workers=workers), [3, 4, 5]
    assert env.obs_dim == 1
    obs = env.reset(seeds)
    singles = [ShownPoint(gain=0.25) for _ in seeds]
    whole = [single.reset(seed=seed)[0] for single, seed in zip(singles, seeds)]
    rng = np.random.default_rng(0)
    for _ in range(3):
        np.testing.assert_array_equal(obs[:, 0], [state[0] for state in whole])
        images = env.images()
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, np.stack([s.render().transpose(2, 0, 1)[None] for s in singles]))
        chunk = rng.uniform(-0.5, 0.5, (3, 2, 2)).astype(np.float32)
        obs = env.step(chunk).obs
        whole = [[single.step(action)[0] for action in actions][-1] for single, actions in zip(singles, chunk)]
    env.close()


def test_a_chunk_is_rendered_once_and_an_ended_episode_no_more():
    env = ChunkVectorEnv(replace(TOY, horizon=4), 2)
    env.reset([1, 2])
    inner = [episode._inner._env.unwrapped for episode in env._local.episodes]
    assert [point.renders for point in inner] == [0, 0]
    first = env.images()
    np.testing.assert_array_equal(env.images(), first)
    assert [point.renders for point in inner] == [1, 1]
    still = np.zeros((2, 3, 2), np.float32)
    for executed, renders in ((3, 2), (1, 3), (0, 3)):  # the time limit is 4 steps
        assert env.step(still).executed.tolist() == [executed] * 2
        env.images()
        assert [point.renders for point in inner] == [renders] * 2
    np.testing.assert_array_equal(env.images(), first)
    env.reset([3, 4])
    assert not np.array_equal(env.images(), first)
    env.close()


def test_environments_without_images_show_none():
    env = ChunkVectorEnv(replace(TOY, images=None), 2)
    obs = env.reset([1, 2])
    assert env.images() is None
    assert shown(env, obs).keys() == {"obs"}
    env.close()


def test_pictures_are_averaged_to_the_size_that_is_asked_for():
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2, :2] = [[[0] * 3, [40] * 3], [[80] * 3, [120] * 3]]
    small = resized(picture, 2)
    assert small[..., 0].tolist() == [[60, 0], [0, 0]]
    assert resized(picture, 4) is picture


@pytest.fixture(scope="module")
def push():
    return MetaWorld(task="push-v3", images=Images(size=32, cameras=("behindGripper", "corner2"), state=(0, 1, 2, 3)))


def test_looking_at_meta_world_changes_nothing_and_depends_on_nothing_before(push):
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32)
    looked, plain = ChunkVectorEnv(push, 1), make(replace(push, images=None))
    seen = []
    for seed in (7, 3, 7):
        looked.reset([seed])
        plain.reset(seed)
        seen.append([looked.images()])
        for action in actions:
            looked.step(action[None, None])
            plain.advance(action)
            seen[-1].append(looked.images())
            whole = looked._local.episodes[0]._inner.observe()
            np.testing.assert_array_equal(whole, plain.observe())
    np.testing.assert_array_equal(seen[0], seen[2])
    assert seen[0][0].shape == (1, 2, 3, 32, 32)
    assert (seen[0][0] != seen[1][0]).mean() > 1e-3  # another place of the puck and the goal
    assert (seen[0][0][0, 0] != seen[0][-1][0, 0]).mean() > 0.05  # the camera moves with the hand
    fresh = ChunkVectorEnv(push, 2)  # renders with a camera that was made for another simulator
    fresh.reset([3, 7])
    np.testing.assert_array_equal(fresh.images()[1], seen[0][0][0])
    for env in (looked, fresh):
        env.close()


def test_an_unknown_camera_is_refused_by_the_names_that_there_are(push):
    env = ChunkVectorEnv(replace(push, images=replace(push.images, cameras=("front",))), 1)
    env.reset([0])
    with pytest.raises(ValueError, match="no camera 'front'; it has topview, corner, corner2"):
        env.images()
    env.close()


# encoders


def test_keypoints_are_where_a_channel_is_active():
    maps = torch.full((1, 2, 3, 5), -1e4)
    maps[0, 0, 2, 1] = 0.0  # row 2 of 3, column 1 of 5
    maps[0, 1, 0, 0] = maps[0, 1, 0, 4] = 0.0
    torch.testing.assert_close(Keypoints()(maps), torch.tensor([[-0.5, 0.0, 1.0, -1.0]]))


def test_a_shift_moves_each_image_and_repeats_its_border():
    image, generator = some_cond(rows=40)["image"], torch.Generator().manual_seed(0)
    assert torch.equal(shifted_images(image, 0, generator), image)
    moved = shifted_images(image, 2, generator)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    found = set()
    for i in range(40):
        places = [(dy, dx) for dy in range(5) for dx in range(5)
                  if np.array_equal(padded[i, :, :, dy : dy + 32, dx : dx + 32], moved[i].numpy())]
        assert len(places) == 1
        found |= set(places)
    assert {0, 4} <= {dy for dy, _ in found} & {dx for _, dx in found}
    assert len(found) > 10


def test_images_are_encoded_once_a_decision_and_kept_as_they_are():
    policy, cond = policy_of(), some_cond()
    network = chunk_denoiser(policy)
    calls = []
    network.encoder.register_forward_hook(lambda *_: calls.append(1))
    decision = policy.act(cond, generator=torch.Generator().manual_seed(1))
    assert len(calls) == 1
    assert torch.equal(decision.trajectory.cond["image"], cond["image"])
    with torch.no_grad():
        features = network.encode(cond)
    assert features.keys() == {"obs"}
    assert torch.equal(features["obs"][:, :1], cond["obs"])
    assert network.encode(features) is features
    again = policy.act(features, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.action, decision.action)
    other = policy.act({**cond, "image": 255 - cond["image"]}, generator=torch.Generator().manual_seed(1))
    assert (other.action - decision.action).abs().max() > 1e-3
    assert (network.obs_dim, network.frozen_encoder) == (1, False)
    network.encoder.requires_grad_(False)
    assert network.frozen_encoder


@pytest.mark.parametrize("likelihood", [Transition(), Matching()])
def test_scoring_reaches_the_encoder_and_encodes_once(likelihood):
    policy, cond, generator = policy_of(), some_cond(), torch.Generator().manual_seed(1)
    network, calls = chunk_denoiser(policy), []
    trajectory = policy.act(cond, generator=generator).trajectory
    examples = likelihood.examples(policy, trajectory, torch.ones(5), decisions=torch.arange(5), generator=generator)
    network.encoder.register_forward_hook(lambda *_: calls.append(1))
    rows = examples.rows(torch.arange(6))
    scored = likelihood.score(policy, rows)
    assert len(calls) == 1
    torch.testing.assert_close(scored.log_prob, rows.old_log_prob, atol=1e-4, rtol=1e-4)
    scored.log_prob.sum().backward()
    assert float(network.encoder.trunks[0][0].weight.grad.abs().max()) > 0


def test_every_camera_has_its_own_network_and_blocks_do_not_matter():
    encoder = ImageEncoder(SMALL, Images(size=32, cameras=("a", "b"), state=(0,)))
    image = torch.randint(0, 256, (600, 2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        seen = encoder(image)
        torch.testing.assert_close(torch.cat([encoder(image[:10]), encoder(image[10:])]), seen, atol=1e-5, rtol=1e-5)
        encoder.trunks[1].requires_grad_(False)[0].weight.zero_()  # the second camera's network is blind
        blind = encoder(image)
        assert torch.equal(encoder(torch.stack([image[:, 0], 255 - image[:, 1]], 1)), blind)
        assert (encoder(torch.stack([255 - image[:, 0], image[:, 1]], 1)) - blind).abs().max() > 0.01
    assert seen.shape == (600, 6)
    torch.testing.assert_close(seen.mean(1), torch.zeros(600), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spec", [ResNetEncoder(features=5), ResNetEncoder(features=5, pool="keypoints"),
                                  ViTEncoder(features=5, width=16, heads=2, blocks=1)])
def test_torchvision_encoders(spec):
    pytest.importorskip("torchvision")
    encoder = ImageEncoder(spec, SEEN)
    assert not any("BatchNorm" in type(module).__name__ for module in encoder.modules())
    image = some_cond(3)["image"]
    together = encoder(image)
    assert together.shape == (3, 5)
    torch.testing.assert_close(encoder(image[:1]), together[:1], atol=1e-4, rtol=1e-4)  # no statistics of a batch
    together.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    with pytest.raises(ValueError, match="patch must divide the images' size of 32 pixels, got 7"):
        ImageEncoder(ViTEncoder(patch=7), SEEN)


def test_a_missing_torchvision_names_its_extra():
    said = paragraph(ModuleNotFoundError("No module named 'torchvision'", name="torchvision"))
    assert "[vision]" in said


# demonstrations


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    episodes = list(collect(TOY, wandering_expert, seeds=list(range(30)), action_noise=0.3, noise_seed=0))
    join(episodes).save(root / "demos", {})
    job = RobotBC(base=str(root / "demos"), environment=TOY, network=ChunkMLP(width=32, blocks=1), chunk=2,
                  encoder=SMALL, denoising_steps=3, num_envs=8, workers=1, evaluation=FAST,
                  pretraining=Pretraining(steps=250, batch_size=64, learning_rate=3e-3, time="grid"))
    job.train(Run.create(root / "bc", config.dump(job), resume=False))
    return root


def test_demonstrations_hold_what_the_policy_would_have_seen(cloned):
    data = Demonstrations.load(cloned / "demos")
    assert data.image.dtype == torch.uint8
    assert data.image.shape == (len(data.obs), 1, 3, 32, 32)
    rows, columns = data.image[:, 0, 0].amax(2).argmax(1), data.image[:, 0, 0].amax(1).argmax(1)
    expected = (14 + 14 * data.obs[:, 0]).round().clamp(0, 28).long()
    assert torch.equal(columns, expected)  # an image is of the very step of its numbers
    assert rows.unique().numel() > 10
    starts = data.starts(3)
    seen = data.with_history(2).seen(starts)
    assert torch.equal(seen["image"], data.image[starts])
    assert seen["obs"].shape == (len(starts), 2)
    assert data.success.float().mean() > 0.9  # the expert saw both numbers
    success = torch.ones_like(data.success)
    success[0] = 0
    won, first = replace(data, success=success).successful(), int(data.lengths[0])
    assert torch.equal(won.image, data.image[first:])
    assert torch.equal(won.obs, data.obs[first:])


def test_a_policy_of_the_state_records_images_for_another():
    teacher = build_policy(ChunkMLP(width=8, blocks=1), 2, 2, 2, 2)
    (obs, action, _, image), = collect(TOY, policy_actor(teacher, seed=0), seeds=[0], action_noise=0.0, noise_seed=0)
    assert obs.shape == (len(action), 1)
    assert image.shape == (len(action), 1, 3, 32, 32)


def test_cloning_shifts_images_and_a_frozen_encoder_replaces_them(cloned):
    data, generator = Demonstrations.load(cloned / "demos"), torch.Generator().manual_seed(0)
    policy = load_policy(cloned / "bc")
    _, cond = batches_for(policy, [data, data], 500)(generator)
    flat = {image.numpy().tobytes() for image in data.image}
    share = sum(image.numpy().tobytes() in flat for image in cond["image"]) / 500
    assert share < 0.6  # many are not in the data: they were moved
    chunk_denoiser(policy).encoder.requires_grad_(False)
    _, cond = batches_for(policy, [data], 20)(generator)
    assert cond.keys() == {"obs"}
    assert cond["obs"].shape == (20, 1 + 6)


def test_data_sets_and_environments_must_show_the_same(cloned, tmp_path):
    demos, blind = cloned / "demos", replace(TOY, images=None)
    with pytest.raises(ValueError, match=r"has images of the shape \(1, 3, 32, 32\).* and the environment of None"):
        formats.load_demonstrations(str(demos), blind)
    with pytest.raises(ValueError, match=r"of \(1, 3, 16, 16\); None is none"):
        formats.load_demonstrations(str(demos), replace(TOY, images=replace(SEEN, size=16)))
    with pytest.raises(ValueError, match="has images, which robomimic data sets written here do not hold; use run:"):
        formats.write(formats.read(demos), f"robomimic:{tmp_path}/a.hdf5")
    formats.write(formats.read(demos), f"run:{tmp_path}/copy")
    assert torch.equal(Demonstrations.load(tmp_path / "copy").image, Demonstrations.load(demos).image)


# learning


def test_a_policy_is_cloned_from_pixels_reloaded_and_filmed(cloned):
    saved = json.loads((cloned / "bc/evaluations/after.json").read_text())
    assert saved["success_rate"] >= 0.75
    job = config.load(RobotBC, cloned / "bc" / "config.yaml")
    assert job.evaluate(Run(cloned / "bc"), seed=0)["success_rate"] == saved["success_rate"]
    for sampler in ("zero_noise", "ode"):
        assert job.evaluate(Run(cloned / "bc"), seed=0, sampler=sampler)["success_rate"] >= 0.5
    film = job.sample(Run(cloned / "bc"), cloned / "films", seed=0, count=1)
    assert film[0].stat().st_size > 1000
    env = open_env(TOY, load_policy(cloned / "bc"), 2, 1)
    env.close()
    with pytest.raises(ValueError, match=r"the policy sees images of the shape \(1, 3, 32, 32\)"):
        open_env(replace(TOY, images=replace(SEEN, size=16)), load_policy(cloned / "bc"), 2, 1)


def test_the_encoder_is_what_finds_the_hidden_number(cloned, monkeypatch):
    """Without the image nothing tells y: its share of the success is what the numbers alone cannot give."""
    policy = load_policy(cloned / "bc")
    rollouts = {}
    for name in ("seen", "covered"):
        env = ChunkVectorEnv(TOY, 40)
        if name == "covered":
            monkeypatch.setattr(env, "images", lambda look=env.images: np.zeros_like(look()))
        rollouts[name] = EnvSource(env).collect(policy, generator=torch.Generator().manual_seed(0)).stats
        env.close()
    assert rollouts["seen"]["success_rate"] > rollouts["covered"]["success_rate"] + 0.3


def aligned(cloned, path, **changes):
    algorithm = DPPO(behavior_cloning=0.1, optimization=Optimization(learning_rate=1e-3, minibatches=2, ema_decay=0.9))
    job = RobotAlign(base=str(cloned / "bc"), environment=TOY, algorithm=algorithm, iterations=2, num_envs=8, workers=1,
                     critic_hidden=(16,), evaluation=FAST, save_every=1)
    job = replace(job, **changes)
    run = Run.create(path, config.dump(job), resume=False)
    job.train(run)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return job, run, [line for line in lines if line["phase"] == "train"]


@pytest.mark.parametrize("encoder", ["trained", "frozen"])
def test_fine_tuning_from_pixels(cloned, tmp_path, encoder):
    job, run, lines = aligned(cloned, tmp_path / "align", encoder=encoder)
    assert all(line["ratio_drift"] < 1e-3 for line in lines)
    for name in ("rendering", "policy", "update", "rollout"):
        assert all(line[f"time/{name}"] > 0 for line in lines)
    assert all(line["time/rendering"] + line["time/policy"] < line["time/rollout"] for line in lines)
    before, after = (dict(chunk_denoiser(load_policy(path)).named_parameters()) for path in (cloned / "bc", run.path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("net.") for name in moved)
    assert any(name.startswith("encoder.") for name in moved) == (encoder == "trained")
    policy, _, state = job._build()
    if encoder == "trained":
        critic = state.modules["critic"]
        assert isinstance(critic, VisionValue)
        assert critic.encoder is not chunk_denoiser(policy).encoder
        assert torch.equal(critic.encoder.outlet[0].weight, chunk_denoiser(policy).encoder.outlet[0].weight)
    env = open_env(TOY, policy, 4, 1)
    rollout = EnvSource(env).collect(policy, generator=torch.Generator().manual_seed(0))
    env.close()
    rows, shape = rollout.reward.numel(), rollout.trajectory.cond["obs"].shape
    if encoder == "trained":
        assert rollout.trajectory.cond["image"].dtype == torch.uint8
        assert rollout.next_cond["image"].shape == (rows, 1, 3, 32, 32)
        assert torch.equal(rollout.next_cond["image"][: rows - 4], rollout.trajectory.cond["image"][4:])
        assert shape == (rows, 1)
    else:
        assert rollout.trajectory.cond.keys() == rollout.next_cond.keys() == {"obs"}
        assert shape == (rows, 1 + 6)


def test_an_interrupted_run_from_pixels_goes_on_bit_for_bit(cloned, tmp_path):
    _, whole, lines = aligned(cloned, tmp_path / "whole")
    job = config.load(RobotAlign, whole.path / "config.yaml")
    part = replace(job, iterations=1)
    half = Run.create(tmp_path / "half", config.dump(job), resume=False)
    part.train(half)
    job.train(Run.create(tmp_path / "half", config.dump(job), resume=True))
    again = [json.loads(line) for line in (half.path / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in again if line["phase"] == "train"][-1]
    skipped = ("time/", "env_steps_per_s", "wall", "timestamp")
    same = {name: value for name, value in lines[-1].items() if not name.startswith(skipped)}
    assert {name: last[name] for name in same} == same


@pytest.mark.parametrize("changes", [
    {"algorithm": NoisePPO(optimization=Optimization(learning_rate=1e-3, minibatches=2)), "steering": (8,),
     "group": 2},
    {"algorithm": AWM(optimization=Optimization(learning_rate=1e-4, minibatches=2)), "group": 2}])
def test_other_algorithms_see_as_well(cloned, tmp_path, changes):
    _, _, lines = aligned(cloned, tmp_path / "other", iterations=1, **changes)
    assert lines[0]["ratio_drift"] < 1e-3


def test_learned_noise_reads_the_features(cloned, tmp_path):
    flow = replace(config.load(RobotBC, cloned / "bc" / "config.yaml"), prediction="flow",
                   pretraining=Pretraining(steps=20, batch_size=16, time="grid"))
    flow.train(Run.create(tmp_path / "flow", config.dump(flow), resume=False))
    algorithm = ReinFlow(optimization=Optimization(learning_rate=1e-3, minibatches=2))
    _, _, lines = aligned(cloned, tmp_path / "reinflow", base=str(tmp_path / "flow"), noise=(8,), iterations=1,
                          algorithm=algorithm, exploration=Exploration(kernel=NoisyODE()))
    assert lines[0]["ratio_drift"] < 1e-3


def test_off_policy_learners_get_the_features_of_the_frozen_base(cloned, tmp_path):
    fast = Learning(critic_hidden=(16,), actor_hidden=(16,), batch_size=16, warmup_decisions=8)
    job = RobotOffPolicy(base=str(cloned / "bc"), environment=TOY, algorithm=ResidualRL(learning=fast), iterations=2,
                         demonstrations=(str(cloned / "demos"),), num_envs=4, evaluation=FAST)
    run = Run.create(tmp_path / "residual", config.dump(job), resume=False)
    job.train(run)
    assert job.evaluate(Run(run.path), seed=0)["episodes"] == 8
    with pytest.raises(ValueError, match="per_step does not see images yet"):
        replace(job, per_step=True)


# refusals


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Images(size=8, state=(0,)), "size must be at least 16 pixels, got 8"),
    (lambda: Images(state=()), "state must name at least one place"),
    (lambda: Images(state=(0, 0)), r"each once, got \[0, 0\]"),
    (lambda: Images(state=(-1,)), r"counted from 0 and each once, got \[-1\]"),
    (lambda: ConvEncoder(channels=(4,)), r"channels must name at least two layers, got \[4\]"),
    (lambda: ConvEncoder(features=0), "need features >= 1 and shift >= 0, got 0 and 4"),
    (lambda: ResNetEncoder(shift=-1), "need features >= 1 and shift >= 0, got 64 and -1"),
    (lambda: ViTEncoder(width=10, heads=4), "a width that is a multiple of heads, got 8, 3, width=10, heads=4"),
    (lambda: MetaWorld(images=SEEN), "images.cameras must name at least one camera of the simulator, e.g. corner2"),
    (lambda: Robosuite(images=SEEN), "at least one camera of the simulator, e.g. agentview"),
    (lambda: Gymnasium(id="a", images=Images(cameras=("up",), state=(0,))), r"leave images.cameras out, got \['up'\]"),
    (lambda: make(replace(TOY, images=Images(state=(0, 2)))), r"places of the state below 2, got \[0, 2\]"),
    (lambda: make(Custom(factory="toy_env:make_blind_point", images=SEEN)), "has the render mode None; images need"),
    (lambda: make(replace(TOY, images=None)).frame(), "made without rendering; give its environment images to film it"),
    (lambda: RobotBC(base="a", environment=TOY), "encoder and environment.images go together"),
    (lambda: RobotBC(base="a", environment=replace(TOY, images=None), encoder=SMALL), "go together: set both"),
    (lambda: RobotBC(base="a", environment=TOY, encoder=SMALL, normalizers_of="b"), "that are to be composed, which"),
    (lambda: policy_actor(policy_of(), seed=0), "a policy that sees images cannot collect yet"),
    (lambda: RobotCompose(parents=("a", "b"), data="c", environment=TOY), "that see images cannot be composed yet"),
    (lambda: RobotAlign(base="a", environment=replace(TOY, images=None), algorithm=DPPO(), encoder="frozen"),
     "frozen is for a policy that sees images"),
    (lambda: ExportedPolicy(policy_of()), "a policy that sees images cannot be exported yet"),
])
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
