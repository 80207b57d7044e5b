"""A run's policy beside what robomimic makes of its exported file in a process of its own: do the actions differ?

    python scripts/robomimic_compare.py RUN POLICY.pth DEMONSTRATIONS
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
    policy = evaluation_policy(job.trained_policy(run), "ode")
    network, (first, last) = chunk_denoiser(policy), policy.executed
    episodes = read(Path(sys.argv[3])).episodes
    length = int(episodes.lengths.min()) // (last - first) * (last - first)
    obs = torch.stack([episodes.obs[start : start + length] for start, _ in episodes.spans()])
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "obs.npy", Path(folder) / "out.npy"
        np.save(given, obs.numpy())
        alone = Path(__file__).with_name("robomimic_actions.py")
        subprocess.run([sys.executable, str(alone), str(Path(sys.argv[2]).resolve()), str(given), str(out)],
                       check=True, cwd=folder)
        theirs = torch.from_numpy(np.load(out)).float().reshape(len(obs), length, -1)
    generators = [torch.Generator().manual_seed(number) for number in range(len(obs))]
    noise = torch.cat([torch.randn(1, *policy.event, generator=generator) for generator in generators])
    ours = []
    for step in range(0, length, last - first):
        seen = torch.cat([obs[:, max(step - age, 0)] for age in reversed(range(network.history))], 1)
        decision = policy.act({"obs": seen}, generator=torch.Generator(), noise=noise)
        ours.append(network.action_normalizer.unnormalize(decision.action))
    difference = (torch.cat(ours, 1) - theirs).abs().max()
    print(f"{theirs.shape[0] * length} actions of {len(obs)} recorded episodes: ours and robomimic's differ by at most "
          f"{difference:.2g}")
    if not difference <= 1e-5:
        raise SystemExit("that is more than 1e-5")


if __name__ == "__main__":
    main()
