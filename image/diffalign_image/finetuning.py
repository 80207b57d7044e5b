"""The job that fine-tunes a pretrained diffusers pipeline on a reward.

Legend: P prompts x G images of each = B rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from diffalign import choices
from diffalign.algorithms import Algorithm
from diffalign.diffusion import Schedule, TrainedSteps
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.likelihoods import Matching
from diffalign.rl.pooled import PooledMatching
from diffalign.spec import spec
from diffalign.train import checkpoint, distributed
from diffalign.train.on_policy import optimize
from diffalign.train.pieces import OnPolicy
from diffalign.train.run import Run
from diffalign.train.state import Iteration, TrainState
from diffalign_image.geometry import Geometry, solve
from diffalign_image.guards import Guard, Watch
from diffalign_image.pipeline_source import PipelineSource, scored_steps
from diffalign_image.pretrained import Model, Pretrained, report
from diffalign_image.prompts import Prompt, read_prompts
from diffalign_image.rewards import TrainingReward
from diffalign_image.runs import chosen_sampler, drive, newest_checkpoint, refuse_critic, require_positive
from diffalign_image.throughput import Utilization


@spec
class PromptEvaluation:
    """How the job is evaluated: the first `count` prompts of a file, G images of each, by the ODE; seed fixes noise.

    prompts: a file of held-out prompts; null takes the training prompts, and then no claim of generalization is made.
    kl_images: how many chains estimate the KL to the base; 0 for none.
    """

    prompts: str | None = None
    count: int = 16
    images_per_prompt: int = 2
    seed: int = 1000
    kl_images: int = 8

    def __post_init__(self) -> None:
        if self.count < 2 or self.images_per_prompt < 1 or self.kl_images < 0 or self.kl_images == 1:
            raise ValueError("need count >= 2 (an interval needs two prompts), images_per_prompt >= 1 and kl_images 0 "
                             f"or >= 2, got {self.count}, {self.images_per_prompt} and {self.kl_images}")


@spec
class ImageFinetune:
    """Policy optimization of a pretrained text-to-image pipeline on a reward, with LoRA or of all weights.

    prompts: a text file with one prompt a line, or JSONL with `prompt` and `metadata`; every prompt is drawn once
    before any is drawn again. One iteration makes prompts_per_update x images_per_prompt images; with shared_noise
    those of a prompt start from the same noise. kernel, schedule and trained are the sampler of the rollouts;
    evaluations sample the ODE on the same schedule. peak_tflops: of a device, in 10^12 FLOP/s, for `mfu` in
    throughput.jsonl; null knows H100 and H200. reward_workers: threads that measure rewards while the next
    prompts' images are drawn, 0 for none; more than 1 only for rewards that may run side by side, a service for
    example.
    """

    type: Literal["image_finetune"] = "image_finetune"
    seed: int = 0
    model: Model
    prompts: str
    reward: TrainingReward
    algorithm: Algorithm
    kernel: choices.Kernel
    schedule: Schedule
    trained: TrainedSteps = TrainedSteps()
    prompts_per_update: int = 8
    images_per_prompt: int = 8
    shared_noise: bool = False
    reward_workers: int = 1
    peak_tflops: float | None = None
    guard: Guard = Guard()
    iterations: int
    evaluation: PromptEvaluation = PromptEvaluation()
    evaluate_every: int | None = None
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        pieces = self.algorithm.compose()
        pieces.require_steering(None)
        refuse_critic(self.algorithm)
        switches = self.model.guidance
        if switches and switches.sampling != switches.likelihood and "density" in pieces.likelihood.provides:
            raise ValueError(f"algorithm {self.algorithm.type} compares densities of the chain that drew the images: "
                             "model.guidance.sampling and model.guidance.likelihood must be the same, got "
                             f"{switches.sampling} and {switches.likelihood}; or use a matching method (awm, nft)")
        if self.guard.stop.kl_nats and not self.kernel.stochastic:
            raise ValueError(f"guard.stop.kl_nats needs a sampler with noise, got {self.kernel}; use "
                             "guard.stop.velocity_ratio")
        if self.reward_workers < 0:
            raise ValueError(f"reward_workers must be at least 0, got {self.reward_workers}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops must be positive or null, got {self.peak_tflops}")
        self._pieces()
        require_positive(self, "prompts_per_update", "images_per_prompt", "iterations", "checkpoint_every",
                         "evaluate_every")

    @property
    def shards(self) -> bool:
        """Whether training spreads the model over the processes."""
        return self.model.shard

    def train(self, run: Run) -> None:
        """Fine-tune or go on, with evaluations before, during and after; ends with lora/ or pipeline/.

        Raises: ValueError for a model that is to be sharded over one process.
        """
        if self.shards and distributed.world_size() == 1:
            raise ValueError("model.shard: true spreads the weights over several processes, got 1; start it by "
                             "`torchrun --nproc_per_node N -m -- diffalign train ...`, or set it to false")
        prompts, held_out, pieces = read_prompts(self.prompts), self._evaluation_prompts(), self._pieces()
        model, plan = self._load(), pieces.optimization
        geometry = self.geometry(model.policy, distributed.world_size())
        state = TrainState.create({"policy": model.trained}, {"policy": plan.learning_rate},
                                  weight_decay=plan.weight_decay, ema_decay=plan.ema_decay, seed=self.seed)
        source = PipelineSource(model, prompts, self.reward, geometry, state, self.seed, self.reward_workers,
                                self.shared_noise, self.guard)
        run.write_json("geometry.json", geometry.as_dict())
        run.say(str(geometry))
        reference = None if model.references is None else model.references[1]
        watch = Watch(self.guard.stop, list(self.guard.held_out or {}), first_evaluation(run))

        def report_as(name: str) -> None:
            if distributed.leads() or self.shards:  # all must ask a sharded network
                with state.ema_modules():
                    result = self._evaluated(model, held_out, self.evaluation)
                    report(model, run, name, result, held_out, state.step, seed=self.evaluation.seed)
                watch.evaluation(result)
            source.watch.take(0, 1)  # evaluations are no part of an iteration's time

        def timed() -> Iterator[Iteration]:
            loop = optimize(pieces, model.policy, source, state, reference=reference)
            used = Utilization(self.peak_tflops)
            while True:
                with used.counting():
                    iteration = next(loop)
                times = source.watch.take(geometry.images, geometry.processes)
                run.clock(iteration.step, {**times, **used.of(times["iteration_ms"] / 1000)})
                yield iteration

        def halted(iteration: Iteration) -> str | None:
            watch.iteration(iteration.metrics)
            return distributed.from_leader(watch.reason)

        drive(run, state, timed(), report_as, iterations=self.iterations, evaluate_every=self.evaluate_every,
              checkpoint_every=self.checkpoint_every, halted=halted)
        model.save(run, state)
        distributed.barrier()

    def geometry(self, policy: DiffusionPolicy, processes: int) -> Geometry:
        """How an update is spread over processes and memory. Raises: ValueError if they cannot share the prompts."""
        pieces = self._pieces()
        plan, likelihood = pieces.optimization, pieces.likelihood
        if isinstance(likelihood, Matching):
            rows = likelihood.draws
        else:
            rows = 1 if isinstance(likelihood, PooledMatching) else scored_steps(policy)
        return solve(prompts=self.prompts_per_update, images_per_prompt=self.images_per_prompt, processes=processes,
                     batch_rows=self.model.batch_rows, microbatch_rows=plan.microbatch_rows, rows_per_image=rows,
                     epochs=plan.epochs, minibatches=plan.minibatches)

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: str | None) -> dict[str, Any]:
        """Reward and KL of the newest checkpoint; episodes = number of images."""
        plan = replace(self.evaluation, seed=seed)
        if episodes is not None:
            plan = replace(plan, count=max(2, episodes // plan.images_per_prompt))
        return self._evaluated(self._restored(run), self._evaluation_prompts(), plan, sampler)

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """Grids for the same prompts and noise: the base, where there is one to compare with, and the model."""
        model, prompts = self._restored(run), self._evaluation_prompts()
        before = [] if model.references is None else model.grid(prompts, out, "before", seed=seed, count=count,
                                                                base=True)
        return [*before, *model.grid(prompts, out, "after", seed=seed, count=count)]

    def _pieces(self) -> OnPolicy:
        return replace(self.algorithm.compose(), reference_target=self.guard.kl_target)

    def _load(self) -> Pretrained:
        keep = self._pieces().needs_reference or self.evaluation.kl_images > 0 or self.guard.images > 0
        return Pretrained.load(self.model, self.schedule, self.kernel, self.trained, seed=self.seed,
                               keep_reference=keep)

    def _restored(self, run: Run) -> Pretrained:
        model = self._load()
        checkpoint.load_modules(newest_checkpoint(run), {"policy": model.trained}, prefer_ema=True)
        return model

    def _evaluation_prompts(self) -> list[Prompt]:
        return read_prompts(self.evaluation.prompts or self.prompts)

    def _evaluated(self, model: Pretrained, prompts: list[Prompt], plan: PromptEvaluation, sampler: str | None = None
                   ) -> dict[str, Any]:
        chosen = chosen_sampler(sampler, stochastic=self.kernel.stochastic)
        result = model.evaluate(prompts[: plan.count], self.reward, images_per_prompt=plan.images_per_prompt,
                                seed=plan.seed, kl_images=plan.kl_images, sampler=chosen, held_out=self.guard.held_out,
                                clip=self.guard.diversity_clip)
        return {**result, "split": "training prompts" if self.evaluation.prompts is None else "held_out"}


def first_evaluation(run: Run) -> dict[str, Any] | None:
    """What the run's evaluation before training found, if there was one."""
    file = run.path / "evaluations" / "before.json"
    return dict(json.loads(file.read_text())) if file.is_file() else None
