"""The actions of robomimic's policy on recorded observations: robomimic alone, nothing of diffalign.

    python scripts/robomimic_actions.py POLICY.pth OBS.npy OUT.npy      # OBS [episodes, steps, features]

Before every step of episode e the noise is seeded with e; observations are stacked as its FrameStackWrapper does.
"""

import sys

import numpy as np
import torch
from robomimic.utils.file_utils import policy_from_checkpoint


def main() -> None:
    file, given, out = sys.argv[1:]
    torch.set_num_threads(1)
    policy, stored = policy_from_checkpoint(ckpt_path=file, device=torch.device("cpu"))
    if any(name.startswith("diffalign") for name in sys.modules):
        raise SystemExit("diffalign is loaded: this is no test of what robomimic does alone")
    [key] = stored["shape_metadata"]["all_shapes"]
    frames = policy.policy.algo_config.horizon.observation_horizon
    actions = []
    for number, episode in enumerate(np.load(given)):
        policy.start_episode()
        for step in range(len(episode)):
            torch.manual_seed(number)
            seen = episode[[max(step - age, 0) for age in reversed(range(frames))]]
            actions.append(policy({key: seen}))
    np.save(out, np.stack(actions))


if __name__ == "__main__":
    main()
