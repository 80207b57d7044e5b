"""How much of a policy gradient is signal: cosine between the gradients of two halves of one batch of images.

    python scripts/image_signal.py runs/shapes-pretrain

prints, per denoising step and reward, the cosine for the transition likelihood (Flow-GRPO, DDPO) and for the matching
likelihood (AWM). The reading is in docs/image_signal.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from diffalign.diffusion import CPS, FlowPath, Schedule
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import select_rows
from diffalign.rl.advantages import group_normalized
from diffalign_image import pipeline
from diffalign_image.autoencoder import decode_latents
from diffalign_image.rewards import Jpeg, Verifiable
from diffalign_image.source import training_prompts

PROMPTS = IMAGES = 16
Score = Callable[[Tensor], Tensor]  # rows -> log-likelihood of each


def main() -> None:
    """Roll out once, then two gradients per step, likelihood and reward."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="run folder of an image model")
    parts = pipeline.load(parser.parse_args().run)
    policy = DiffusionPolicy(parts.denoiser, FlowPath(), CPS(noise_level=0.8), Schedule(steps=8, shift=3.0),
                             parts.denoiser.event)
    source = training_prompts(parts, Verifiable(), prompts=PROMPTS, images_per_prompt=IMAGES)
    rollout = source.collect(policy, generator=torch.Generator().manual_seed(5))
    path = rollout.trajectory
    rewards = {"verifiable": rollout.reward[0], "jpeg": Jpeg()(decode_latents(parts.autoencoder, path.sample), [])}
    advantages = {name: group_normalized(r, rollout.group, scale="batch") for name, r in rewards.items()}
    eps = torch.randn(path.sample.shape, generator=torch.Generator().manual_seed(1))

    def transition(k: int) -> Score:
        def score(rows: Tensor) -> Tensor:
            x, t, t_next = path.x[rows, k], *(path.times[k + i].expand(len(rows)) for i in (0, 1))
            step = policy.step(x, t, t_next, *policy.predict(x, t, select_rows(path.cond, rows)))
            return step.log_prob(path.x[rows, k + 1])
        return score

    def matching(k: int) -> Score:
        def score(rows: Tensor) -> Tensor:
            t, x0 = path.times[k], path.sample[rows]
            x = (1 - t) * x0 + t * eps[rows]
            velocity = policy.denoiser(x, t.expand(len(rows)), select_rows(path.cond, rows))
            return -(velocity - (eps[rows] - x0)).square().flatten(1).sum(1)
        return score

    for k in range(policy.schedule.steps):
        for name, advantage in advantages.items():
            found = [f"matching {cosine(parts.denoiser, matching(k), advantage):+.2f}"]
            if k < policy.schedule.steps - 1:
                found.append(f"transition {cosine(parts.denoiser, transition(k), advantage):+.2f}")
            print(f"t = {path.times[k]:.3f}  {name:10}  " + "  ".join(found), flush=True)


def cosine(denoiser: torch.nn.Module, score: Score, advantage: Tensor) -> float:
    """Cosine between the advantage-weighted gradients of the even and the odd rows."""
    gradients = []
    for half in (0, 1):
        denoiser.zero_grad()
        for rows in torch.arange(half, len(advantage), 2).split(64):
            (advantage[rows] * score(rows)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]))
    return float(torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0))


if __name__ == "__main__":
    main()
