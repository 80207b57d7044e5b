"""Train lerobot's own small DiffusionPolicy on a LeRobotDataset of states: lerobot alone, nothing of diffalign.

    python scripts/lerobot_train.py DATA OUT --steps 1500
"""

import argparse
from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors

SEEN = {"observation.state": FeatureType.STATE, "observation.environment_state": FeatureType.ENV}
DONE = {"action": FeatureType.ACTION}


def loaded(data: Path, config: DiffusionConfig, fps: float) -> dict[str, torch.Tensor]:
    """Every window of the data set as lerobot cuts it, in memory: its reader takes 10 ms a window."""
    indices = {**dict.fromkeys(SEEN, config.observation_delta_indices), "action": config.action_delta_indices}
    windows = LeRobotDataset(f"local/{data.name}", root=data,
                             delta_timestamps={key: [i / fps for i in steps] for key, steps in indices.items()})
    every = [windows[i] for i in range(len(windows))]
    return {key: torch.stack([one[key] for one in every]) for key in (*SEEN, "action", "action_is_pad")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    meta = LeRobotDataset(f"local/{args.data.name}", root=args.data).meta

    def features(kinds: dict[str, FeatureType]) -> dict[str, PolicyFeature]:
        return {key: PolicyFeature(kind, tuple(meta.features[key]["shape"])) for key, kind in kinds.items()}

    config = DiffusionConfig(
        n_obs_steps=2, horizon=8, n_action_steps=6, down_dims=(32, 64), diffusion_step_embed_dim=32, device="cpu",
        num_inference_steps=10, optimizer_lr=1e-3, input_features=features(SEEN), output_features=features(DONE),
        # by default the environment's state is not normalized, and a policy hardly sees centimetres
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX))
    policy = DiffusionPolicy(config)
    before, after = make_pre_post_processors(config, dataset_stats=meta.stats)
    data = loaded(args.data, config, meta.fps)
    optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    policy.train()
    for step in range(args.steps):
        index = torch.randint(len(data["action"]), (128,))
        loss, _ = policy.forward(before({key: value[index] for key, value in data.items()}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    policy.save_pretrained(args.out)
    before.save_pretrained(args.out)
    after.save_pretrained(args.out)


if __name__ == "__main__":
    main()
