"""Success rates with confidence intervals, and videos.

Legend: B environments, N episodes, Ta actions of a chunk, Da action features, Do observation features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion import CPS, DDIM, DDPM, ODE, FlowSDE, Kernel, NoisyODE
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.improved import ImprovedPolicy
from diffalign.train.statistics import mean_interval, wilson
from diffalign_robot.choices import Environment
from diffalign_robot.envs import Array
from diffalign_robot.history import stacked
from diffalign_robot.queued import QueuedBase, for_policy
from diffalign_robot.source import chunk_denoiser, shown
from diffalign_robot.vector import ChunkVectorEnv, VectorEnv

Sampler = Literal["stochastic", "zero_noise", "ode"]
RobotPolicy = DiffusionPolicy | ImprovedPolicy | QueuedBase


@overload
def evaluation_policy(policy: DiffusionPolicy, sampler: Sampler) -> DiffusionPolicy: ...
@overload
def evaluation_policy(policy: ImprovedPolicy, sampler: Sampler) -> ImprovedPolicy: ...
@overload
def evaluation_policy(policy: QueuedBase, sampler: Sampler) -> QueuedBase: ...
def evaluation_policy(policy: RobotPolicy, sampler: Sampler) -> RobotPolicy:
    """The policy as it is evaluated: without exploration floors, stochastic, from zero noise, or by the ODE.

    A flow's stochastic sampler is its kernel, for the ODE and for noisy_ode the ODE from a random start. An improved
    policy takes its actor's mean, and its base is sampled in that way. (The policy that fills a queue is
    the environment's: build the QueuedEnv from the result.)
    """
    if isinstance(policy, ImprovedPolicy):
        base = policy.base
        assert isinstance(base, DiffusionPolicy | QueuedBase)
        return replace(policy.with_mode("exploit"), base=evaluation_policy(base, sampler))
    if isinstance(policy, QueuedBase):
        return QueuedBase(evaluation_policy(policy.chunks, sampler))
    if sampler == "stochastic":
        return policy.with_sampler(_without_floor(policy.kernel))
    return policy.with_sampler(ODE(), zero_noise=sampler == "zero_noise")


def _without_floor(kernel: Kernel) -> Kernel:
    if isinstance(kernel, NoisyODE):  # all of its noise is exploration
        return ODE()
    return replace(kernel, min_std=0.0) if isinstance(kernel, DDPM | DDIM | FlowSDE | CPS) else kernel


def seeds_for(seed: int, episodes: int) -> list[int]:
    """Episode seeds of an evaluation: 2^31 + 10^6 seed + i, never those of training (below 2^31)."""
    return [2**31 + 1_000_000 * seed + i for i in range(episodes)]


class Played(NamedTuple):
    """What N episodes came to: success and return of each, and the environment steps of all."""

    success: list[bool]
    returns: list[float]
    env_steps: int


def play(act: Callable[[Cond, torch.Generator], Float[Tensor, "B Ta Da"]], env: VectorEnv, *, seed: int, episodes: int
         ) -> Played:
    """Episodes by seed, in which `act` decides chunks in robot units with a generator of that seed."""
    generator = torch.Generator().manual_seed(seed)
    seeds, success, returns, executed = seeds_for(seed, episodes), [], [], 0
    for first in range(0, episodes, env.count):
        wave = seeds[first : first + env.count]
        obs = env.reset(wave + wave[-1:] * (env.count - len(wave)))
        won = torch.zeros(env.count, dtype=torch.bool)
        total = torch.zeros(env.count)
        alive = torch.ones(env.count, dtype=torch.bool)
        alive[len(wave) :] = False
        while bool(alive.any()):
            step = env.step(act(shown(env, obs), generator).numpy())
            obs = step.obs
            won |= torch.from_numpy(step.success)
            total += torch.from_numpy(step.reward)
            executed += int(step.executed[: len(wave)].sum())
            alive &= ~torch.from_numpy(step.terminated | step.truncated)
        success += won[: len(wave)].tolist()
        returns += total[: len(wave)].tolist()
    return Played(success, returns, executed)


def summary(played: Played, *, seed: int, sampler: str) -> dict[str, Any]:
    """success_rate with its Wilson interval and the mean return with its t interval."""
    episodes, wins = len(played.success), sum(played.success)
    mean, low, high = mean_interval(played.returns)
    return {"success_rate": wins / episodes, "interval": list(wilson(wins, episodes)), "episodes": episodes,
            "seed": seed, "sampler": sampler, "return_mean": mean, "return_interval": [low, high],
            "env_steps": played.env_steps}


def require_episodes(episodes: int) -> None:
    """Raises: ValueError for fewer than two episodes."""
    if episodes < 2:
        raise ValueError(f"an interval needs at least two episodes, got {episodes}")


def evaluate(policy: RobotPolicy, env: VectorEnv, *, seed: int, episodes: int, sampler: Sampler
             ) -> dict[str, Any]:
    """The summary of a policy's episodes by seed.

    Raises: ValueError for fewer than two episodes.
    """
    require_episodes(episodes)
    acting = evaluation_policy(policy, sampler)
    played = play(in_robot_units(acting), env, seed=seed, episodes=episodes)
    return summary(played, seed=seed, sampler=describe(acting, sampler))


def in_robot_units(policy: RobotPolicy) -> Callable[[Cond, torch.Generator], Float[Tensor, "B Ta Da"]]:
    """The policy as a function to chunks in robot units; images are encoded before anything else looks."""
    denoiser = chunk_denoiser(policy)

    @torch.no_grad()
    def act(cond: Cond, generator: torch.Generator) -> Tensor:
        action = policy.act(denoiser.encode(cond), generator=generator).action
        return denoiser.action_normalizer.unnormalize(action)

    return act


def describe(policy: RobotPolicy, sampler: Sampler) -> str:
    """For example "ddpm (10 steps, stochastic)"; for an improved policy its base, and "improved on actions"."""
    if isinstance(policy, ImprovedPolicy):
        operator: Any = policy.operator
        base: Any = policy.base
        return f"{describe(base, sampler)}, improved on {operator.type}"
    if isinstance(policy, QueuedBase):
        return f"{describe(policy.chunks, sampler)}, queued"
    kernel: Any = policy.kernel
    return f"{kernel.type} ({policy.schedule.steps} steps, {sampler.replace('_', ' ')})"


def policy_actor(policy: DiffusionPolicy, *, seed: int) -> Callable[[], Callable[[Array], Array]]:
    """A factory of controllers, one an episode: observation [Do] -> action [Da], executing chunks in open loop.

    Raises: ValueError for a policy that sees images.
    """
    if chunk_denoiser(policy).encoder is not None:
        raise ValueError("a policy that sees images cannot collect yet; an expert or a policy of the state can, "
                         "and its environment may record images")
    acting, generator = evaluation_policy(policy, "stochastic"), torch.Generator().manual_seed(seed)
    network = chunk_denoiser(acting)
    unnormalize = network.action_normalizer.unnormalize

    def build() -> Callable[[Array], Array]:
        queue: list[Array] = []
        recent: deque[Array] = deque(maxlen=network.history)

        def act(obs: Array) -> Array:
            recent.append(obs)
            if not queue:
                seen = torch.from_numpy(stacked(recent, network.history))[None].float()
                decision = acting.act({"obs": seen}, generator=generator)
                queue.extend(unnormalize(decision.action)[0].numpy())
            return queue.pop(0)

        return act

    return build


def record(policy: RobotPolicy, spec: Environment, out: Path, *, seed: int, count: int, sampler: Sampler
           ) -> Path:
    """An MP4 of `count` episodes one after the other: every second control step at 40 frames a second.

    For Meta-World's 80 Hz control that is real time.
    """
    import imageio.v2 as imageio

    acting = evaluation_policy(policy, sampler)
    act, generator = in_robot_units(acting), torch.Generator().manual_seed(seed)
    env = for_policy(ChunkVectorEnv(spec, 1, history=chunk_denoiser(acting).history), acting)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = imageio.get_writer(out, fps=40, macro_block_size=8, codec="libx264")
    with writer as film:
        for episode_seed in seeds_for(seed, count):
            obs = env.reset([episode_seed])
            film.append_data(env.frame(0))
            over = False
            while not over:
                chunk = act(shown(env, obs), generator)
                for number, action in enumerate(chunk.unbind(1)):  # one action at a time, to see inside the chunk
                    step = env.step(action[:, None].numpy())
                    over = bool(step.terminated[0] or step.truncated[0])
                    if number % 2 or over:
                        film.append_data(env.frame(0))
                    if over:
                        break
                obs = step.obs
    env.close()
    return out
