"""What is worth knowing about a data set before a policy is trained on it.

Legend: T steps over all episodes, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.policy.normalize import Normalizer
from diffalign_robot.data.dataset import Dataset

_FAR = 6.0  # standard deviations; a Gaussian feature gets there once in 5e8 steps


def check(data: Dataset) -> dict[str, Any]:
    """Counts, episode lengths, per-feature statistics of observation and action, outliers, problems and notes.

    Feature rows hold min, max, mean, std, and shift and scale of the normalizer that cloning fits (gaussian for
    observations, limits for actions). problems is a list of sentences, empty for a data set without fault; notes are
    what to know all the same.

    Raises: ValueError if a feature is not finite, naming it and the episode.
    """
    episodes, lengths = data.episodes, data.episodes.lengths
    names = {"obs": [f"{key}.{i}" for key, width in data.keys.items() for i in range(width)],
             "action": [f"action.{i}" for i in range(episodes.action.shape[1])]}
    parts = {"obs": episodes.obs, "action": episodes.action}
    for what, values in parts.items():
        _require_finite(data, values, names[what])
    features = {what: _features(values, names[what], "gaussian" if what == "obs" else "limits")
                for what, values in parts.items()}
    outliers = [row for what, values in parts.items() for row in _outliers(data, values, names[what])]
    return {"episodes": len(lengths), "steps": len(episodes.obs), "keys": dict(data.keys), "rate_hz": data.rate_hz,
            "task": data.task(), "success_rate": float(episodes.success.float().mean()) if data.says_success else None,
            "length": {"min": int(lengths.min()), "mean": float(lengths.float().mean()), "max": int(lengths.max())},
            **features, "outliers": outliers, "problems": _problems(data, outliers),
            "notes": _notes(data, features)}


def _features(values: Float[Tensor, "T D"], names: list[str], mode: Any) -> list[dict[str, Any]]:
    normalizer = Normalizer.fit(values, mode)
    columns = {"min": values.amin(0), "max": values.amax(0), "mean": values.mean(0), "std": values.std(0, correction=0),
               "shift": normalizer.shift, "scale": normalizer.scale}
    return [{"name": name, **{column: float(numbers[i]) for column, numbers in columns.items()}}
            for i, name in enumerate(names)]


def _outliers(data: Dataset, values: Float[Tensor, "T D"], names: list[str]) -> list[dict[str, Any]]:
    """The features that stray more than _FAR standard deviations from their mean, with the worst step of each."""
    spread = values.std(0, correction=0)
    far = (values - values.mean(0)).abs() / torch.where(spread > 0, spread, torch.ones_like(spread))
    rows = []
    for i in (far > _FAR).any(0).nonzero()[:, 0].tolist():
        worst = int(far[:, i].argmax())
        episode, step = _place(data, worst)
        rows.append({"name": names[i], "steps": int((far[:, i] > _FAR).sum()), "deviations": float(far[worst, i]),
                     "value": float(values[worst, i]), "episode": episode, "step": step})
    return rows


def _problems(data: Dataset, outliers: list[dict[str, Any]]) -> list[str]:
    found = [f"{row['name']} is {row['deviations']:.1f} standard deviations from its mean at step {row['step']} of "
             f"episode {row['episode']} ({row['steps']} steps beyond {_FAR:g}); limits normalization stretches to it"
             for row in outliers]
    seen: dict[bytes, int] = {}
    for number, (start, end) in enumerate(data.episodes.spans()):
        first = seen.setdefault(data.episodes.action[start:end].numpy().tobytes(), number)
        if first != number:
            found.append(f"episode {number} has the very actions of episode {first}")
    return found


def _notes(data: Dataset, features: dict[str, list[dict[str, Any]]]) -> list[str]:
    constant = [row["name"] for rows in features.values() for row in rows if row["min"] == row["max"]]
    found = [f"constant, so without information: {', '.join(constant)}"] if constant else []
    if not data.says_success:
        found.append("the data set does not say which episodes succeeded; all of them count as successful")
    return found


def _require_finite(data: Dataset, values: Float[Tensor, "T D"], names: list[str]) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        episode, step = _place(data, int(bad[0, 0]))
        raise ValueError(f"{names[int(bad[0, 1])]} is {float(values[bad[0, 0], bad[0, 1]])} at step {step} of episode "
                         f"{episode}; remove the episode or repair it")


def _place(data: Dataset, row: int) -> tuple[int, int]:
    """Episode, and step within it, of a row."""
    ends = data.episodes.lengths.cumsum(0)
    episode = int((ends <= row).sum())
    return episode, row - data.episodes.spans()[episode][0]
