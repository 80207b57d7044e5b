"""The job that makes demonstrations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign.train.statistics import wilson
from diffalign_robot.choices import Environment
from diffalign_robot.demos import collect, join, scripted_expert
from diffalign_robot.evaluate import policy_actor
from diffalign_robot.runs import load_policy, packages


@spec
class RobotCollect:
    """Episodes by a scripted expert with noise, or by a trained policy: demonstrations.safetensors in the run folder.

    expert: a function without arguments, as module:function, that makes the controller of one episode (observation ->
    action); null is Meta-World's own. policy: the run folder of a policy to act instead (then action_noise is usually
    0). Either sees the whole state, also where images are recorded. action_bias is added to every action, one number
    per action feature: a controller that is out of calibration.
    """

    type: Literal["robot_collect"] = "robot_collect"
    environment: Environment
    expert: str | None = None
    policy: str | None = None
    episodes: int = 50
    action_noise: float = 0.3
    action_bias: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")
        if self.expert is not None and self.policy is not None:
            raise ValueError(f"either expert or policy acts, got {self.expert} and {self.policy}")
        if not self.action_noise >= 0:
            raise ValueError(f"action_noise must be at least 0, got {self.action_noise}")

    def train(self, run: Run) -> None:
        """Collect and save; a finished folder is left as it is."""
        if (run.path / "demonstrations.json").is_file():
            return
        (run.path / "metrics.jsonl").unlink(missing_ok=True)
        run.total = self.episodes
        seeds = [1_000_000 * (self.seed + 1) + i for i in range(self.episodes)]
        episodes = []
        if self.policy is None:
            actor = scripted_expert(self.environment, self.expert)
        else:
            actor = policy_actor(load_policy(Path(self.policy)), seed=self.seed)
        for episode in collect(self.environment, actor, seeds=seeds, action_noise=self.action_noise,
                               noise_seed=self.seed, action_bias=self.action_bias):
            episodes.append(episode)
            run.log(len(episodes), {"success": float(episode[2]), "length": float(len(episode[0]))})
        won = sum(episode[2] for episode in episodes)
        metadata = {"environment": dataclasses.asdict(self.environment), "seeds": [seeds[0], seeds[-1]],
                    "packages": packages(), "success_rate": won / len(episodes),
                    "interval": list(wilson(won, len(episodes)))}
        join(episodes).save(run.path, metadata)
