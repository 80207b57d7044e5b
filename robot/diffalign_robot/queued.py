"""A frozen chunk policy as a part of the environment: decisions are single actions, made beside the one that is queued.

A residual that decides once a control step (ResFiT, arXiv 2509.19301) needs a Markov state: beside the observation,
which action of the chunk is due (the phase) and what it is. Both are in the observation here, so that replay, critic
and actor see in the next state the very action that will be corrected there.

Legend: B environments, Ta actions of a chunk, Da action features, Do observation features, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from diffalign.diffusion.trajectories import Cond, settled
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.improved import ImprovedPolicy
from diffalign.policy.normalize import Normalizer
from diffalign.policy.protocols import Decision
from diffalign_robot.demos import Demonstrations
from diffalign_robot.envs import Array
from diffalign_robot.vector import ChunkStep, VectorEnv

_BLOCK = 1024


@dataclass(frozen=True)
class QueuedBase:
    """Plays the queue: its action is the queued one, which the observation ends with (normalized).

    chunks: the policy that fills the queue, in a QueuedEnv.
    """

    chunks: DiffusionPolicy

    @property
    def event(self) -> tuple[int, int]:
        """One action, (1, Da)."""
        return (1, self.chunks.event[1])

    def window(self, generator: torch.Generator) -> None:
        """None: no denoising step is trained."""

    def act(self, cond: Cond, *, generator: torch.Generator, trained: Tensor | None = None) -> Decision:
        """The queued action of every row."""
        action = cond["obs"][:, -self.event[1]:].reshape(-1, *self.event)
        return Decision(action, settled(action, cond))

    def normalizer(self, observations: Normalizer) -> Normalizer:
        """That of the longer observation: phase and queued action are left as they are."""
        return observations.extended(sum(self.chunks.event))


class QueuedEnv:
    """A vector environment in which `chunks` is always about to act.

    The observation is [simulator's Do, phase as one-hot Ta, queued action Da]. A step executes one action, whatever the
    queue says, and moves the phase on; after Ta steps the policy is asked again. Its noise comes from the episode
    seeds, so that the same seeds give the same queues for the same actions.
    """

    def __init__(self, env: VectorEnv, chunks: DiffusionPolicy) -> None:
        self.inner, self.chunks = env, chunks
        self.count, self.action_dim = env.count, env.action_dim
        self.obs_dim = env.obs_dim + sum(chunks.event)
        self.generator = torch.Generator()
        self.queue = torch.zeros(env.count, *chunks.event)
        self.phase = 0

    def reset(self, seeds: Sequence[int]) -> Array:
        """Start an episode per environment and fill the queue; the observations [B, Do + Ta + Da]."""
        obs = self.inner.reset(seeds)
        self.generator.manual_seed(int(seeds[0]))
        self.phase = 0
        return self._fill(obs)

    def step(self, chunks: Array) -> ChunkStep:
        """Execute one action [B, 1, Da] per environment.

        Raises: ValueError for more than one action.
        """
        if chunks.shape[1] != 1:
            raise ValueError(f"a queued environment takes one action at a time, [B, 1, Da], got {chunks.shape}")
        step = self.inner.step(chunks)
        self.phase = (self.phase + 1) % self.chunks.event[0]
        return step._replace(obs=self._fill(step.obs))

    def images(self) -> None:
        """None: the policy that fills the queue acts on numbers."""

    def frame(self, i: int) -> NDArray[np.uint8]:
        """A picture of environment i; only without workers."""
        return self.inner.frame(i)

    def close(self) -> None:
        """End workers and renderers."""
        self.inner.close()

    def _fill(self, obs: Array) -> Array:
        if self.phase == 0:
            self.queue = self.chunks.act({"obs": torch.from_numpy(obs)}, generator=self.generator).action
        return with_queue(torch.from_numpy(obs), torch.full((self.count,), self.phase), self.queue).numpy()


def for_policy(env: VectorEnv, policy: object) -> VectorEnv:
    """The environment with the queue that the policy, or the base that it improves, plays; else as it is."""
    base = policy.base if isinstance(policy, ImprovedPolicy) else policy
    return QueuedEnv(env, base.chunks) if isinstance(base, QueuedBase) else env


def with_queue(obs: Float[Tensor, "N Do"], phase: Tensor, queue: Float[Tensor, "N Ta Da"]) -> Float[Tensor, "N Dq"]:
    """[obs, one-hot phase, the action that is due]."""
    due = queue[torch.arange(len(obs)), phase]
    return torch.cat([obs, torch.nn.functional.one_hot(phase, queue.shape[1]).to(obs.dtype), due], 1)


def queued_demonstrations(data: Demonstrations, chunks: DiffusionPolicy, generator: torch.Generator) -> Demonstrations:
    """The demonstrations as a QueuedEnv shows them: the policy is asked at every Ta-th observation of an episode."""
    phase = torch.cat([torch.arange(length) % chunks.event[0] for length in data.lengths.tolist()])
    fresh = torch.cat([chunks.act({"obs": obs}, generator=generator).action
                       for obs in data.obs[phase == 0].split(_BLOCK)])
    chunk = (phase == 0).cumsum(0) - 1  # which of them is being played
    return Demonstrations(with_queue(data.obs, phase, fresh[chunk]), data.action, data.lengths, data.success)
