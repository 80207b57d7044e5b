"""Tiny real problems: an exact Gaussian denoiser, an image-like task with a known optimum, a point-mass robot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffalign.diffusion import FlowPath, Path, Schedule, VPPath
from diffalign.diffusion.paths import Prediction
from diffalign.diffusion.trajectories import Cond, concatenate
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.rollouts import Rollout, image_rollout


class GaussianDenoiser(nn.Module):
    """The exact denoiser of data N(mean, std^2 I), in any prediction kind and on any path."""

    def __init__(self, path: Path, prediction: Prediction, mean: float = 0.7, std: float = 0.5) -> None:
        super().__init__()
        self.path, self.prediction, self.mean, self.std = path, prediction, mean, std
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = self.path.level(t, x.ndim - 1)
        variance = alpha**2 * self.std**2 + sigma**2
        x0 = self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean)
        eps = sigma / variance * (x - alpha * self.mean)
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[self.prediction]


class MLPDenoiser(nn.Module):
    """A small trainable denoiser of [N, 2] events conditioned on cond["obs"] [N, D]."""

    def __init__(self, obs_dim: int = 1, prediction: Prediction = "flow", event: int = 2, hidden: int = 32) -> None:
        super().__init__()
        self.prediction = prediction
        self.net = nn.Sequential(nn.Linear(event + 1 + obs_dim, hidden), nn.Mish(), nn.Linear(hidden, hidden),
                                 nn.Mish(), nn.Linear(hidden, event))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.net(torch.cat([x.flatten(1), t[:, None], cond["obs"]], 1)).reshape(x.shape)


def toy_policy(denoiser: nn.Module, kernel, *, steps: int = 5, event: tuple[int, ...] = (2,), path: Path | None = None,
               **options) -> DiffusionPolicy:
    path = path or (FlowPath() if denoiser.prediction == "flow" else VPPath(train_steps=steps))
    return DiffusionPolicy(denoiser, path, kernel, Schedule(steps=steps), event, **options)


class PromptBandit:
    """Image-like: prompt p in {0, 1} has its own target; the reward is minus the squared distance to it."""

    def __init__(self, prompts: int = 2, images: int = 16) -> None:
        self.prompts, self.images = prompts, images

    def collect(self, policy: DiffusionPolicy, *, generator: torch.Generator) -> Rollout:
        prompt = torch.arange(self.prompts).repeat_interleave(self.images)
        trajectory = policy.act({"obs": prompt[:, None].float()}, generator=generator).trajectory
        target = torch.stack([2 * prompt - 1.0, 0 * prompt + 0.5], 1)
        reward = -((trajectory.sample - target) ** 2).sum(1)
        return image_rollout(trajectory, reward, prompt, prompt, {})


class PointMass:
    """Robot-like: steer a point on a line to 0 in at most 6 decisions; reaching |x| < 0.2 terminates with reward 1."""

    def __init__(self, episodes: int = 32, limit: int = 6) -> None:
        self.episodes, self.limit = episodes, limit

    def collect(self, policy: DiffusionPolicy, *, generator: torch.Generator) -> Rollout:
        position = 2 * torch.rand(self.episodes, generator=generator) - 1
        position = position.sign() * (position.abs() + 0.5)
        alive = torch.ones(self.episodes, dtype=torch.bool)
        decisions, rewards, ends, cuts, valid, after = [], [], [], [], [], []
        for h in range(self.limit):
            decision = policy.act({"obs": position[:, None]}, generator=generator)
            position = torch.where(alive, position + 0.3 * decision.action[:, 0].clamp(-1, 1), position)
            reached = position.abs() < 0.2
            decisions.append(decision)
            rewards.append((reached & alive).float() - 0.1 * position.abs() * alive)
            ends.append(reached & alive)
            cuts.append(alive & ~reached & (h == self.limit - 1))
            valid.append(alive)
            after.append(position[:, None])
            alive = alive & ~reached
        stack = torch.stack
        signals = {name: torch.cat([d.signals[name] for d in decisions]) for name in decisions[0].signals}
        return Rollout(concatenate([d.trajectory for d in decisions]), stack(rewards), stack(ends), stack(cuts),
                       stack(valid), {"obs": torch.cat(after)}, torch.arange(self.episodes),
                       torch.arange(self.episodes),
                       {"success_rate": float(stack(ends).any(0).float().mean())},
                       signals)

