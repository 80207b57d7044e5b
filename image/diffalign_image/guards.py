"""What is watched besides the reward, so that a model that games it is noticed: distance, diversity, held-out rewards.

Legend: N images, K denoising steps, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.trajectories import DenoisingTrajectory
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import Denoiser, select_rows
from diffalign.spec import spec
from diffalign_image.rewards import OneReward
from diffalign_image.rewards.clip import load_clip

_SIDE = 32  # pixels that images are averaged to before they are compared


@spec
class Stop:
    """When training ends early; null never. What ended it is in stopped.json.

    kl_nats: the exact KL to the base, in nats per image, of a rollout. velocity_ratio: mean |velocity| over the base's.
    held_out_drop: fall of the mean of any held-out reward, and diversity_drop: of the diversity as a fraction, since
    the evaluation before training.
    """

    kl_nats: float | None = None
    velocity_ratio: float | None = None
    held_out_drop: float | None = None
    diversity_drop: float | None = None

    def __post_init__(self) -> None:
        for name in ("kl_nats", "velocity_ratio", "held_out_drop", "diversity_drop"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"stop.{name} must be positive or null, got {value}")


@spec
class Guard:
    """Measures against reward hacking.

    held_out: rewards by name that are evaluated and never trained on. images: how many of each rollout are compared
    with the base (exact KL, velocity norm), 0 for none. diversity_clip: folder or hub id of the CLIP whose features
    tell how different the images of a prompt are; null compares pixels. kl_target: the penalty reference_kl (or
    reference_velocity) is halved or doubled to hold this distance, in the unit of its metric.
    """

    held_out: Mapping[str, OneReward] | None = None
    images: int = 4
    diversity_clip: str | None = None
    kl_target: float | None = None
    stop: Stop = Stop()

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"guard.images must be at least 0, got {self.images}")
        if not self.images and (self.stop.kl_nats or self.stop.velocity_ratio):
            raise ValueError("guard.stop.kl_nats and velocity_ratio are measured on guard.images images of a rollout, "
                             "got 0; set it to 4, for example")
        if self.stop.held_out_drop and not self.held_out:
            raise ValueError("guard.stop.held_out_drop needs rewards in guard.held_out, got none")
        taken = {"reward", "diversity"} & set(self.held_out or {})
        if taken:
            raise ValueError(f"guard.held_out: the names {sorted(taken)} are taken; choose others")


@dataclass(frozen=True)
class Drift:
    """Distance of chains to a reference: the KL of each in nats [N], and the mean norms of both velocities [N]."""

    kl_nats: Float[Tensor, "N"]
    velocity: Float[Tensor, "N"]
    reference_velocity: Float[Tensor, "N"]


@torch.no_grad()
def drift(policy: DiffusionPolicy, reference: Denoiser, path: DenoisingTrajectory) -> Drift:
    """How far the policy that drew the chains is from the reference, along them.

    kl_nats is the sum over the steps that had noise of the exact Gaussian KL at the visited states: its mean is the KL
    of the two distributions of chains (chain rule). The norm of the velocity eps - x0, over the reference's, grows
    where a reward is gamed by contrast (NormGuard, arXiv 2606.27771).
    """
    anchor, rows, steps = replace(policy, denoiser=reference), len(path.x), len(path.times) - 1
    total, norms = torch.zeros(rows, device=path.x.device), []
    for k in range(steps):
        x, t, t_next = path.x[:, k], *(path.times[k + i].expand(rows) for i in (0, 1))
        found = [p.predict(x, t, path.cond) for p in (policy, anchor)]
        norms.append(torch.stack([(eps - x0).flatten(1).norm(dim=1) for x0, eps in found]))
        if policy.trained.ode_elsewhere and not bool(path.trained[k]):
            continue
        ours, theirs = (p.step(x, t, t_next, x0, eps, path.cond) for p, (x0, eps) in zip((policy, anchor), found))
        if bool((ours.std > 0).all()):
            total += ours.kl(theirs)
    ours_mean, theirs_mean = torch.stack(norms).mean(0)
    return Drift(total, ours_mean, theirs_mean)


def first_rows(path: DenoisingTrajectory, count: int) -> DenoisingTrajectory:
    """The first chains of a trajectory."""
    some = torch.arange(min(count, len(path.x)), device=path.x.device)
    return replace(path, x=path.x[some], log_prob=path.log_prob[some], mean=path.mean[some], std=path.std[some],
                   cond=select_rows(path.cond, some))


def features(images: Float[Tensor, "N *F 3 H W"], clip: str | None) -> Float[Tensor, "N D"]:
    """What images are compared by: pixels averaged to 32 x 32 (distance: root mean square), or CLIP's unit vectors.

    Of clips all frames count alike.
    """
    frames = images.flatten(0, -4)
    if clip is not None:
        found = load_clip(clip, clip, "cpu").images(frames)
        each: Tensor = found.reshape(len(images), -1)
        return each.div((len(frames) / len(images)) ** 0.5)
    small = torch.nn.functional.adaptive_avg_pool2d(
        frames, (min(_SIDE, images.shape[-2]), min(_SIDE, images.shape[-1])))
    flat: Tensor = small.reshape(len(images), -1).cpu()
    return flat.div(flat.shape[1] ** 0.5)


def diversity(found: Float[Tensor, "N D"], group: Int[Tensor, "N"]) -> float:
    """Mean over groups of the mean distance of two of their rows; groups of one row do not count, without any 0."""
    means = []
    for number in torch.unique(group).tolist():
        rows = found[group == number]
        if len(rows) > 1:
            means.append(torch.pdist(rows).mean())
    return float(torch.stack(means).mean()) if means else 0.0


class Watch:
    """Compares what is logged and evaluated with a `Stop`; `reason` says why training should end, or is None."""

    def __init__(self, stop: Stop, held_out: list[str], baseline: Mapping[str, Any] | None) -> None:
        self._stop, self._held_out, self._baseline = stop, held_out, baseline
        self.reason: str | None = None

    def iteration(self, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a rollout."""
        for name, most in (("kl_nats", self._stop.kl_nats), ("velocity_ratio", self._stop.velocity_ratio)):
            if most is not None and metrics[f"guard/{name}"] > most:
                self.reason = f"guard/{name} is {metrics[f'guard/{name}']:.4g}, above stop.{name}={most:g}"

    def evaluation(self, result: Mapping[str, Any]) -> None:
        """Look at an evaluation; the first one is what later ones are compared with."""
        if self._baseline is None:
            self._baseline = result
            return
        for name in self._held_out if self._stop.held_out_drop is not None else ():
            before, now = (one["rewards"][name]["mean"] for one in (self._baseline, result))
            if self._stop.held_out_drop is not None and before - now > self._stop.held_out_drop:
                self.reason = (f"the held-out reward {name} fell from {before:.4g} to {now:.4g}, by more than "
                               f"stop.held_out_drop={self._stop.held_out_drop:g}")
        before, now = self._baseline["diversity"], result["diversity"]
        if self._stop.diversity_drop is not None and now < (1 - self._stop.diversity_drop) * before:
            self.reason = (f"the diversity fell from {before:.4g} to {now:.4g}, by more than the fraction "
                           f"stop.diversity_drop={self._stop.diversity_drop:g}")
