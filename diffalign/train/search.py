"""Search among a few candidates by noisy scores, and that of a composition's weights.

Legend: P policies, M samples, *E event axes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.policy.compose import best_pair_weights, disagreement

T = TypeVar("T")


def successive_halving(candidates: Sequence[T], play: Callable[[T, int], float], *, episodes: int
                       ) -> tuple[T, list[dict[str, Any]]]:
    """(the last candidate left, what was measured): all play `episodes`, the better half twice as many, and so on.

    Karnin et al. 2013. play(candidate, episodes) is a mean score. The winner's own score is biased upwards by the
    choice: evaluate it again on fresh episodes. Raises: ValueError without candidates.
    """
    if not candidates:
        raise ValueError("a search needs at least one candidate, got none")
    left, history = list(candidates), []
    while True:
        scores = [play(candidate, episodes) for candidate in left]
        history += [{"candidate": candidate, "episodes": episodes, "score": score}
                    for candidate, score in zip(left, scores, strict=True)]
        order = sorted(range(len(left)), key=lambda i: -scores[i])
        left = [left[i] for i in order[: (len(left) + 1) // 2]]
        if len(order) <= 2:
            return left[0], history
        episodes *= 2


def found_weights(folder: Path) -> list[float]:
    """The weights of a run's composition.json. Raises: ValueError naming the command that searches them."""
    file = folder / "composition.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no composition.json yet; run the search with "
                         f"`diffalign compose {folder / 'config.yaml'} --run {folder} --resume`")
    weights: list[float] = json.loads(file.read_text())["weights"]
    return weights


def search_weights(predictions: Float[Tensor, "P M *E"], eps: Float[Tensor, "M *E"],
                   play: Callable[[tuple[float, ...], int], float], *, grid: int, episodes: int,
                   generator: torch.Generator) -> dict[str, Any]:
    """A JSON-able record: weights (of the winner), closed_form, disagreement, search (what was measured).

    predictions and eps are those of `noise_predictions` on data. Two policies: a grid of `grid` + 1 weights and the
    closed form; more: as many random points of the simplex. play(weights, episodes) is a mean score.
    """
    closed = best_pair_weights(predictions, eps) if len(predictions) == 2 else None
    if closed is not None:
        candidates: list[tuple[float, ...]] = [*((1 - i / grid, i / grid) for i in range(grid + 1)), closed]
    else:
        raw = -torch.rand(grid + 1, len(predictions), generator=generator).clamp(min=1e-6).log()  # Dirichlet(1)
        candidates = [tuple(row) for row in (raw / raw.sum(1, keepdim=True)).tolist()]
    winner, history = successive_halving(candidates, play, episodes=episodes)
    return {"weights": list(winner), "closed_form": list(closed) if closed else None, "search": history,
            "disagreement": disagreement(predictions, eps)}
