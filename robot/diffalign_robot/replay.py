"""Demonstrations as replay rows.

Legend: S rows, Ta actions of a chunk.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from diffalign.policy.improved import ImprovedPolicy
from diffalign.rl.replay import DEMONSTRATION, Transitions
from diffalign_robot.demos import Demonstrations
from diffalign_robot.networks import ChunkDenoiser
from diffalign_robot.source import chunk_denoiser

_BLOCK = 1024


@torch.no_grad()
def encoded_demonstrations(data: Demonstrations, denoiser: ChunkDenoiser) -> Demonstrations:
    """The demonstrations as numbers alone: the features of their images after every observation."""
    everything = data.seen(torch.arange(len(data.obs)))
    return replace(data, obs=denoiser.encode(everything)["obs"], image=None)


def demonstration_rows(data: Demonstrations, policy: ImprovedPolicy, *, discount: float, reward_scale: float,
                       generator: torch.Generator, signals: bool = True) -> Transitions:
    """Every chunk of actions that lies inside one episode, with the observation after it.

    The last chunk of a successful episode is paid reward_scale and terminates (sparse success; one-step returns). The
    last chunk of a failed one is left out: the observation after its end was not recorded. signals: whether to ask the
    base at every observation.
    """
    actions, chunk = chunk_denoiser(policy).action_normalizer, policy.base.event[0]
    ends = data.lengths.cumsum(0).tolist()
    starts: list[int] = []
    last: list[bool] = []
    for length, end, success in zip(data.lengths.tolist(), ends, data.success.tolist(), strict=True):
        stop = end - chunk + (1 if success else 0)
        starts += range(end - length, stop)
        last += [bool(success) and start == end - chunk for start in range(end - length, stop)]
    if not starts:
        raise ValueError(f"no demonstration is as long as a chunk of {chunk} (longest: {int(data.lengths.max())})")
    start, terminal = torch.tensor(starts), torch.tensor(last)
    action = actions.normalize(data.action[start[:, None] + torch.arange(chunk)]).clamp(-1, 1)
    cond = {"obs": data.obs[start]}
    following = {"obs": data.obs[(start + chunk).clamp(max=len(data.obs) - 1)]}
    return Transitions(cond, action, reward_scale * terminal.float(), discount * (~terminal).float(), following,
                       _signals(policy, cond, generator) if signals else {},
                       _signals(policy, following, generator) if signals else {},
                       torch.full((len(start),), float(DEMONSTRATION)))


def _signals(policy: ImprovedPolicy, cond: dict[str, torch.Tensor], generator: torch.Generator
             ) -> dict[str, torch.Tensor]:
    blocks = [policy.operator.ask(policy.base, {"obs": obs}, generator=generator) for obs in cond["obs"].split(_BLOCK)]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
