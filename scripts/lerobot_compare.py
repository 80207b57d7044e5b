"""A run's policy beside what lerobot makes of its exported folder in a process of its own: do the actions differ?

    python scripts/lerobot_compare.py RUN FOLDER DEMONSTRATIONS
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from diffalign.cli.jobs import open_run
from diffalign_robot.data.formats import read
from diffalign_robot.evaluate import evaluation_policy
from diffalign_robot.source import chunk_denoiser


def main() -> None:
    run, job = open_run(Path(sys.argv[1]))
    policy = evaluation_policy(job.trained_policy(run), job.evaluation.sampler)
    network, (first, last) = chunk_denoiser(policy), policy.executed
    episodes = read(Path(sys.argv[3])).episodes
    length = int(episodes.lengths.min()) // (last - first) * (last - first)
    obs = torch.stack([episodes.obs[start : start + length] for start, _ in episodes.spans()], 1)
    noise = torch.randn(length, obs.shape[1], *policy.event, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "given.npz", Path(folder) / "out.npy"
        np.savez(given, obs=obs.numpy(), noise=noise.numpy())
        alone = Path(__file__).with_name("lerobot_actions.py")
        subprocess.run([sys.executable, str(alone), str(Path(sys.argv[2]).resolve()), str(given), str(out)],
                       check=True, cwd=folder)
        theirs = torch.from_numpy(np.load(out))
    ours = []
    for step in range(0, length, last - first):
        seen = torch.cat([obs[max(step - age, 0)] for age in reversed(range(network.history))], 1)
        generator = torch.Generator().manual_seed(0)
        steps = [torch.randn(noise[step].shape, generator=generator) for _ in range(policy.schedule.steps)]
        decision = policy.act({"obs": seen}, generator=generator, noise=noise[step], step_noise=torch.stack(steps, 1))
        ours.append(network.action_normalizer.unnormalize(decision.action).transpose(0, 1))
    difference = (torch.cat(ours) - theirs).abs().max()
    print(f"{theirs.shape[0] * theirs.shape[1]} actions of {obs.shape[1]} recorded episodes: ours and lerobot's differ "
          f"by at most {difference:.2g}")
    if not difference <= 1e-5:
        raise SystemExit("that is more than 1e-5")


if __name__ == "__main__":
    main()
