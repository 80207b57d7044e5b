"""Further metric sinks beside metrics.jsonl: TensorBoard and W&B, off unless asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.train.run import Writer


class TensorBoardWriter:
    """Scalars under `<run>/tensorboard`, tagged phase/name."""

    def __init__(self, folder: Path) -> None:
        """Raises: ImportError naming the extra if tensorboard is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("tensorboard is not installed; pip install 'diffalign[tensorboard]'") from None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """Write and flush one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{phase}/{name}", value, step)
        self._writer.flush()


class WandbWriter:
    """A W&B run in `<run>/wandb`; mode `offline` needs no network and can be synced later."""

    def __init__(self, folder: Path, *, project: str, mode: str) -> None:
        """mode: online or offline. Raises: ImportError naming the extra if wandb is missing; ValueError on the mode."""
        if mode not in ("online", "offline"):
            raise ValueError(f"the W&B mode must be 'online' or 'offline', got {mode!r}")
        try:
            from wandb import init
        except ImportError:
            raise ImportError("wandb is not installed; pip install 'diffalign[wandb]'") from None
        options: dict[str, Any] = {"mode": mode, "resume": "allow", "id": folder.name}
        self._run: Any = init(project=project, name=folder.name, dir=str(folder), **options)

    def __call__(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """Log one step; evaluations at the same step keep their own names."""
        self._run.log({f"{phase}/{name}": value for name, value in metrics.items()} | {"step": step})

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def open_writers(names: Mapping[str, str], folder: Path) -> tuple[Writer, ...]:
    """Writers by name: {"tensorboard": "", "wandb": "offline"}; an unknown name is a ValueError."""
    writers: list[Writer] = []
    for name, mode in names.items():
        if name == "tensorboard":
            writers.append(TensorBoardWriter(folder))
        elif name == "wandb":
            writers.append(WandbWriter(folder, project="diffalign", mode=mode))
        else:
            raise ValueError(f"unknown logger {name!r}; choose from tensorboard, wandb")
    return tuple(writers)
