"""Logical composition of policies along the chain: OR samples a mixture, AND what all find equally likely (SuperDiff).

Skreta et al. 2024 (arXiv 2412.17762) track each model's log-density along one chain by an Ito estimator. With Gaussian
steps there is a discrete one: Bayes' rule on one noising step, q_i(x) p_i(x_next | x) = q_i(x_next) q(x | x_next), says
    log q_i(x_next) - log q_i(x) = log p_i(x_next | x) + something that is the same for all i,
where p_i is policy i's own reverse step (exact as the steps get small). So differences of log-densities between
policies are sums of the transition log-probs that the kernel states anyway.

Legend: N rows, P policies, K denoising steps, *E event axes of E numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.gaussian import Gaussian, standard_normal
from diffalign.diffusion.trajectories import Cond, settled
from diffalign.policy.compose import at_matched_noise
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Decision, num_rows


@dataclass(frozen=True)
class Superposition:
    """Several policies on the first one's path, kernel and schedule.

    operator `or`: weights softmax(temperature * log q_i + bias_i) per row: large temperatures follow the policy under
    which the row is likeliest, so that samples come from the union. `and`: the weights of each step pull all log q_i
    together; they may leave the simplex. gain is the share of a difference that one step corrects. At 1 the noise is
    cancelled along the differences, the chain is no diffusion there any more, and the tracked densities are wrong by a
    third of a nat however small the steps (tests/test_superpose.py); the error falls with the gain.

    Raises: ValueError for a deterministic kernel, other events, or a bias of another length.
    """

    policies: tuple[DiffusionPolicy, ...]
    operator: Literal["or", "and"]
    temperature: float = 1.0
    gain: float = 0.1
    bias: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.policies) < 2 or len({policy.event for policy in self.policies}) > 1:
            raise ValueError("a superposition needs at least two policies of the same event, got events "
                             f"{[policy.event for policy in self.policies]}")
        if not self.policies[0].kernel.stochastic:
            raise ValueError(f"{self.policies[0].kernel} is deterministic and states no density to compare; use DDPM, "
                             "or DDIM or CPS with noise")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 < self.gain <= 1:
            raise ValueError(f"gain must lie in (0, 1], got {self.gain}")
        if self.bias is not None and len(self.bias) != len(self.policies):
            raise ValueError(f"one bias per policy is needed, got {len(self.bias)} for {len(self.policies)} policies")

    def window(self, generator: torch.Generator) -> None:
        """None: no denoising step is trained."""

    def act(self, cond: Cond, *, generator: torch.Generator, trained: Tensor | None = None) -> Decision:
        """One decision per row; signals hold the final `log_density` [N, P], up to a constant per row."""
        action, density = self.sample(cond, generator=generator)
        return Decision(action, settled(action, cond), {"log_density": density})

    @torch.no_grad()
    def sample(self, cond: Cond, *, generator: torch.Generator) -> tuple[Float[Tensor, "N *E"], Float[Tensor, "N P"]]:
        """(actions, log q_i of each up to a constant per row)."""
        host = self.policies[0]
        rows, device = num_rows(cond), next(iter(cond.values())).device
        times = host.schedule.times().to(device)
        x = standard_normal(rows, host.event, device).sample(generator)
        density = x.new_zeros(rows, len(self.policies))
        for k in range(host.schedule.steps):
            t, t_next = times[k].expand(rows), times[k + 1].expand(rows)
            level = host.path.level(t, len(host.event))
            steps = [host.step(x, t, t_next, *at_matched_noise(policy, x, t, level, cond), cond)
                     for policy in self.policies]
            means = torch.stack([step.mean for step in steps], 1)
            std = steps[0].std
            noise = torch.randn(x.shape, generator=generator, device=device)
            weights = self._weights(means, std, density)
            x = torch.einsum("np,np...->n...", weights, means) + std * noise
            if bool((std > 0).all()):
                density = density + torch.stack([Gaussian(step.mean, std).log_prob(x) for step in steps], 1)
        return x, density - density.amax(1, keepdim=True)

    def _weights(self, means: Float[Tensor, "N P *E"], std: Tensor, density: Float[Tensor, "N P"]
                 ) -> Float[Tensor, "N P"]:
        if self.operator == "and" and bool((std > 0).all()):
            return equal_density_weights(means, std, self.gain * density)
        bias = density.new_tensor(self.bias or [0.0] * len(self.policies))
        scores = density if self.operator == "or" else torch.zeros_like(density)
        return torch.softmax(self.temperature * scores + bias, 1)


def equal_density_weights(means: Float[Tensor, "N P *E"], std: Tensor, density: Float[Tensor, "N P"]
                          ) -> Float[Tensor, "N P"]:
    """Weights of sum 1 for which density_i + log N(x; mean_i, std^2) is the same for all i at x = sum of w_i mean_i.

    With d_i = mean_i - mean_1 the condition against policy 1 is
    2 <x - mean_1, d_i> = |d_i|^2 - 2 std^2 (density_i - density_1): P - 1 linear equations in w_2 .. w_P. Where two
    means agree (d = 0) the weights are those of least norm.
    """
    flat = means.flatten(2)
    d = flat[:, 1:] - flat[:, :1]
    variance = std.reshape(-1, 1) ** 2
    right = 0.5 * d.square().sum(2) - variance * (density[:, 1:] - density[:, :1])
    gram = torch.einsum("npe,nqe->npq", d, d)
    rest = torch.einsum("npq,nq->np", torch.linalg.pinv(gram, rtol=1e-6, hermitian=True), right)
    return torch.cat([1 - rest.sum(1, keepdim=True), rest], 1)
