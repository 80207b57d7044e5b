"""Train robomimic's diffusion policy on an HDF5 of states: robomimic alone, nothing of diffalign.

    python scripts/robomimic_train.py DATA.hdf5 OUT.pth --steps 1500

robomimic 0.5 hands nothing of algo.unet on to its U-Net, which has 66 million numbers whatever the config says: a step
on one core takes 2 s. --down-dims is for a robomimic that hands it on (docs/robomimic.md).
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import h5py
import torch
from robomimic.config import config_factory
from robomimic.scripts.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--down-dims", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with h5py.File(args.data) as file:
        keys = list(file["data/demo_0/obs"])
    config = config_factory("diffusion_policy")
    with tempfile.TemporaryDirectory() as folder, config.values_unlocked():
        config.experiment.name, config.train.output_dir = "policy", folder
        config.train.data, config.train.seed, config.train.cuda = str(args.data.resolve()), args.seed, False
        config.observation.modalities.obs.low_dim = keys
        config.train.hdf5_normalize_obs = True
        config.train.action_config["actions"]["normalization"] = "min_max"
        config.train.frame_stack, config.train.seq_length = 2, 8
        config.algo.horizon.action_horizon, config.algo.horizon.prediction_horizon = 6, 8
        config.algo.unet.down_dims = args.down_dims
        config.algo.unet.diffusion_step_embed_dim = min(args.down_dims)
        config.algo.ddpm.enabled, config.algo.ddim.enabled = False, True
        config.algo.ddim.num_inference_timesteps = 10
        config.algo.optim_params.policy.learning_rate.initial = 1e-3
        config.algo.optim_params.policy.learning_rate.warmup_steps = 50
        config.train.batch_size, config.train.num_epochs = 128, 1
        config.experiment.epoch_every_n_steps = args.steps
        config.experiment.rollout.enabled = config.experiment.render_video = False
        config.experiment.save.enabled = config.experiment.logging.log_tb = False
        config.experiment.logging.terminal_output_to_txt = False
        config.lock()
        train(config, device=torch.device("cpu"))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(next(Path(folder).glob("policy/*/last.pth")), args.out)


if __name__ == "__main__":
    main()
