"""What an on-policy algorithm is made of: likelihood, advantage, surrogate, penalties and an optimization plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffalign.rl.advantages import AdvantageEstimator
from diffalign.rl.likelihoods import Likelihood
from diffalign.rl.starts import Start
from diffalign.rl.surrogates import Surrogate
from diffalign.spec import spec


@spec
class Optimization:
    """How gradients are taken, the same for every algorithm.

    epochs x minibatches optimizer steps per rollout; microbatch_rows bounds memory and does not change the result.
    ratio_tolerance: largest |log ratio| in nats allowed on the first minibatch after a rollout.
    ema_decay: keep averaged policy weights (per optimizer step), used for evaluation. critic_warmup: iterations in
    which only the critic learns. decay_iterations: the learning rates fall by a cosine to 0 over this many iterations
    and stay there; null keeps them. A policy gradient is mostly noise: at a constant rate the weights wander at a
    distance from the optimum that falls with the rate. skip_zero_advantage: decisions without an advantage (groups of
    equal rewards, what `extremes` leaves out) are not computed, and the loss is the mean over the others.
    """

    learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    microbatch_rows: int = 4096
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    ratio_tolerance: float = 0.05
    critic_warmup: int = 0
    decay_iterations: int | None = None
    skip_zero_advantage: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "microbatch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.decay_iterations is not None and self.decay_iterations < 1:
            raise ValueError(f"decay_iterations must be at least 1 or null, got {self.decay_iterations}")
        for name in ("learning_rate", "critic_learning_rate", "ratio_tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class OnPolicy:
    """A composition of pieces; the algorithm specs build it.

    reference_kl / reference_velocity hold the policy near the frozen reference, ema_velocity near its own average,
    behavior_cloning near demonstrations; entropy rewards that of a denoising step, per number of the event; value_loss
    weighs the critic's squared error. behavior: which weights make
    the rollouts and count as the old policy, the live ones or their average (DiffusionNFT's soft-updated old policy).
    reference_target: the distance that the reference penalty is adapted to (see `adaptive`), null keeps its strength.

    Raises: ValueError where the pieces do not fit each other.
    """

    likelihood: Likelihood
    advantage: AdvantageEstimator
    surrogate: Surrogate
    optimization: Optimization
    reference_kl: float = 0.0
    reference_velocity: float = 0.0
    ema_velocity: float = 0.0
    behavior_cloning: float = 0.0
    entropy: float = 0.0
    value_loss: float = 0.5
    behavior: Literal["live", "averaged"] = "live"
    reference_target: float | None = None

    def __post_init__(self) -> None:
        for name in ("reference_kl", "reference_velocity", "ema_velocity", "behavior_cloning", "entropy",
                     "value_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        gives = self.likelihood.provides
        if self.surrogate.needs is not None and self.surrogate.needs not in gives:
            raise ValueError(f"{type(self.surrogate).__name__} needs the {self.surrogate.needs} of the rollout policy, "
                             f"which the {type(self.likelihood).__name__} likelihood has not; use PPOClip or SimplePO")
        if self.reference_kl and "density" not in gives:
            raise ValueError(f"reference_kl={self.reference_kl} needs Gaussian steps, which the "
                             f"{type(self.likelihood).__name__} likelihood has not; use reference_velocity")
        if self.entropy and "gaussian step" not in gives:
            raise ValueError(f"entropy={self.entropy} needs Gaussian denoising steps, which the "
                             f"{type(self.likelihood).__name__} likelihood has not; set it to 0")
        if (self.reference_velocity or self.ema_velocity) and "prediction" not in gives:
            raise ValueError(f"reference_velocity={self.reference_velocity} and ema_velocity={self.ema_velocity} need "
                             f"the denoiser's predictions, which the {type(self.likelihood).__name__} likelihood has "
                             "not; use reference_kl")
        if self.behavior == "averaged" and ("density" in gives or self.optimization.ema_decay is None):
            raise ValueError("averaged rollouts need averaged weights (set optimization.ema_decay) and a loss without "
                             f"a likelihood ratio, got ema_decay={self.optimization.ema_decay} and the "
                             f"{type(self.likelihood).__name__} likelihood")
        if self.reference_target is not None and not (self.reference_target > 0 and self.needs_reference):
            raise ValueError(f"reference_target={self.reference_target} must be positive and needs a penalty to adapt; "
                             "set reference_kl or reference_velocity, its strength at the start")
        if self.ema_velocity and self.optimization.ema_decay is None:
            raise ValueError(f"ema_velocity={self.ema_velocity} needs averaged weights; set optimization.ema_decay")

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference denoiser must be given."""
        return self.reference_kl > 0 or self.reference_velocity > 0

    def require_steering(self, hidden: Sequence[int] | None) -> None:
        """Raises: ValueError unless a job steers its initial noise just where the likelihood is that of the noise."""
        if (hidden is not None) != isinstance(self.likelihood, Start):
            what = "needs" if hidden is None else "cannot use"
            raise ValueError(f"the {type(self.likelihood).__name__} likelihood {what} a learned initial noise, got "
                             f"steering={hidden}; take noise_ppo with steering, e.g. [256, 256], or neither")

    @property
    def needs_critic(self) -> bool:
        """Whether state.modules must hold a "critic"."""
        return self.advantage.needs_critic
