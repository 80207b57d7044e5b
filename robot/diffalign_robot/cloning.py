"""The job that clones demonstrations into a chunked diffusion or flow policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.normalize import FAR, Normalizer
from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign.train.supervised import Batch, Pretraining, fit, fresh_state
from diffalign_robot.choices import ChunkMLP, Environment, Network
from diffalign_robot.data.formats import load_demonstrations
from diffalign_robot.demos import Demonstrations
from diffalign_robot.evaluation import Evaluation, evaluate_and_log, evaluate_run, film, open_env, sample_videos
from diffalign_robot.image_choices import Encoder
from diffalign_robot.runs import build_policy, load_policy
from diffalign_robot.source import chunk_denoiser
from diffalign_robot.vision import ImageEncoder, shifted_images


@spec
class RobotBC:
    """Behaviour cloning of a chunk policy from the demonstrations in the run folder `base`.

    prediction: eps and x0 make a DDPM of denoising_steps steps, flow a rectified flow of as many Euler steps. x0 with
    denoising_steps 1 is plain regression, the mean of a Gaussian policy; its initial noise is an input it need not use.
    history: how many observations, one a control step, the policy sees (Diffusion Policy's n_obs_steps). encoder: what
    reads the environment's images; it is trained with the rest, on randomly shifted ones.
    normalizers_of: the run folder of a policy whose normalizers are taken instead of fitted ones, for policies that are
    to be composed: their noisy chunks must be in the same space.
    """

    type: Literal["robot_bc"] = "robot_bc"
    base: str
    normalizers_of: str | None = None
    environment: Environment
    network: Network = ChunkMLP()
    encoder: Encoder | None = None
    prediction: Literal["eps", "x0", "flow"] = "eps"
    chunk: int = 4
    history: int = 1
    denoising_steps: int = 10
    pretraining: Pretraining = Pretraining(steps=2500, time="grid")
    evaluation: Evaluation = Evaluation()
    num_envs: int = 50
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("chunk", "history", "denoising_steps", "num_envs", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if (self.encoder is None) != (self.environment.images is None):
            raise ValueError("encoder and environment.images go together: set both, or neither; got "
                             f"{self.encoder} and {self.environment.images}")
        if self.encoder is not None and self.normalizers_of is not None:
            raise ValueError("normalizers_of is for policies that are to be composed, which those that see images "
                             "cannot be; leave it out")

    def train(self, run: Run) -> None:
        """Fit, save every 500 steps, evaluate the averaged weights at the end."""
        data = load_demonstrations(self.base, self.environment)
        policy, batch = self._build(data)
        module = policy.denoiser
        assert isinstance(module, torch.nn.Module)
        plan = self.pretraining
        state = fresh_state(plan, module, seed=self.seed)
        run.restore(state)
        run.total = plan.steps
        for iteration in fit(plan, policy, batch, state):
            if iteration.step % 50 == 0 or iteration.step == plan.steps:
                run.log(iteration.step, iteration.metrics)
            if iteration.step % 500 == 0 or iteration.step == plan.steps:
                run.save(state)
        env = open_env(self.environment, policy, self.num_envs, self.workers)
        with state.ema_modules():
            evaluate_and_log(run, policy, env, self.evaluation, seed=self.seed, step=state.step, name="after")
            film(run, policy, self.environment, self.evaluation, seed=self.seed, name="after")
        env.close()

    evaluate = evaluate_run
    sample = sample_videos

    def trained_policy(self, run: Run) -> DiffusionPolicy:
        """The averaged policy of the newest checkpoint."""
        return load_policy(run.path)

    def _build(self, data: Demonstrations) -> tuple[DiffusionPolicy, Batch]:
        """An untrained policy with the data's normalizers, and its batches of normalized chunks."""
        normalizers = self._normalizers(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder = None
            if self.encoder is not None and self.environment.images is not None:
                encoder = ImageEncoder(self.encoder, self.environment.images)
                normalizers = normalizers[0].extended(encoder.features), normalizers[1]
            obs_dim, action_dim = (len(normalizer.shift) for normalizer in normalizers)
            policy = build_policy(self.network, self.chunk, obs_dim, action_dim, self.denoising_steps, encoder=encoder,
                                  prediction=self.prediction, normalizers=normalizers, history=self.history)
        return policy, batches_for(policy, [data], self.pretraining.batch_size)

    def _normalizers(self, data: Demonstrations) -> tuple[Normalizer, Normalizer]:
        if self.normalizers_of is None:
            seen = Normalizer.fit(data.obs, limit=FAR)
            every = seen.followed_by(*[seen] * (self.history - 1))  # the same for each observation of a history
            return every, Normalizer.fit(data.action, "limits")
        other = chunk_denoiser(load_policy(Path(self.normalizers_of)))
        if other.history != self.history:
            raise ValueError(f"{self.normalizers_of} has a history of {other.history} observations, this policy one of "
                             f"{self.history}; set history to {other.history}")
        return other.observation_normalizer, other.action_normalizer


def normalized_windows(policy: DiffusionPolicy, data: Demonstrations) -> tuple[Cond, torch.Tensor]:
    """(the condition at every window [N], obs with the policy's history, and the normalized chunks [N, Ta, Da]).

    A policy that executes a part of its event denoises the actions just before the observation too.
    """
    network, chunk = chunk_denoiser(policy), policy.event[0]
    lead = 0 if policy.executed is None else policy.executed[0]
    starts = data.starts(chunk)
    cond = data.with_history(network.history).seen(starts + lead)
    return cond, network.action_normalizer.normalize(data.chunks(starts, chunk))


def demonstration_batches(obs: torch.Tensor, chunks: torch.Tensor, size: int, *, image: torch.Tensor | None = None,
                          shift: int = 0) -> Batch:
    """Random batches of (normalized chunk, condition), with replacement; images are moved by up to `shift` pixels."""

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        index = torch.randint(len(obs), (size,), generator=generator)
        if image is None:
            return chunks[index], {"obs": obs[index]}
        return chunks[index], {"obs": obs[index], "image": shifted_images(image[index], shift, generator)}

    return batch


def batches_for(policy: DiffusionPolicy, data: Sequence[Demonstrations], size: int) -> Batch:
    """Random batches of the policy's windows of demonstrations, images moved as its encoder asks in training.

    A frozen encoder sees every image once, here and where it is: the batches hold its features.
    """
    network = chunk_denoiser(policy)
    windows = [normalized_windows(policy, part) for part in data]
    cond = {name: torch.cat([part[name] for part, _ in windows]) for name in windows[0][0]}
    if network.frozen_encoder:
        with torch.no_grad():
            cond = dict(network.encode(cond))
    return demonstration_batches(cond["obs"], torch.cat([chunks for _, chunks in windows]), size,
                                 image=cond.get("image"), shift=0 if network.encoder is None else network.encoder.shift)
