"""Prompts and rewards as a rollout source on a pretrained pipeline; the same images on one process or on many.

Legend: P prompts x G images of each = B rows, K denoising steps, R rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from diffalign.diffusion.trajectories import DenoisingTrajectory, concatenate
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.rollouts import Rollout, image_rollout
from diffalign.train import distributed, sharding
from diffalign.train.state import TrainState
from diffalign_image.families import decode
from diffalign_image.geometry import Geometry
from diffalign_image.guards import Guard, diversity, drift, features, first_rows
from diffalign_image.pretrained import Pretrained
from diffalign_image.prompts import Prompt, positions
from diffalign_image.rewards import Combination, Reward, named_rewards
from diffalign_image.scoring import Block, score_all
from diffalign_image.throughput import Stopwatch

_MULTIPLIER = "multiplier/"  # of a constraint, in the state's counters


@dataclass(frozen=True)
class PipelineSource:
    """Draws the next P prompts, makes G images of each, rewards them; which prompts are next follows from state.step.

    The noise of an image follows from the seed, the step, its prompt's place and its number, so that it is the same on
    any number of processes. Images are drawn in blocks of prompts; while a block is drawn the rewards of earlier ones
    are measured by `workers` threads (0: at once, to the same values). With shared_noise the images of a prompt start
    from the same noise and differ by the stochastic steps alone (DanceGRPO).

    Raises: ValueError if an update would ask for more prompts than there are.
    """

    model: Pretrained
    prompts: list[Prompt]
    reward: Reward | Combination
    geometry: Geometry
    state: TrainState
    seed: int
    workers: int = 1
    shared_noise: bool = False
    guard: Guard = field(default_factory=Guard)
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        if self.geometry.prompts > len(self.prompts):
            raise ValueError(f"prompts_per_update={self.geometry.prompts} exceeds the {len(self.prompts)} prompts of "
                             "the file; lower it, or raise images_per_prompt instead")

    def collect(self, policy: DiffusionPolicy, *, generator: torch.Generator) -> Rollout:
        """One rollout of this process's share of P x G images. `generator` is not used: its draws differ by process."""
        plan, begun = self.geometry, self.state.step * self.geometry.prompts
        first = distributed.rank() * plan.prompts_per_process
        places = range(begun + first, begun + first + plan.prompts_per_process)
        drawn = _Drawn()
        values = score_all(self._blocks(policy, places, drawn), named_rewards(self.reward), self.workers, self.watch)
        path = concatenate(drawn.paths)
        device = path.x.device
        group = torch.arange(first, first + len(places), device=device).repeat_interleave(plan.images_per_prompt)
        chosen = torch.tensor(self._chosen(places), device=device).repeat_interleave(plan.images_per_prompt)
        reward, stats = self._combined({name: value.to(device) for name, value in values.items()}, group)
        share = 1 / (len(drawn.paths) * distributed.world_size())
        samples = distributed.sum_metrics({"samples/diversity": share * sum(drawn.diversity),
                                           "samples/saturated": share * sum(drawn.saturated)})
        return image_rollout(path, reward, group, chosen, {**stats, **samples, **self._drifted(policy, path)})

    def _chosen(self, places: range) -> list[int]:
        """Which prompts stand at places of the endless sequence."""
        return positions(places.start, len(places), len(self.prompts), self.seed)

    def _blocks(self, policy: DiffusionPolicy, places: range, drawn: _Drawn) -> Iterator[Block]:
        """Draw block after block, keeping the chains and what is said about the images in `drawn`."""
        drawing, shared = replace(policy, denoiser=self.model.sampling), torch.Generator()
        window = policy.window(shared.manual_seed(_seed(self.seed, self.state.step)))
        for start in range(0, len(places), self.geometry.block_prompts):
            some = places[start : start + self.geometry.block_prompts]
            prompts = [self.prompts[i] for i in self._chosen(some) for _ in range(self.geometry.images_per_prompt)]
            with self.watch.stage("sample"):
                noise = torch.cat([self._noise(policy, place) for place in some])
                decision = drawing.act(self.model.embeddings([prompt.text for prompt in prompts]), generator=shared,
                                       trained=window, noise=noise[:, 0], step_noise=noise[:, 1:])
            with self.watch.stage("decode"):
                images = decode(self.model.family, decision.action)
                group = torch.arange(len(some)).repeat_interleave(self.geometry.images_per_prompt)
                drawn.diversity.append(diversity(features(images, self.guard.diversity_clip), group))
                drawn.saturated.append(float((images.abs() > 0.99).float().mean()))
            drawn.paths.append(decision.trajectory)
            yield Block(images, prompts)

    def _noise(self, policy: DiffusionPolicy, place: int) -> Tensor:
        """The draws [G, 1 + K, *E] of the images of the prompt at a place: where a chain starts, and its steps."""
        device = next(self.model.trained.parameters()).device
        generator = torch.Generator(device).manual_seed(_seed(self.seed, place))
        noise = torch.randn(self.geometry.images_per_prompt, 1 + policy.schedule.steps, *policy.event,
                            generator=generator, device=device)
        if self.shared_noise:
            noise[:, 0] = noise[0, 0].clone()
        return noise

    def _combined(self, values: Mapping[str, Tensor], group: Tensor) -> tuple[Tensor, dict[str, float]]:
        """This process's rewards, made from those of all, and what is logged; updates the multipliers."""
        if not isinstance(self.reward, Combination):
            return values["reward"], {}
        gathered = torch.stack([distributed.gather_columns(value) for value in values.values()])
        counters = self.state.counters
        now = {name.removeprefix(_MULTIPLIER): value for name, value in counters.items()
               if name.startswith(_MULTIPLIER)}
        reward, following = self.reward.combine(gathered, distributed.gather_columns(group), now)
        counters.update({_MULTIPLIER + name: value for name, value in following.items()})
        stats = {f"reward/{name}": float(value.mean()) for name, value in zip(values, gathered, strict=True)}
        return distributed.own_columns(reward), {**stats, **{_MULTIPLIER + name: v for name, v in following.items()}}

    def _drifted(self, policy: DiffusionPolicy, path: DenoisingTrajectory) -> dict[str, float]:
        """Exact KL to the base and the ratio of velocity norms over the first images of the rollout."""
        if self.model.references is None or not self.guard.images:
            return {}
        before = distributed.rank() * len(path.x)
        count = max(0, min(self.guard.images - before, len(path.x)))
        sums = {"count": float(count), "kl": 0.0, "ours": 0.0, "theirs": 0.0}
        if count or sharding.any_sharded(self.model.trained):
            with self.watch.stage("guard"):
                found = drift(replace(policy, denoiser=self.model.sampling), self.model.references[0],
                              first_rows(path, count))
            sums |= {"kl": float(found.kl_nats.sum()), "ours": float(found.velocity.sum()),
                     "theirs": float(found.reference_velocity.sum())}
        sums = distributed.sum_metrics(sums)
        ratio = {"guard/velocity_ratio": sums["ours"] / sums["theirs"]}
        return {"guard/kl_nats": sums["kl"] / sums["count"], **ratio} if policy.kernel.stochastic else ratio


@dataclass(frozen=True)
class _Drawn:
    """What is kept of the blocks of a rollout; one entry a block."""

    paths: list[DenoisingTrajectory] = field(default_factory=list)
    diversity: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)


def scored_steps(policy: DiffusionPolicy) -> int:
    """How many of the trained steps have noise, so that a transition likelihood has a row for them."""
    mask, times = policy.window(torch.Generator()), policy.schedule.times()
    x = torch.zeros(1, *policy.event)
    moments = [policy.kernel.moments(x, x, x, *(policy.path.level(t[None], x.ndim - 1) for t in pair))
               for pair in pairwise(times)]
    return sum(bool(trained) and bool((step.std > 0).all()) for trained, step in zip(mask, moments))


def _seed(seed: int, place: int) -> int:
    return seed * 1_000_003 + place
