"""Fine-tune a chunk policy in an environment: DPPO on MuJoCo's inverted pendulum, from scratch."""

from dataclasses import replace
from itertools import islice

from diffalign.algorithms import DPPO
from diffalign.diffusion import DDPM
from diffalign.policy.normalize import Normalizer
from diffalign.rl.critics import ValueNet
from diffalign.rl.surrogates import PPOClip
from diffalign.train.on_policy import optimize
from diffalign.train.state import TrainState
from diffalign_robot.choices import ChunkMLP, Gymnasium
from diffalign_robot.runs import build_policy
from diffalign_robot.source import EnvSource
from diffalign_robot.vector import ChunkVectorEnv

env = ChunkVectorEnv(Gymnasium(id="InvertedPendulum-v5", horizon=200), count=32)
actions = Normalizer(env.action_dim)
actions.scale.fill_(float(env.action_high[0]))  # chunks are normalized to [-1, 1]
policy = build_policy(ChunkMLP(width=128), chunk=1, obs_dim=env.obs_dim, action_dim=env.action_dim, denoising_steps=5,
                      normalizers=(Normalizer(env.obs_dim), actions))
policy = replace(policy, kernel=DDPM(min_std=0.1))  # the floor explores
critic = ValueNet(env.obs_dim, hidden=(128, 128))
plan = DPPO(surrogate=PPOClip(low=0.2, high=0.2)).compose()  # 0.2 nats
state = TrainState.create({"policy": policy.denoiser, "critic": critic}, {"policy": 1e-3, "critic": 3e-3}, seed=0)
for iteration in islice(optimize(plan, policy, EnvSource(env), state), 30):
    if iteration.step % 5 == 0:
        print(iteration.step, f"return {iteration.metrics['return']:.0f}")  # noqa: T201
