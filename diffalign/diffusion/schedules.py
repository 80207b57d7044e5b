"""Time grids from noise to data, and which of their steps are trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffalign.spec import spec


def shifted(t: Tensor, shift: float) -> Tensor:
    """Path times moved towards 1: s t / (1 + (s - 1) t) (SD3, eq. 23); shift 1 leaves them."""
    return shift * t / (1 + (shift - 1) * t)


@spec
class TrainedSteps:
    """Which denoising steps k in 0..K-1 (0 = noisiest) are stochastic actions to be trained.

    `start`/`stop` bound the range (stop None = K; a negative start counts from the end, so start=-5 is DPPO's
    last five steps). `size` draws a random contiguous window of that many steps in the range anew for every rollout
    (Flow-GRPO-Fast). With `move_every` the window slides instead (MixGRPO, arXiv 2507.21802): it begins at the noisy
    end and moves by `stride` steps after that many updates, from the last place that fits back to the first.
    `ode_elsewhere` makes the untrained steps deterministic.
    """

    start: int = 0
    stop: int | None = None
    size: int | None = None
    ode_elsewhere: bool = False
    move_every: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.move_every is not None and (self.move_every < 1 or self.size is None):
            raise ValueError("move_every must be at least 1 or null and moves a window, which needs a size; got "
                             f"move_every={self.move_every} and size={self.size}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")

    def at(self, update: int, steps: int) -> TrainedSteps:
        """The trained steps of the update with this number (0 = first): a sliding window where it then stands."""
        if self.move_every is None or self.size is None:
            return self
        first, last = self._range(steps)
        places = (last - first - self.size) // self.stride + 1
        first += update // self.move_every % places * self.stride
        return replace(self, start=first, stop=first + self.size, size=None, move_every=None)

    def draw(self, steps: int, generator: torch.Generator) -> Tensor:
        """Boolean mask [K] of the trained steps of one rollout; a sliding window stands at its first place."""
        if self.move_every is not None:
            return self.at(0, steps).draw(steps, generator)
        first, last = self._range(steps)
        if self.size is not None:
            choices = last - first - self.size + 1
            first += int(torch.randint(choices, (1,), generator=generator, device=generator.device).item())
            last = first + self.size
        mask = torch.zeros(steps, dtype=torch.bool)
        mask[first:last] = True
        return mask

    def _range(self, steps: int) -> tuple[int, int]:
        """Bounds of the range. Raises: ValueError if it does not fit the schedule, or the window the range."""
        first = self.start + steps if self.start < 0 else self.start
        last = steps if self.stop is None else self.stop
        if not 0 <= first < last <= steps:
            raise ValueError(f"trained steps [{self.start}, {self.stop}) do not fit a schedule of {steps} steps")
        if self.size is not None and not 1 <= self.size <= last - first:
            raise ValueError(f"a window of {self.size} steps does not fit the trained range of {last - first}")
        return first, last


@spec
class Schedule:
    """K denoising steps on path time 1 -> 0. `shift` s maps t to s t / (1 + (s - 1) t) (SD3, eq. 23).

    grid: times lie on i / grid, rounded towards noise, as a model distilled at these times alone wants (LCM: 50).
    terminal: the last time before 0; the times of the shifted grid are stretched linearly to it (diffusers'
    `shift_terminal`; Qwen-Image 0.02, LTX-Video 0.1).
    leading: entries of a VP table of which every (leading // steps)-th is taken, from the least noisy one: diffusers'
    `leading` spacing, that of LeRobot's and Diffusion Policy's policies. The chain then starts below t = 1.
    """

    steps: int
    shift: float = 1.0
    grid: int | None = None
    terminal: float | None = None
    leading: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}")
        if self.grid is not None and self.grid < self.steps:
            raise ValueError(f"grid must be at least the {self.steps} steps, got {self.grid}")
        if self.terminal is not None and not (0 < self.terminal < 1 and self.steps > 1):
            raise ValueError(f"terminal must lie between 0 and 1 and needs 2 steps or more, got {self.terminal} and "
                             f"{self.steps} steps")
        if self.leading is not None and (self.leading < self.steps or (self.shift, self.grid, self.terminal)
                                         != (1.0, None, None)):
            raise ValueError(f"leading must be at least the {self.steps} steps and comes without shift, grid and "
                             f"terminal, got {self}")

    def times(self) -> Tensor:
        """Grid [K+1] from 1 (`leading`: from below it) to 0, float32; on a VP path diffusers' `trailing` spacing."""
        if self.leading is not None:
            entries = torch.arange(self.steps).flip(0) * (self.leading // self.steps) + 1
            return torch.cat([entries.double() / self.leading, torch.zeros(1)]).float()
        t = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        if self.grid is not None:
            t = 1 - torch.arange(self.steps + 1) * self.grid // self.steps / self.grid
        t = shifted(t.double(), self.shift)
        if self.terminal is not None:
            t[:-1] = 1 - (1 - t[:-1]) * (1 - self.terminal) / (1 - t[-2])
        return t.float()
