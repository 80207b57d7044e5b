"""The closed unions of environments and policy networks; importing this needs no simulator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffalign.spec import spec


@spec
class MetaWorld:
    """A Meta-World v3 task with state observations; object and goal are placed anew from each episode's seed.

    reward `sparse` is 1 on the step that succeeds and 0 elsewhere, `dense` the task's own shaped reward. With
    success_ends the episode terminates at the first success; otherwise it runs to the horizon (a time-out).
    """

    type: Literal["metaworld"] = "metaworld"
    task: str = "pick-place-v3"
    horizon: int = 100
    reward: Literal["sparse", "dense"] = "sparse"
    success_ends: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.horizon <= 500:
            raise ValueError(f"horizon must lie in 1..500 (Meta-World's own limit), got {self.horizon}")
        if self.reward == "dense" and self.success_ends:
            raise ValueError("a dense reward that ends at success pays for avoiding success; set success_ends to false")


@spec
class Gymnasium:
    """Any registered Gymnasium environment with Box observations and actions.

    Success is info["success"] or info["is_success"] where the environment reports one. horizon None keeps the
    environment's own time limit.
    """

    type: Literal["gymnasium"] = "gymnasium"
    id: str
    horizon: int | None = None

    def __post_init__(self) -> None:
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {self.horizon}")


@spec
class ChunkMLP:
    """A residual MLP over (noisy chunk, time, observation), as DPPO's for state observations."""

    type: Literal["mlp"] = "mlp"
    width: int = 256
    blocks: int = 2
    time_features: int = 16

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 1:
            raise ValueError(f"width and blocks must be at least 1, got {self.width} and {self.blocks}")
        if self.time_features < 4 or self.time_features % 2:
            raise ValueError(f"time_features must be even and at least 4, got {self.time_features}")


Environment = Annotated[MetaWorld | Gymnasium, Field(discriminator="type")]
Network = Annotated[ChunkMLP, Field()]
