"""What image jobs share: models read from run folders, evaluations written into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from diffalign import choices
from diffalign.algorithms import Algorithm
from diffalign.diffusion import CPS, FlowPath, Schedule, TrainedSteps
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.normalize import Normalizer
from diffalign.policy.protocols import Denoiser
from diffalign.policy.steering import SteeredDenoiser, steered
from diffalign.train import checkpoint
from diffalign.train.run import Run
from diffalign.train.state import Iteration, TrainState, frozen_copy
from diffalign_image import pipeline
from diffalign_image.evaluate import Evaluation, Sampler, draw, evaluate, pick_captions, sampler_policy, save_grid
from diffalign_image.model import JointDenoiser, TextTransformer
from diffalign_image.pipeline import Parts
from diffalign_image.shapes import scenes
from diffalign_image.text import encode_captions

CONSISTENCY = CPS(noise_level=1.0)  # the multistep sampler of a consistency model
GRID = 32  # pictures in the grids that training writes


@dataclass(frozen=True)
class Models:
    """A policy to train or to evaluate, the text side, and the frozen denoiser that it is compared with."""

    policy: DiffusionPolicy
    parts: Parts
    reference: Denoiser

    @classmethod
    def load(cls, base: str, schedule: Schedule, kernel: choices.Kernel, trained: TrainedSteps | None = None, *,
             reference: str | None = None, steering: Sequence[int] | None = None, seed: int = 0,
             consistency: bool = False) -> Models:
        """The model of the run `base`, and frozen that of the run `reference` or the base's own.

        With steering (hidden widths) the model is frozen and its initial noise is learned from the text. consistency:
        the caller can train a consistency model, by the kernel that samples it.

        Raises: ValueError for a run that holds no model, or one that cannot be trained or compared so.
        """
        parts = pipeline.load(base, consistency=consistency)
        if parts.consistency and kernel != CONSISTENCY:
            raise ValueError(f"{base} is a consistency model, sampled by kernel {{type: cps, noise_level: 1.0}} "
                             f"alone; got {kernel}")
        held = parts.denoiser
        if reference is not None:
            other = pipeline.load(reference, consistency=parts.consistency)
            if parts.consistency and not other.consistency:
                raise ValueError(f"the base {base} is a consistency model and the reference {reference} is none: their "
                                 "chains differ before any training; take the run that image_distill made")
            held = other.denoiser
        if held.event != parts.denoiser.event:
            raise ValueError(f"the reference {reference} has latents {held.event} and the base {base} "
                             f"{parts.denoiser.event}; take the run that the base started from")
        policy, frozen = build_policy(parts.denoiser, schedule, kernel, trained), frozen_denoiser(held)
        if steering is not None:
            text = encode_captions(parts.tokenizer, parts.text_encoder, [scene.caption for scene in scenes("train")])
            normalizer = Normalizer.fit(text["text"].flatten(1))
            policy = replace(policy, denoiser=steered(policy.denoiser, policy.event, len(normalizer.shift), steering,
                                                      key="text", normalizer=normalizer, seed=seed))
        return cls(policy, parts, frozen)

    def restore(self, run: Run) -> Models:
        """The averaged weights of the run's newest checkpoint in the policy."""
        checkpoint.load_modules(newest_checkpoint(run), {"policy": self.trained}, prefer_ema=True)
        return self

    @property
    def sampler(self) -> Sampler:
        """How evaluations draw: by the ODE, a consistency model by its own kernel."""
        return "stochastic" if self.parts.consistency else "ode"

    @property
    def trained(self) -> nn.Module:
        """The module that training changes: the denoiser, or the denoiser with its noise net."""
        return cast(nn.Module, self.policy.denoiser)

    def report(self, run: Run, name: str, evaluation: Evaluation, state: TrainState) -> None:
        """Evaluate the averaged weights and write the result into the run."""
        with state.ema_modules():
            report(run, name, self.policy, self.parts, evaluation, state.step, self.reference, sampler=self.sampler)

    def save(self, run: Run, schedule: Schedule, state: TrainState) -> None:
        """Write the averaged weights as a pipeline folder; a steered model has none, its denoiser is the base's."""
        if isinstance(self.policy.denoiser, SteeredDenoiser):
            return
        with state.ema_modules():
            pipeline.save(self.parts, run.folder("pipeline"), shift=schedule.shift)

    def evaluate(self, evaluation: Evaluation, *, seed: int, images: int | None, sampler: str | None) -> dict[str, Any]:
        """Rewards and KL on held-out captions."""
        return evaluate(self.policy, self.parts, sized(evaluation, seed, images), reference=self.reference,
                        sampler=chosen_sampler(sampler or self.sampler, stochastic=self.policy.kernel.stochastic))

    def sample(self, evaluation: Evaluation, out: Path, *, seed: int, count: int) -> list[Path]:
        """Two grids for the same held-out captions and noise: the pre-trained model and the aligned one."""
        before = replace(self.policy, denoiser=self.reference)
        return [grid(policy, self.parts, evaluation, out, name, seed, count, self.sampler)
                for name, policy in (("before", before), ("after", self.policy))]


def build_policy(denoiser: TextTransformer | JointDenoiser, schedule: Schedule, kernel: choices.Kernel,
                 trained: TrainedSteps | None = None) -> DiffusionPolicy:
    """The denoiser as a policy on the flow path."""
    return DiffusionPolicy(denoiser, FlowPath(), kernel, schedule, denoiser.event, trained or TrainedSteps())


def frozen_denoiser(denoiser: TextTransformer) -> TextTransformer:
    """A detached copy, to compare with."""
    copy = frozen_copy(denoiser)
    assert isinstance(copy, TextTransformer)
    return copy


def newest_checkpoint(run: Run) -> Path:
    """The newest checkpoint of a run. Raises: ValueError naming the command that makes it."""
    found = checkpoint.latest(run.path / "checkpoints")
    if found is None:
        raise ValueError(f"{run.path} has no checkpoint yet; train it first with "
                         f"`diffalign train {run.path / 'config.yaml'} --run {run.path} --resume`")
    return found


def drive(run: Run, state: TrainState, loop: Iterator[Iteration], report: Callable[[str], None], *, iterations: int,
          evaluate_every: int | None, checkpoint_every: int,
          halted: Callable[[Iteration], str | None] = lambda iteration: None) -> None:
    """Start, or go on from the newest checkpoint, to `iterations`: log each, `report` before, during and after.

    Ends early, for good, when `halted` gives a reason after an iteration (and its evaluation); stopped.json has it.
    """
    if not run.restore(state):
        report("before")
        run.save(state)
    run.total = iterations
    while state.step < iterations and "halted" not in state.counters:
        iteration = next(loop)
        run.log(iteration.step, iteration.metrics)
        if evaluate_every and state.step % evaluate_every == 0 and state.step < iterations:
            report(f"step_{state.step:06d}")
        reason = halted(iteration)
        if reason is not None:
            state.counters["halted"] = 1.0
            run.write_json("stopped.json", {"step": state.step, "reason": reason})
            run.say(f"stopped at step {state.step}: {reason}")
        if state.step % checkpoint_every == 0 or state.step == iterations or reason is not None:
            run.save(state)
    report("after")


def refuse_critic(algorithm: Algorithm) -> None:
    """Raises: ValueError for an algorithm that needs a value critic."""
    if algorithm.compose().needs_critic:
        raise ValueError(f"algorithm {algorithm.type} needs a value critic, which image jobs do not have; "
                         "use flow_grpo, ddpo or awm, or a group or prompt_running advantage")


def require_positive(job: object, *names: str) -> None:
    """Raises: ValueError for the first named setting that is below 1; null passes."""
    for name in names:
        value = getattr(job, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1{' or null' if name == 'evaluate_every' else ''}, got {value}")


def report(run: Run, name: str, policy: DiffusionPolicy, parts: Parts, evaluation: Evaluation, step: int,
           reference: Denoiser | None = None, *, sampler: Sampler = "ode", extra: Mapping[str, float] | None = None
           ) -> None:
    """evaluations/<name>.json, with what is `extra`, a line of metrics, and samples/<name>.png."""
    result = evaluate(policy, parts, evaluation, sampler=sampler, reference=reference)
    record(run, name, {**result, **(extra or {})}, step)
    grid(policy, parts, evaluation, run.folder("samples"), name, evaluation.seed, GRID, sampler)


def record(run: Run, name: str, result: Mapping[str, Any], step: int) -> None:
    """evaluations/<name>.json and a line of metrics."""
    run.write_json(f"evaluations/{name}.json", {**result, "step": step})
    metrics = {f"{result['split']}/{reward}": values["mean"] for reward, values in result["rewards"].items()}
    metrics |= {name: result[name] for name in ("kl_nats", "diversity", "end_error") if name in result}
    run.log(step, metrics, phase="eval")


def grid(policy: DiffusionPolicy, parts: Parts, evaluation: Evaluation, folder: Path, name: str, seed: int,
         count: int, sampler: Sampler = "ode") -> Path:
    """folder/<name>.png: `count` pictures for the evaluation's captions."""
    captions = pick_captions(evaluation)
    some = [captions[i % len(captions)] for i in range(count)]
    return save_grid(draw(sampler_policy(policy, sampler), parts, some, seed=seed), folder / f"{name}.png")


def sized(evaluation: Evaluation, seed: int, images: int | None) -> Evaluation:
    """The evaluation with another seed, and with about `images` images."""
    if images is None:
        return replace(evaluation, seed=seed)
    return replace(evaluation, seed=seed, prompts=max(2, images // evaluation.images_per_prompt))


def chosen_sampler(name: str | None, *, stochastic: bool) -> Sampler:
    """The sampler of that name, the ODE by default. Raises: ValueError for one that the run cannot have."""
    if name in (None, "ode"):
        return "ode"
    if name == "stochastic" and stochastic:
        return "stochastic"
    known = "'ode' or 'stochastic'" if stochastic else "'ode'"
    raise ValueError(f"sampler must be {known} for this run, got {name!r}; zero_noise would make every image of a "
                     "caption the same")
