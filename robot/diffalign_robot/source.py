"""Environments as a rollout source: H decisions of B episodes.

Legend: H decisions, B environments, Ta actions of a chunk, Da action features.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.trajectories import concatenate
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.rollouts import Rollout
from diffalign_robot.networks import ChunkDenoiser
from diffalign_robot.vector import ChunkStep, ChunkVectorEnv


def episode_seeds(count: int, generator: torch.Generator) -> list[int]:
    """Fresh episode seeds below 2^31, all randomness from the generator."""
    return [int(s) for s in torch.randint(2**31, (count,), generator=generator).tolist()]


@dataclass(frozen=True)
class EnvSource:
    """Rolls out one episode per environment, from fresh resets whose seeds come from the generator.

    No simulator state survives a collect, so a resumed run repeats it exactly. Rewards inside a chunk are summed and
    none is counted after the episode's end; a time limit truncates and does not terminate. reward_scale multiplies
    rewards (for the critic's sake).
    """

    env: ChunkVectorEnv
    reward_scale: float = 1.0

    def collect(self, policy: DiffusionPolicy, *, generator: torch.Generator) -> Rollout:
        """Decide until every episode has ended."""
        unnormalize = chunk_denoiser(policy).action_normalizer.unnormalize
        trained = policy.trained.draw(policy.schedule.steps, generator)
        start = time.perf_counter()
        obs = torch.from_numpy(self.env.reset(episode_seeds(self.env.count, generator)))
        alive = torch.ones(self.env.count, dtype=torch.bool)
        trajectories, steps, valid, deciding = [], [], [], 0.0
        while bool(alive.any()):
            before = time.perf_counter()
            decision = policy.act({"obs": obs}, generator=generator, trained=trained)
            deciding += time.perf_counter() - before
            if decision.trajectory is None:
                raise ValueError("an environment rollout needs the policy's denoising trajectories")
            step = self.env.step(unnormalize(decision.action).numpy())
            trajectories.append(decision.trajectory)
            steps.append(step)
            valid.append(alive)
            obs = torch.from_numpy(step.obs)
            alive = alive & ~torch.from_numpy(step.terminated | step.truncated)
        total = time.perf_counter() - start
        executed = sum(int(step.executed.sum()) for step in steps)
        success = _stack(steps, "success").any(0)
        stats = {"success_rate": float(success.float().mean()), "env_steps": float(executed),
                 "return": float(_stack(steps, "reward").sum(0).mean()),
                 "episode_decisions": float(torch.stack(valid).sum(0).float().mean()),
                 "time/rollout": total, "time/policy": deciding, "env_steps_per_s": executed / total}
        number = torch.arange(self.env.count)
        return Rollout(concatenate(trajectories), self.reward_scale * _stack(steps, "reward"),
                       _stack(steps, "terminated"), _stack(steps, "truncated"), torch.stack(valid),
                       {"obs": torch.cat([torch.from_numpy(step.obs) for step in steps])}, number, number, stats)


def chunk_denoiser(policy: DiffusionPolicy) -> ChunkDenoiser:
    """The policy's denoiser, which owns the normalizers."""
    denoiser: object = policy.denoiser
    if not isinstance(denoiser, ChunkDenoiser):
        raise TypeError(f"a robot policy needs a ChunkDenoiser with its normalizers, got {type(denoiser).__name__}")
    return denoiser


def _stack(steps: list[ChunkStep], name: str) -> Tensor:
    return torch.stack([torch.from_numpy(getattr(step, name)) for step in steps])

