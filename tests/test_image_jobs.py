"""The diffusers model, its pipeline folder, the prompt source, and both image jobs from end to end on tiny settings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import train_until

from diffalign import config
from diffalign.algorithms import AWM, DDPO, DPO, DPPO, FlowGRPO, NoisePPO, SePPO
from diffalign.diffusion import CPS, ODE, FlowPath, Schedule
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.surrogates import PPOClip
from diffalign.train.consistency import Distillation
from diffalign.train.on_policy import Optimization
from diffalign.train.run import Run
from diffalign.train.supervised import Pretraining
from diffalign_image import pipeline
from diffalign_image.autoencoder import (
    AutoencoderTraining,
    build_autoencoder,
    decode_latents,
    encode_images,
    freeze,
)
from diffalign_image.evaluate import Evaluation, draw, evaluate, path_kl, pick_captions
from diffalign_image.jobs import (
    ImageAlign,
    ImageBestOf,
    ImageCompose,
    ImageDistill,
    ImagePreference,
    ImagePretrain,
    ImageSuperpose,
)
from diffalign_image.model import ShapesModel, build
from diffalign_image.pipeline import Parts, ShapesPipeline
from diffalign_image.preference import BestAndWorst, Renders, best_and_worst
from diffalign_image.rewards import Jpeg, PythonFunction, Verifiable
from diffalign_image.runs import Models, newest_checkpoint
from diffalign_image.shapes import parse, training_batch
from diffalign_image.source import training_prompts
from diffalign_image.text import encode_captions

Job = ImagePretrain | ImageDistill | ImageAlign | ImagePreference | ImageCompose | ImageSuperpose | ImageBestOf
TINY = ShapesModel(width=32, layers=2, patch=4, text_channels=32, text_layers=1)
SMALL = AutoencoderTraining(latent_channels=2, channels=(8, 8, 8), steps=3, batch_size=4)
EVENT = (2, 8, 8)
QUICK = Evaluation(prompts=3, images_per_prompt=2, kl_images=2)
CAPTIONS = ["a red circle above a blue square", "a yellow square left of a green triangle"]


@pytest.fixture(scope="module")
def parts() -> Parts:
    joint, tokenizer = build(TINY, 2, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the untrained velocity is zero
        for parameter in joint.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Parts(joint.denoiser.eval(), freeze(build_autoencoder(SMALL, seed=0)), joint.text_encoder.eval(), tokenizer)


def policy_of(parts: Parts, steps: int = 4, shift: float = 1.0) -> DiffusionPolicy:
    return DiffusionPolicy(parts.denoiser, FlowPath(), CPS(noise_level=0.7), Schedule(steps=steps, shift=shift), EVENT)


def pretraining_job(steps: int = 3) -> ImagePretrain:
    return ImagePretrain(autoencoder=SMALL, model=TINY, pool_images=8,
                         pretraining=Pretraining(steps=steps, batch_size=4, warmup_steps=1),
                         schedule=Schedule(steps=3), evaluation=QUICK, log_every=1, checkpoint_every=2)


def alignment_job(base: Path, iterations: int, **changes: object) -> ImageAlign:
    plan = Optimization(learning_rate=1e-3, minibatches=2, microbatch_rows=8, ema_decay=0.5)
    job = ImageAlign(base=str(base), reward=Jpeg(), schedule=Schedule(steps=3), prompts_per_update=2,
                     images_per_prompt=3, iterations=iterations, evaluation=QUICK, evaluate_every=1, checkpoint_every=1,
                     algorithm=FlowGRPO(surrogate=PPOClip(low=0.5, high=0.5), reference_kl=0.01, optimization=plan))
    return replace(job, **changes)


def start(path: Path, job: Job, *, resume: bool = False) -> Run:
    run = Run.create(path, config.dump(job), resume=resume)
    job.train(run)
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("image") / "base", pretraining_job()).path


def lines(path: Path, phase: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == phase]


ABOVE, LEFT = "a red circle above a blue square", "a red circle left of a blue square"


BRIGHT = """\
def of(images, captions, metadata):  # brighter is better for "left of", darker for "above"
    bright = images.float().flatten(1).mean(1) - 100
    return [float(b if "left" in caption else -b) for b, caption in zip(bright, captions)]
"""


def superposition_job(base: Path, **changes: object) -> ImageSuperpose:
    job = ImageSuperpose(parents=(str(base),), operator="and", captions=((ABOVE, LEFT), (LEFT, ABOVE)), images=2,
                         reward=Jpeg(), schedule=Schedule(steps=3))
    return replace(job, **changes)


def test_a_superposition_draws_every_way_of_sampling(base: Path, tmp_path: Path) -> None:
    """Of one caption twice, AND, OR and the average are that caption alone; of two captions they differ from it."""
    for operator in ("and", "or"):
        once = superposition_job(base, operator=operator, captions=((ABOVE, ABOVE), (LEFT, LEFT)))
        run = start(tmp_path / operator, once)
        rewards = {file.stem: json.loads(file.read_text())["rewards"] for file in (run.path / "evaluations").iterdir()}
        assert rewards.keys() == {"alone_0", "alone_1", "average", "after"}
        for other in ("alone_1", "average", "after"):
            for name, value in rewards["alone_0"].items():
                assert rewards[other][name]["mean"] == pytest.approx(value["mean"], abs=1e-4)
    job = superposition_job(base)
    run = start(tmp_path / "two", job)
    results = {file.stem: json.loads(file.read_text()) for file in (run.path / "evaluations").iterdir()}
    assert len({results[name]["rewards"]["together"]["mean"] for name in results}) == 4
    lone = superposition_job(base, captions=((ABOVE, ABOVE), (LEFT, LEFT)))  # alone_0 knows nothing of the others
    same = start(tmp_path / "lone", lone)
    first = json.loads((same.path / "evaluations" / "alone_0.json").read_text())["rewards"]["caption_0"]["mean"]
    assert results["alone_0"]["rewards"]["caption_0"]["mean"] == pytest.approx(first, abs=1e-6)
    assert {**job.evaluate(run, seed=0, episodes=None, sampler=None), "step": 3} == results["after"]
    assert len(job.sample(run, tmp_path, seed=0, count=2)) == 4


def test_together_is_the_worst_caption_for_and_the_best_for_or(base: Path, tmp_path: Path) -> None:
    """Of the same images both count differently; two models are asked one caption of an entry each."""
    moved = start(tmp_path / "moved", alignment_job(base, 2)).path
    (tmp_path / "bright.py").write_text(BRIGHT)
    reward, scores = PythonFunction(function=f"{tmp_path / 'bright.py'}:of"), {}
    for operator in ("and", "or"):
        job = superposition_job(base, operator=operator, parents=(str(base), str(moved)), reward=reward, images=6)
        result = start(tmp_path / operator, job).path / "evaluations" / "alone_1.json"
        scores[operator] = {name: r["mean"] for name, r in json.loads(result.read_text())["rewards"].items()}
    each = [scores["and"][name] for name in ("caption_0", "caption_1")]
    assert each == [scores["or"][name] for name in ("caption_0", "caption_1")]  # the same images
    assert scores["and"]["together"] < min(each) < max(each) < scores["or"]["together"]
    assert sum(each) == pytest.approx(scores["and"]["together"] + scores["or"]["together"])  # min + max of two


@pytest.mark.parametrize(("changes", "message"), [
    ({"captions": ((ABOVE, LEFT),)}, "at least two entries"),
    ({"captions": ((ABOVE, LEFT), (ABOVE,))}, r"got 2 entries with \[1, 2\] captions"),
    ({"parents": ("a", "b", "c")}, "one model or one for each of the 2 captions of an entry, got 3"),
    ({"kernel": ODE()}, "is deterministic and states no density"), ({"images": 0}, "images must be at least 1, got 0")])
def test_superpositions_that_cannot_be_drawn_are_refused(base: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        superposition_job(base, **changes)


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_saved_pipeline_draws_what_the_core_draws(parts: Parts, tmp_path: Path, shift: float) -> None:
    policy = policy_of(parts, steps=5, shift=shift).with_sampler(ODE())
    cond = encode_captions(parts.tokenizer, parts.text_encoder, CAPTIONS)
    noise = torch.randn(2, *EVENT, generator=torch.Generator().manual_seed(7))
    expected = policy.act(cond, generator=torch.Generator().manual_seed(7)).action
    folder = pipeline.save(parts, tmp_path / "pipeline", shift=shift)
    names = {"model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert names <= {path.name for path in folder.iterdir()}
    loaded = ShapesPipeline.from_pretrained(folder)
    images = loaded(CAPTIONS, num_inference_steps=5, noise=noise, output_type="pt").images
    torch.testing.assert_close(images, decode_latents(parts.autoencoder, expected), atol=1e-4, rtol=0)
    assert (images[0] - images[1]).abs().max() > 1e-3
    pictures = loaded(CAPTIONS[0], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert pictures[0].size == (32, 32)
    with pytest.raises(ValueError, match="unknown words"):
        loaded("a red elephant")
    with pytest.raises(ValueError, match="output_type must be"):
        loaded(CAPTIONS[0], output_type="latent")


def test_conditioning_reaches_the_velocity_through_both_ways(parts: Parts) -> None:
    cond = encode_captions(parts.tokenizer, parts.text_encoder, CAPTIONS)
    x, t = torch.zeros(2, *EVENT), torch.tensor([0.5, 0.5])
    both = parts.denoiser(x, t, cond)
    for leaf in ("text", "pooled"):
        changed = parts.denoiser(x, t, {**cond, leaf: cond[leaf].flip(0)})
        assert (both - changed).abs().max() > 1e-4
    assert (both - parts.denoiser(x, torch.tensor([0.9, 0.9]), cond)).abs().max() > 1e-4


def test_latents_are_scaled_and_decode_inverts_the_scaling(parts: Parts) -> None:
    images, _ = training_batch(512, torch.Generator().manual_seed(0))
    latents = encode_images(parts.autoencoder, images)
    assert latents.shape == (512, 2, 8, 8)
    assert abs(float(latents.mean())) < 1e-4
    assert abs(float(latents.std()) - 1) < 1e-3
    vae = parts.autoencoder
    with torch.no_grad():
        direct = vae.decode(vae.encode(images[:4]).latent_dist.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(vae, latents[:4]), direct, atol=1e-5, rtol=0)


def test_building_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, _ = build(TINY, 2, seed=0)
    assert torch.equal(torch.rand(3), expected)
    same, other = build(TINY, 2, seed=0)[0], build(TINY, 2, seed=1)[0]
    weights = [next(m.denoiser.parameters()) for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_source_groups_by_prompt_and_repeats_with_its_generator(parts: Parts) -> None:
    source = training_prompts(parts, Verifiable(), prompts=3, images_per_prompt=2)
    assert not any(parse(caption).held_out for caption in source.captions)
    policy = policy_of(parts)

    def rollout(seed: int):  # type: ignore[no-untyped-def]
        return source.collect(policy, generator=torch.Generator().manual_seed(seed))

    one, same = rollout(0), rollout(0)
    assert one.reward.shape == (1, 6)
    assert torch.equal(one.trajectory.x, same.trajectory.x)
    assert one.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(one.prompt.tolist())) == 3
    assert torch.equal(one.prompt[::2], one.prompt[1::2])
    assert torch.equal(one.trajectory.cond["pooled"], source.cond["pooled"][one.prompt])
    captions = [source.captions[i] for i in one.prompt.tolist()]
    torch.testing.assert_close(one.reward[0], Verifiable()(source.decode(one.trajectory.sample), captions))
    assert set(one.stats) == {"samples/verifiable", "samples/jpeg_kb"}
    assert one.terminated.all()
    with pytest.raises(ValueError, match="prompts_per_update must lie in"):
        replace(source, prompts=10**6)


def test_shared_noise_starts_the_images_of_a_prompt_alike(parts: Parts) -> None:
    source = training_prompts(parts, Verifiable(), prompts=3, images_per_prompt=2, shared_noise=True)
    start = source.collect(policy_of(parts), generator=torch.Generator().manual_seed(0)).trajectory.x[:, 0]
    assert torch.equal(start[::2], start[1::2])
    assert (start[0] - start[2]).abs().max() > 0.1
    ended = source.collect(policy_of(parts), generator=torch.Generator().manual_seed(0)).trajectory.sample
    assert (ended[0] - ended[1]).abs().max() > 1e-3
    apart = replace(source, shared_noise=False)
    start = apart.collect(policy_of(parts), generator=torch.Generator().manual_seed(0)).trajectory.x[:, 0]
    assert (start[0] - start[1]).abs().max() > 0.1


def test_path_kl_is_zero_at_the_reference_and_the_sum_of_step_kls_elsewhere(parts: Parts) -> None:
    policy = policy_of(parts, steps=3)
    cond = encode_captions(parts.tokenizer, parts.text_encoder, CAPTIONS)
    assert path_kl(policy, parts.denoiser, cond, seed=0).abs().max() == 0

    class Shifted(torch.nn.Module):
        prediction = "flow"

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
            return parts.denoiser(x, t, cond) + 0.01

    found = path_kl(policy, Shifted(), cond, seed=0)
    # v + d moves x0 by -t d and eps by (1 - t) d: mean' - mean = (t' cos (1 - t) - (1 - t') t) d, std = t' sin
    angle = torch.tensor(0.7 * torch.pi / 2)
    times = policy.schedule.times()
    t, t_next = times[:2], times[1:3]
    gap = (t_next * angle.cos() * (1 - t) - (1 - t_next) * t) * 0.01
    expected = (128 * gap**2 / (2 * (t_next * angle.sin()) ** 2)).sum()
    torch.testing.assert_close(found, expected.expand(2), rtol=2e-3, atol=0)


def test_evaluation_states_what_it_is_and_holds_out_captions(parts: Parts) -> None:
    result = evaluate(policy_of(parts), parts, QUICK, reference=parts.denoiser)
    assert set(result["rewards"]) == {"verifiable", "jpeg_kb"}
    low, high = result["rewards"]["jpeg_kb"]["interval"]
    assert low < result["rewards"]["jpeg_kb"]["mean"] < high
    assert (result["split"], result["prompts"], result["images"], result["seed"]) == ("held_out", 3, 6, 1000)
    assert result["sampler"] == "ode(4 steps, shift 1, deterministic)"
    assert result["kl_nats"] == 0
    assert result["kl_sampler"].startswith("cps(")
    assert all(parse(caption).held_out for caption in pick_captions(QUICK))
    assert not any(parse(caption).held_out for caption in pick_captions(replace(QUICK, split="train")))
    stochastic = evaluate(policy_of(parts), parts, QUICK, sampler="stochastic")
    assert "stochastic" in stochastic["sampler"]
    assert "kl_nats" not in stochastic
    for wrong in ({"prompts": 1}, {"prompts": 10**4}, {"images_per_prompt": 0}, {"kl_images": 1}):
        with pytest.raises(ValueError, match="got"):
            replace(QUICK, **wrong)


def test_drawing_repeats_and_does_not_depend_on_other_captions(parts: Parts) -> None:
    policy = policy_of(parts).with_sampler(ODE())
    one = draw(policy, parts, CAPTIONS, seed=3).images
    assert torch.equal(one, draw(policy, parts, CAPTIONS, seed=3).images)
    assert not torch.equal(one, draw(policy, parts, CAPTIONS, seed=4).images)


def test_pretraining_writes_a_complete_run_and_resumes_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    expected = {"config.yaml", "metrics.jsonl", "checkpoints", "environment.json", "evaluations", "samples", "pipeline"}
    assert expected <= {path.name for path in base.iterdir()}
    assert [record["step"] for record in lines(base, "train")] == [1, 2, 3]
    assert json.loads((base / "evaluations" / "after.json").read_text())["step"] == 3

    job, path = pretraining_job(), tmp_path / "killed"
    train_until(path, job, 3)
    start(path, job, resume=True)
    finished, resumed = pipeline.load(str(base)), pipeline.load(str(path))
    for one, other in zip(finished.denoiser.parameters(), resumed.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)
    assert lines(path, "train") == lines(base, "train")


def test_alignment_moves_the_model_reports_kl_and_resumes_exactly(base: Path, tmp_path: Path) -> None:
    job = alignment_job(base, 2)
    path = start(tmp_path / "whole", job).path
    before, after = (json.loads((path / "evaluations" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before["kl_nats"] == 0
    assert after["kl_nats"] > 0
    assert (before["step"], after["step"]) == (0, 2)
    assert {path.name for path in (path / "samples").iterdir()} == {"before.png", "after.png", "step_000001.png"}
    assert [record["step"] for record in lines(path, "eval")] == [0, 1, 2]
    assert all(record["ratio_drift"] < 1e-2 for record in lines(path, "train"))

    train_until(tmp_path / "killed", job, 2)
    resumed = start(tmp_path / "killed", job, resume=True).path
    assert lines(resumed, "train") == lines(path, "train")
    again = json.loads((resumed / "evaluations" / "after.json").read_text())
    assert again == after
    later = job.evaluate(Run(path), seed=QUICK.seed, episodes=None, sampler=None)
    assert {**later, "step": 2} == after
    pictures = job.sample(Run(path), tmp_path, seed=0, count=3)
    assert [picture.name for picture in pictures] == ["before.png", "after.png"]
    fewer = job.evaluate(Run(path), seed=1, episodes=4, sampler="stochastic")
    assert (fewer["prompts"], fewer["images"], fewer["seed"]) == (2, 4, 1)


@pytest.mark.parametrize("algorithm", [DDPO(), AWM()])
def test_other_algorithms_run_on_images(base: Path, tmp_path: Path, algorithm: DDPO | AWM) -> None:
    path = start(tmp_path / "run", alignment_job(base, 1, algorithm=algorithm, evaluate_every=None)).path
    assert len(lines(path, "train")) == 1
    assert json.loads((path / "evaluations" / "after.json").read_text())["kl_nats"] > 0


def test_a_second_stage_is_measured_against_the_first_ones_base(base: Path, tmp_path: Path) -> None:
    first = start(tmp_path / "first", alignment_job(base, 2)).path
    second = start(tmp_path / "second", alignment_job(first, 1, reference=str(base))).path
    moved = lines(first, "eval")[-1]["kl_nats"]
    assert moved > 0
    assert lines(second, "eval")[0]["kl_nats"] == moved
    alone = start(tmp_path / "alone", alignment_job(first, 1)).path
    assert lines(alone, "eval")[0]["kl_nats"] == 0


def test_steering_moves_the_noise_alone_and_reports_its_kl(base: Path, tmp_path: Path) -> None:
    """Resumed after a kill it gives the same numbers; the KL of the ODE chain is that of its start, without an SDE."""
    plan = Optimization(learning_rate=1e-2, ema_decay=0.5)
    job = alignment_job(base, 2, algorithm=NoisePPO(optimization=plan), steering=(8,), kernel=ODE())
    run = start(tmp_path / "run", job)
    folder = run.path / "evaluations"
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before["kl_nats"] == 0
    assert after["kl_nats"] > 0
    assert all(record["ratio_drift"] == 0 for record in lines(run.path, "train"))
    models = Models.load(str(base), job.schedule, job.kernel, steering=job.steering)
    untrained = models.parts.denoiser.state_dict()
    for name, tensor in models.restore(run).parts.denoiser.state_dict().items():
        assert torch.equal(tensor, untrained[name])
    assert {**job.evaluate(run, seed=QUICK.seed, episodes=None, sampler=None), "step": 2} == after
    assert not (run.path / "pipeline").exists()
    shutil.rmtree(newest_checkpoint(run))  # as if it had been killed before it wrote the last one
    start(run.path, job, resume=True)
    assert json.loads((folder / "after.json").read_text()) == after
    for changes, message in (({"steering": None}, "needs a learned initial noise"),
                             ({"shared_noise": True}, "shared_noise must be false"),
                             ({"algorithm": DDPO()}, "cannot use a learned initial noise")):
        with pytest.raises(ValueError, match=message):
            replace(job, **changes)


def test_composition_searches_weights_and_evaluates_parents_alike(base: Path, tmp_path: Path) -> None:
    moved = start(tmp_path / "moved", alignment_job(base, 2)).path
    job = ImageCompose(parents=(str(base), str(moved)), reward=Jpeg(), schedule=Schedule(steps=3), grid=2, images=4,
                       evaluation=QUICK)
    path = start(tmp_path / "run", job).path
    found = json.loads((path / "composition.json").read_text())
    tried = {tuple(entry["candidate"]) for entry in found["search"]}
    assert tried == {(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), tuple(found["closed_form"])}
    assert tuple(found["weights"]) in tried
    assert found["disagreement"] > 0
    results = {file.stem: json.loads(file.read_text()) for file in (path / "evaluations").iterdir()}
    assert results.keys() == {"parent_0", "parent_1", "after"}
    again = job.evaluate(Run(path), seed=QUICK.seed, episodes=None, sampler=None)
    assert {**again, "step": 2} == results["after"]
    record = path / "composition.json"
    record.write_text(json.dumps({**found, "weights": [0.0, 1.0]}))  # the composition of one is that one
    alone = job.evaluate(Run(path), seed=QUICK.seed, episodes=None, sampler=None)["rewards"]
    for name, value in results["parent_1"]["rewards"].items():
        assert alone[name]["mean"] == pytest.approx(value["mean"], abs=1e-4)
    assert len(job.sample(Run(path), tmp_path, seed=0, count=2)) == 3
    other = start(tmp_path / "other", replace(pretraining_job(), seed=5)).path
    with pytest.raises(ValueError, match="has another autoencoder than"):
        start(tmp_path / "refused", replace(job, parents=(str(base), str(other))))
    with pytest.raises(ValueError, match="at least two parents"):
        replace(job, parents=(str(base),))
    record.unlink()
    with pytest.raises(ValueError, match="diffalign compose"):
        job.evaluate(Run(path), seed=0, episodes=None, sampler=None)


def test_the_best_of_n_is_picked_from_n_draws_of_the_same_caption(base: Path, tmp_path: Path) -> None:
    """n = 1 is the model itself; the kept reward grows with n; n = 3 by brute force over the same draws."""
    job = ImageBestOf(base=str(base), reward=Jpeg(), candidates=(1, 3), schedule=Schedule(steps=3), evaluation=QUICK)
    path = start(tmp_path / "run", job).path
    one, three = (json.loads((path / "evaluations" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert (one["kl_nats"], three["drawn"], three["images"]) == (0, 18, 6)
    assert three["kl_nats"] == pytest.approx(1.0986123 - 2 / 3)
    assert three["rewards"]["jpeg_kb"]["mean"] < one["rewards"]["jpeg_kb"]["mean"]
    models = Models.load(str(base), job.schedule, CPS())
    captions = [c for c in pick_captions(QUICK) for _ in range(6)]
    drawn = draw(models.policy.with_sampler(ODE()), models.parts, captions, seed=QUICK.seed)
    kept = -Jpeg()(drawn.images, captions).reshape(6, 3)
    assert three["rewards"]["jpeg_kb"]["mean"] == pytest.approx(float(kept.amin(1).mean()))
    assert job.evaluate(Run(path), seed=QUICK.seed, episodes=6, sampler=None) == {
        name: value for name, value in three.items() if name != "step"}
    assert job.sample(Run(path), tmp_path, seed=0, count=4)[0].name == "best_of_3.png"
    for wrong in ((), (0, 2), (4, 2), (2, 2)):
        with pytest.raises(ValueError, match="increasing numbers"):
            replace(job, candidates=wrong)


def preference_job(base: Path, steps: int, **changes: object) -> ImagePreference:
    fitting = Pretraining(steps=steps, batch_size=4, warmup_steps=1, learning_rate=1e-3, ema_decay=0.5)
    job = ImagePreference(base=str(base), algorithm=SePPO(beta=5.0, snapshot_every=1, fitting=fitting),
                          data=Renders(images=8), schedule=Schedule(steps=3), evaluation=QUICK, evaluate_every=2,
                          checkpoint_every=1)
    return replace(job, **changes)


def test_preference_learning_moves_the_model_and_resumes_exactly(base: Path, tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", preference_job(base, 4))
    assert [line["step"] for line in lines(whole.path, "eval")] == [0, 2, 4]
    assert lines(whole.path, "eval")[-1]["kl_nats"] > 0
    assert (whole.path / "pipeline" / "model_index.json").is_file()
    part = start(tmp_path / "part", preference_job(base, 4))
    shutil.rmtree(part.path / "checkpoints" / "step_00000004")  # as if killed before the last checkpoint
    preference_job(base, 4).train(Run(part.path))
    first, second = (Models.load(str(base), Schedule(steps=3), CPS()).restore(run).parts.denoiser.state_dict()
                     for run in (whole, part))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines(whole.path, "eval")[-1] == lines(part.path, "eval")[-1]


def test_opponents_are_drawn_with_steps_of_their_own_and_evaluations_are_not(base: Path, tmp_path: Path) -> None:
    """Of another count of steps the losers differ and nothing else: the first evaluation is the same."""
    runs = [start(tmp_path / name, preference_job(base, 2, opponents=opponents, evaluate_every=None)).path
            for name, opponents in (("none", None), ("same", Schedule(steps=3)), ("more", Schedule(steps=6)))]
    before = [json.loads((run / "evaluations" / "before.json").read_text()) for run in runs]
    assert before[0] == before[1] == before[2]
    kl = [json.loads((run / "evaluations" / "after.json").read_text())["kl_nats"] for run in runs]
    assert kl[0] == kl[1] != kl[2]


def test_pairs_are_the_best_and_the_worst_of_their_caption(base: Path) -> None:
    models = Models.load(str(base), Schedule(steps=3), CPS())
    plan = BestAndWorst(reward=Jpeg(), prompts=5, samples_per_prompt=4)
    pairs = best_and_worst(plan, models, torch.Generator().manual_seed(0))
    best, worst = (Jpeg()(decode_latents(models.parts.autoencoder, x), []) for x in (pairs.winner, pairs.loser))
    assert bool((best > worst).all())
    assert pairs.winner.shape == (5, *EVENT)
    constant = BestAndWorst(reward=Verifiable(), prompts=2, samples_per_prompt=2)
    with pytest.raises(ValueError, match="the reward is constant"):  # an untrained model shows nothing of any caption
        best_and_worst(constant, models, torch.Generator().manual_seed(0))


def test_preference_data_must_fit_the_algorithm(base: Path) -> None:
    with pytest.raises(ValueError, match="needs losers, which data of type renders have not"):
        preference_job(base, 2, algorithm=DPO())


def distillation_job(base: Path, **changes: object) -> ImageDistill:
    fitting = Pretraining(steps=3, batch_size=4, warmup_steps=1, learning_rate=1e-3, ema_decay=0.5, time="grid")
    job = ImageDistill(base=str(base), distillation=Distillation(fitting=fitting, grid=6), pool_images=8,
                       schedule=Schedule(steps=3, shift=2.0), fewer=(1,), teacher_steps=4, evaluation=QUICK,
                       checkpoint_every=1)
    return replace(job, **changes)


@pytest.fixture(scope="module")
def distilled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("distilled") / "run", distillation_job(base)).path


def test_distillation_evaluates_teacher_and_student_and_resumes_exactly(base: Path, distilled: Path, tmp_path: Path
                                                                        ) -> None:
    results = {file.stem: json.loads(file.read_text()) for file in (distilled / "evaluations").iterdir()}
    assert {name: (result["sampler"].split("(")[0], result["step"]) for name, result in results.items()} == {
        "before": ("ode", 0), "steps_1": ("cps", 3), "after": ("cps", 3)}
    assert "4 steps, shift 2" in results["before"]["sampler"]
    assert "1 steps" in results["steps_1"]["sampler"]
    assert results["before"]["end_error"] != results["after"]["end_error"] > 0
    assert lines(distilled, "eval")[-1]["end_error"] == results["after"]["end_error"]

    job, path = distillation_job(base), tmp_path / "killed"
    train_until(path, job, 3)
    start(path, job, resume=True)
    assert lines(path, "train") == lines(distilled, "train")
    assert json.loads((path / "evaluations" / "after.json").read_text()) == results["after"]
    finished, resumed = (pipeline.load(str(run), consistency=True).denoiser.state_dict() for run in (distilled, path))
    assert all(torch.equal(finished[name], resumed[name]) for name in finished)

    again = job.evaluate(Run(distilled), seed=QUICK.seed, episodes=None, sampler=None)
    assert {**again, "step": 3} == results["after"]
    assert job.evaluate(Run(distilled), seed=0, episodes=None, sampler="ode")["sampler"].startswith("ode(3 steps")
    before, after = job.sample(Run(distilled), tmp_path, seed=0, count=2)
    assert (before.name, after.name) == ("before.png", "after.png")
    assert before.read_bytes() != after.read_bytes()


def test_a_distilled_pipeline_draws_by_multistep_consistency_sampling(distilled: Path) -> None:
    parts = pipeline.load(str(distilled), consistency=True)
    policy = replace(policy_of(parts, steps=3, shift=2.0), kernel=CPS(noise_level=1.0))
    cond = encode_captions(parts.tokenizer, parts.text_encoder, CAPTIONS)
    latents = policy.act(cond, generator=torch.Generator().manual_seed(7)).action
    drawn = ShapesPipeline.from_pretrained(distilled / "pipeline")(
        CAPTIONS, num_inference_steps=3, generator=torch.Generator().manual_seed(7), output_type="pt").images
    torch.testing.assert_close(drawn, decode_latents(parts.autoencoder, latents), atol=1e-4, rtol=0)


def test_rlcm_trains_the_noisy_steps_of_a_consistency_model(distilled: Path, tmp_path: Path) -> None:
    job = alignment_job(distilled, 2, algorithm=DDPO(), kernel=CPS(noise_level=1.0), evaluate_every=None)
    run = start(tmp_path / "run", job)
    first, last = lines(run.path, "eval")
    assert (first["kl_nats"], last["kl_nats"] > 0) == (0, True)
    assert all(record["ratio_drift"] < 1e-2 for record in lines(run.path, "train"))
    models = Models.load(str(run.path), job.schedule, job.kernel, consistency=True)  # what it writes is one again
    cond = encode_captions(models.parts.tokenizer, models.parts.text_encoder, CAPTIONS)
    trajectory = models.policy.act(cond, generator=torch.Generator().manual_seed(0)).trajectory
    assert trajectory.trained.tolist() == [True, True, False]  # the last step has no noise and no density
    after = json.loads((run.path / "evaluations" / "after.json").read_text())
    assert after["sampler"] == "cps(3 steps, shift 1, stochastic)"
    assert {**job.evaluate(run, seed=QUICK.seed, episodes=None, sampler=None), "step": 2} == after


def test_a_consistency_model_is_not_taken_for_a_flow(base: Path, distilled: Path, tmp_path: Path) -> None:
    flows = (distillation_job(distilled), alignment_job(distilled, 1, algorithm=AWM()),
             ImageBestOf(base=str(distilled), reward=Jpeg(), evaluation=QUICK),
             ImageCompose(parents=(str(base), str(distilled)), reward=Jpeg(), evaluation=QUICK),
             preference_job(distilled, 1))
    for number, job in enumerate(flows):
        with pytest.raises(ValueError, match=r"is a consistency model .* which has no ODE"):
            start(tmp_path / str(number), job)
    with pytest.raises(ValueError, match="sampled by kernel"):
        start(tmp_path / "kernel", alignment_job(distilled, 1, algorithm=DDPO()))
    with pytest.raises(ValueError, match=r"is a consistency model .* which has no ODE"):
        start(tmp_path / "flow", alignment_job(base, 1, reference=str(distilled)))
    rlcm = alignment_job(distilled, 1, algorithm=DDPO(), kernel=CPS(noise_level=1.0), reference=str(base))
    with pytest.raises(ValueError, match="their chains differ before any training"):
        start(tmp_path / "reference", rlcm)


def test_distillation_refuses_what_it_cannot_learn(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"diffalign train configs/image/shapes_pretrain\.yaml --run"):
        start(tmp_path / "a", distillation_job(tmp_path / "missing"))
    for wrong, message in (({"schedule": Schedule(steps=4)}, "that divides the grid"),
                           ({"schedule": Schedule(steps=6), "fewer": (4,)}, "that divides the grid"),
                           ({"fewer": (0,)}, "fewer must be step counts"),
                           ({"fewer": (3,)}, "fewer must be step counts"),
                           ({"teacher_steps": 0}, "teacher_steps must be at least 1"),
                           ({"pool_images": 0}, "pool_images must be at least 1")):
        with pytest.raises(ValueError, match=message):
            distillation_job(base, **wrong)


def test_refusals_say_what_to_do(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a value critic"):
        alignment_job(base, 1, algorithm=DPPO())
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        alignment_job(base, 0)
    with pytest.raises(ValueError, match="evaluate_every must be at least 1"):
        alignment_job(base, 1, evaluate_every=0)
    with pytest.raises(ValueError, match=r"diffalign train configs/image/shapes_pretrain\.yaml --run"):
        start(tmp_path / "a", alignment_job(tmp_path / "missing", 1))
    with pytest.raises(ValueError, match="deterministic and has no transition density"):
        start(tmp_path / "b", alignment_job(base, 1, kernel=ODE()))
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        alignment_job(base, 1).evaluate(Run(tmp_path / "empty"), seed=0, episodes=None, sampler=None)
    with pytest.raises(ValueError, match="sampler must be"):
        pretraining_job().evaluate(Run(base), seed=0, episodes=None, sampler="zero_noise")
    for wrong in ({"width": 40}, {"text_channels": 0}, {"patch": 3}, {"layers": 0}):
        with pytest.raises(ValueError, match="got"):
            ShapesModel(**wrong)
    for wrong in ({"channels": (8, 12, 8)}, {"latent_channels": 0}, {"kl_weight": -1.0}):
        with pytest.raises(ValueError, match="got"):
            AutoencoderTraining(**wrong)
