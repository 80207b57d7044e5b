"""Rewards of blocks of images, measured in the background while the next block is drawn.

Legend: N images of a block, B of all blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign_image.prompts import Prompt
from diffalign_image.rewards import Reward
from diffalign_image.rewards.protocol import checked
from diffalign_image.throughput import Stopwatch

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Images, or clips of F frames, in [-1, 1] and the prompt of each."""

    images: Float[Tensor, "N *F 3 H W"]
    prompts: Sequence[Prompt]


def score(block: Block, rewards: Mapping[str, Reward]) -> dict[str, Float[Tensor, "N"]]:
    """Every reward of a block, by name, on the CPU. Raises: ValueError for anything but N finite numbers."""
    texts, metadata = [prompt.text for prompt in block.prompts], [prompt.metadata for prompt in block.prompts]
    with torch.no_grad():
        return {name: checked(reward(block.images, texts, metadata), len(texts), f"the reward {name}")
                for name, reward in rewards.items()}


def score_all(blocks: Iterable[Block], rewards: Mapping[str, Reward], workers: int, watch: Stopwatch
              ) -> dict[str, Float[Tensor, "B"]]:
    """Every reward of every block, in the blocks' order; up to `workers` blocks are scored while `blocks` goes on.

    The values do not depend on workers: each block is scored by itself, and 0 does it at once. The first failure of a
    reward ends the drawing of further blocks. watch: gets the stages `reward`, the work, and `reward_wait`, what of it
    was waited for. Raises: what a reward raises.
    """
    def timed(block: Block) -> tuple[dict[str, Tensor], float]:
        begun = time.perf_counter()
        return score(block, rewards), time.perf_counter() - begun

    pool = ThreadPoolExecutor(workers, thread_name_prefix="reward") if workers else None
    pending: list[Future[tuple[dict[str, Tensor], float]]] = []
    try:
        for block in blocks:
            pending.append(pool.submit(timed, block) if pool else _done(timed, block, watch))
            for future in pending:
                if future.done():
                    future.result()
        with watch.stage("reward_wait"):
            found = [future.result() for future in pending]
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
    watch.add("reward", sum(seconds for _, seconds in found))
    return {name: torch.cat([values[name] for values, _ in found]) for name in rewards}


def _done(work: Callable[[Block], T], block: Block, watch: Stopwatch) -> Future[T]:
    """The work done at once, by this thread, which waits for it."""
    future: Future[T] = Future()
    with watch.stage("reward_wait"):
        future.set_result(work(block))
    return future
