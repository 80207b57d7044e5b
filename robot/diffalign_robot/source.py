"""Environments as a rollout source: H decisions of B episodes.

Legend: H decisions, B environments, Ta actions of a chunk, Da action features.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.trajectories import Cond, concatenate
from diffalign.policy.compose import Composition
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.improved import ImprovedPolicy
from diffalign.policy.injection import NoisyDenoiser
from diffalign.policy.protocols import Policy
from diffalign.policy.steering import SteeredDenoiser
from diffalign.rl.rollouts import Rollout
from diffalign_robot.envs import Array
from diffalign_robot.networks import ChunkDenoiser
from diffalign_robot.queued import QueuedBase
from diffalign_robot.vector import ChunkStep, VectorEnv


def episode_seeds(count: int, generator: torch.Generator) -> list[int]:
    """Fresh episode seeds below 2^31, all randomness from the generator."""
    return [int(s) for s in torch.randint(2**31, (count,), generator=generator).tolist()]


@dataclass(frozen=True)
class EnvSource:
    """Rolls out one episode per environment, from fresh resets whose seeds come from the generator.

    No simulator state survives a collect, so a resumed run repeats it exactly. Rewards inside a chunk are summed and
    none is counted after the episode's end; a time limit truncates and does not terminate. reward_scale multiplies
    rewards (for the critic's sake). group: how many environments in a row start from the same seed and are one group
    of the rollout, for advantages that compare equal starts. A rollout holds images, or their features where the
    policy's encoder is frozen.

    Raises: ValueError if the environments do not make up whole groups.
    """

    env: VectorEnv
    reward_scale: float = 1.0
    group: int = 1

    def __post_init__(self) -> None:
        if self.group < 1 or self.env.count % self.group:
            raise ValueError(f"{self.env.count} environments do not make up groups of {self.group}; change num_envs")

    def collect(self, policy: Policy, *, generator: torch.Generator) -> Rollout:
        """Decide until every episode has ended."""
        denoiser = chunk_denoiser(policy)
        unnormalize = denoiser.action_normalizer.unnormalize
        window = policy.window(generator)
        start = time.perf_counter()
        number = torch.arange(self.env.count) // self.group
        seeds = episode_seeds(self.env.count // self.group, generator)
        rendering = deciding = 0.0

        def look(obs: Array) -> Cond:
            nonlocal rendering, deciding
            before = time.perf_counter()
            cond: Cond = shown(self.env, obs)
            rendered = time.perf_counter()
            if denoiser.frozen_encoder:
                with torch.no_grad():
                    cond = denoiser.encode(cond)
            rendering, deciding = rendering + rendered - before, deciding + time.perf_counter() - rendered
            return cond

        cond = look(self.env.reset([seeds[i] for i in number.tolist()]))
        alive = torch.ones(self.env.count, dtype=torch.bool)
        decisions, steps, valid, following = [], [], [], []
        while bool(alive.any()):
            before = time.perf_counter()
            decision = policy.act(cond, generator=generator, trained=window)
            deciding += time.perf_counter() - before
            step = self.env.step(unnormalize(decision.action).numpy())
            decisions.append(decision)
            steps.append(step)
            valid.append(alive)
            cond = look(step.obs)
            following.append(cond)
            alive = alive & ~torch.from_numpy(step.terminated | step.truncated)
        total = time.perf_counter() - start
        executed = sum(int(step.executed.sum()) for step in steps)
        success = _stack(steps, "success").any(0)
        stats = {"success_rate": float(success.float().mean()), "env_steps": float(executed),
                 "return": float(_stack(steps, "reward").sum(0).mean()),
                 "episode_decisions": float(torch.stack(valid).sum(0).float().mean()),
                 "time/rollout": total, "time/policy": deciding, "env_steps_per_s": executed / total}
        if denoiser.encoder is not None:
            stats["time/rendering"] = rendering
        signals = {name: torch.cat([d.signals[name] for d in decisions]) for name in decisions[0].signals}
        return Rollout(concatenate([d.trajectory for d in decisions]), self.reward_scale * _stack(steps, "reward"),
                       _stack(steps, "terminated"), _stack(steps, "truncated"), torch.stack(valid),
                       {name: torch.cat([part[name] for part in following]) for name in cond}, number, number, stats,
                       signals)


def shown(env: VectorEnv, obs: Array) -> dict[str, Tensor]:
    """What the environments show a policy: obs [B, Do], and image [B, V, 3, S, S] where they have cameras."""
    images = env.images()
    seen = {"obs": torch.from_numpy(obs)}
    return seen if images is None else {**seen, "image": torch.from_numpy(images)}


def chunk_denoiser(policy: Policy) -> ChunkDenoiser:
    """The denoiser that owns the normalizers: the policy's, that of its base, or the first that it composes."""
    base = policy.base if isinstance(policy, ImprovedPolicy) else policy
    base = base.chunks if isinstance(base, QueuedBase) else base
    denoiser: object = base.denoiser if isinstance(base, DiffusionPolicy) else base
    if isinstance(denoiser, Composition):
        return chunk_denoiser(denoiser.policies[0])
    if isinstance(denoiser, SteeredDenoiser | NoisyDenoiser):
        denoiser = denoiser.denoiser
    if not isinstance(denoiser, ChunkDenoiser):
        raise TypeError(f"a robot policy needs a ChunkDenoiser with its normalizers, got {type(denoiser).__name__}")
    return denoiser


def _stack(steps: list[ChunkStep], name: str) -> Tensor:
    return torch.stack([torch.from_numpy(getattr(step, name)) for step in steps])

