"""A trained robot policy as a function of its inputs: observation and noise in, a chunk in robot units out.

Legend: N rows, n chains of a row (1, or the candidates that a critic ranks), R = N n, K denoising steps, Ta actions of
a chunk, Da action features, Do observation features (of all observations that the policy sees, oldest first).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.improved import ImprovedPolicy
from diffalign.policy.operators import OnActions, OnNoise
from diffalign.policy.protocols import Decision
from diffalign_robot.evaluate import RobotPolicy
from diffalign_robot.inpainting import inpainted
from diffalign_robot.source import chunk_denoiser


@dataclass(frozen=True)
class GivenNoise:
    """A denoising chain that draws nothing: `noise` and `step_noise` stand for its standard normal draws.

    None where the sampler has no use for it: `noise` from zero noise, `step_noise` in a deterministic chain.
    """

    chain: DiffusionPolicy
    noise: Float[Tensor, "R Ta Da"] | None
    step_noise: Float[Tensor, "R K Ta Da"] | None

    @property
    def event(self) -> tuple[int, ...]:
        """The chain's, (Ta, Da)."""
        return self.chain.event

    def window(self, generator: torch.Generator) -> None:
        """None: no denoising step is trained."""

    def act(self, cond: Cond, *, generator: torch.Generator, trained: Tensor | None = None) -> Decision:
        """The chain's decision; the generator is left alone."""
        start = self.chain.start(cond)
        first = start.mean if self.noise is None else start.mean + start.std * self.noise
        unscored = torch.zeros(self.chain.schedule.steps, dtype=torch.bool)
        return self.chain.act(cond, generator=generator, trained=unscored, noise=first, step_noise=self.step_noise)


@dataclass(frozen=True)
class ExportedPolicy:
    """What is exported, in torch: the policy between its normalizers, as a function of observation and noise.

    policy: as it is evaluated (`evaluate.evaluation_policy`). chunking: two more inputs for real-time chunking, the
    rest of the previous chunk in robot units and how much each of its actions still holds, in [0, 1]
    (`inpainting`).

    Raises: ValueError naming the part that cannot be exported.
    """

    policy: RobotPolicy
    chunking: bool = False

    def __post_init__(self) -> None:
        if self.chunking and isinstance(self.policy, ImprovedPolicy):
            raise ValueError("real-time chunking is of a chain alone: an improvement operator would change the actions "
                             "that it keeps; export the base run")
        base = self.policy.base if isinstance(self.policy, ImprovedPolicy) else self.policy
        if not isinstance(base, DiffusionPolicy):
            raise ValueError(f"a policy on a {type(base).__name__} cannot be exported: it corrects single actions of a "
                             "queue that the simulator keeps; export its base run, or train with per_step: false")
        if base.executed is not None:
            raise ValueError(f"a policy that executes a part of what it denoises, {base.executed}, cannot be exported "
                             "to a controller; write it back as it came, --to FORMAT:DIR")
        if chunk_denoiser(self.policy).encoder is not None:
            raise ValueError("a policy that sees images cannot be exported yet: controller packages take one vector of "
                             "numbers; export a policy of the state (environment without images)")
        if isinstance(self.policy, ImprovedPolicy):
            operator = self.policy.operator
            if not isinstance(operator, OnActions | OnNoise):
                raise ValueError(f"the improvement operator {type(operator).__name__} cannot be exported; known are "
                                 "OnActions and OnNoise")
            if self.policy.mode != "exploit":
                raise ValueError(f"only mode exploit is a function of its inputs, got {self.policy.mode}; use "
                                 "evaluation_policy")
        if self.chunking:
            inpainted(base, torch.zeros(1, *base.event), torch.zeros(1, *base.event))  # what it refuses is refused now

    @property
    def chain(self) -> DiffusionPolicy:
        """The denoising chain, of the base where it is improved."""
        base = self.policy.base if isinstance(self.policy, ImprovedPolicy) else self.policy
        assert isinstance(base, DiffusionPolicy)
        return base

    @property
    def chains(self) -> int:
        """n: how many chains are run for a row."""
        operator = self.policy.operator if isinstance(self.policy, ImprovedPolicy) else None
        return operator.samples if isinstance(operator, OnActions) else 1

    @property
    def history(self) -> int:
        """How many observations, one a control step, are one input `obs`."""
        return chunk_denoiser(self.policy).history

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The inputs of one decision by name, in order: obs, the standard normal draws that are used, the old chunk."""
        chain = self.chain
        shapes: dict[str, tuple[int, ...]] = {"obs": (1, len(chunk_denoiser(self.policy).observation_normalizer.shift))}
        if isinstance(self.policy, ImprovedPolicy) and isinstance(self.policy.operator, OnNoise):
            return shapes  # its actor chooses the noise, and its chain is an ODE
        if not chain.zero_noise:
            shapes["noise"] = (self.chains, *chain.event)
        if chain.kernel.stochastic:
            shapes["step_noise"] = (self.chains, chain.schedule.steps, *chain.event)
        if self.chunking:
            shapes |= {"previous": (1, *chain.event), "weight": (1, chain.event[0])}
        return shapes

    def __call__(self, obs: Float[Tensor, "N Do"], noise: Float[Tensor, "R Ta Da"] | None = None,
                 step_noise: Float[Tensor, "R K Ta Da"] | None = None, previous: Float[Tensor, "N Ta Da"] | None = None,
                 weight: Float[Tensor, "N Ta"] | None = None) -> Float[Tensor, "N Ta Da"]:
        """The chunk in robot units; rows of noise are a row's n chains, then the next row's."""
        policy, unused = self.policy, torch.Generator()
        actions = chunk_denoiser(policy).action_normalizer
        if isinstance(policy, ImprovedPolicy):
            steered = isinstance(policy.operator, OnNoise)
            acting = policy if steered else replace(policy, base=GivenNoise(self.chain, noise, step_noise))
            decision = acting.act({"obs": obs}, generator=unused)
        else:
            chain = self.chain
            if previous is not None and weight is not None:
                chain = inpainted(chain, actions.normalize(previous), weight[..., None].expand_as(previous))
            decision = GivenNoise(chain, noise, step_noise).act({"obs": obs}, generator=unused)
        return actions.unnormalize(decision.action)

    def draw(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The inputs of `rows` decisions beside the observation: noise, and for chunking any chunk and weights."""
        drawn = {name: torch.randn(rows * shape[0], *shape[1:], generator=generator)
                 for name, shape in self.shapes.items() if name != "obs"}
        if self.chunking:
            drawn["previous"] = chunk_denoiser(self.policy).action_normalizer.unnormalize(drawn["previous"].tanh())
            drawn["weight"] = drawn["weight"].sigmoid()
        return drawn
