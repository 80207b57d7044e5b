"""The actions of a policy folder by lerobot alone, one control step after the other; nothing of diffalign is imported.

    python scripts/lerobot_actions.py FOLDER GIVEN.npz OUT.npy

GIVEN: obs [T, N, Do] of N robots, noise [T, N, horizon, Da] for the steps that ask for a chunk. OUT: [T, N, Da]. The
noise of the denoising steps is drawn by torch from seed 0, reset before every control step.
"""

import sys

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors

KEYS = ("observation.state", "observation.environment_state")


def main() -> None:
    folder, given, out = sys.argv[1:]
    torch.set_num_threads(1)
    policy = DiffusionPolicy.from_pretrained(folder, config=PreTrainedConfig.from_pretrained(folder))
    before, after = make_pre_post_processors(policy.config, pretrained_path=folder)
    widths = [policy.config.input_features[key].shape[0] for key in KEYS]
    data, actions = np.load(given), []
    for obs, noise in zip(torch.from_numpy(data["obs"]), torch.from_numpy(data["noise"])):
        torch.manual_seed(0)
        seen = before(dict(zip(KEYS, obs.split(widths, 1))))
        actions.append(after(policy.select_action(seen, noise=noise)).numpy())
    assert not [name for name in sys.modules if name.startswith("diffalign")]
    np.save(out, np.stack(actions))


if __name__ == "__main__":
    main()
