"""The closed unions of pieces that a config can choose from by `type`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from diffalign.diffusion.kernels import CPS, DDIM, DDPM, ODE, DanceSDE, FlowSDE, NoisyODE
from diffalign.diffusion.paths import FlowPath, VPPath
from diffalign.rl.advantages import GAE, BestOfGroup, GroupNormalized, LeaveOneOut, PromptRunning
from diffalign.rl.asymmetric import AsymmetricPO
from diffalign.rl.clamped import ClampedRatio
from diffalign.rl.likelihoods import Matching, Transition
from diffalign.rl.pooled import PooledMatching
from diffalign.rl.starts import Start
from diffalign.rl.surrogates import (
                      ContrastiveMatching,
                      DivergenceGate,
                      GuardClip,
                      PPOClip,
                      SimplePO,
                      WeightedRegression,
)

Path = Annotated[FlowPath | VPPath, Field(discriminator="type")]
Kernel = Annotated[DDPM | DDIM | ODE | FlowSDE | DanceSDE | CPS | NoisyODE, Field(discriminator="type")]
Advantage = Annotated[GAE | GroupNormalized | BestOfGroup | LeaveOneOut | PromptRunning, Field(discriminator="type")]
Surrogate = Annotated[PPOClip | SimplePO | AsymmetricPO | ClampedRatio | DivergenceGate | GuardClip |
                      ContrastiveMatching | WeightedRegression, Field(discriminator="type")]
Likelihood = Annotated[Transition | Matching | PooledMatching | Start, Field(discriminator="type")]

UNIONS = {"paths": Path, "kernels": Kernel, "advantages": Advantage, "surrogates": Surrogate, "likelihoods": Likelihood}
