"""Align a small flow model on a reward: Flow-GRPO with the CPS kernel on 2-number "images" of two prompts."""

from itertools import islice

import torch
from torch import nn

from diffalign.algorithms import FlowGRPO
from diffalign.diffusion import CPS, FlowPath, Schedule
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.rl.rollouts import image_rollout
from diffalign.rl.surrogates import PPOClip
from diffalign.train.on_policy import Optimization, optimize
from diffalign.train.state import TrainState


class Denoiser(nn.Module):  # any network with a prediction kind: eps, x0, v or flow
    prediction = "flow"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Mish(), nn.Linear(64, 2))

    def forward(self, x, t, cond):
        return self.net(torch.cat([x, t[:, None], cond["prompt"]], 1))


class Prompts:  # any source of rollouts: draw conditions, act, reward
    def collect(self, policy, *, generator):
        prompt = torch.arange(2).repeat_interleave(16)
        trajectory = policy.act({"prompt": prompt[:, None].float()}, generator=generator).trajectory
        reward = -(trajectory.sample - prompt[:, None]).square().sum(1)
        return image_rollout(trajectory, reward, group=prompt, prompt=prompt, stats={})


denoiser = Denoiser()
policy = DiffusionPolicy(denoiser, FlowPath(), CPS(noise_level=0.8), Schedule(steps=8), event=(2,))
plan = FlowGRPO(surrogate=PPOClip(low=0.2, high=0.2), optimization=Optimization(learning_rate=3e-3, epochs=4)).compose()
state = TrainState.create({"policy": denoiser}, {"policy": plan.optimization.learning_rate}, seed=0)
for iteration in islice(optimize(plan, policy, Prompts(), state), 40):
    if iteration.step % 10 == 0:
        print(iteration.step, f"reward {iteration.metrics['reward/mean']:.3f}")  # noqa: T201
