"""Search among a few candidates by noisy scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
