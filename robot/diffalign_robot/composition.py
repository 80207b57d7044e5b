"""The job that searches the weights of a composition of several policies (GPC)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.diffusion import DDPM
from diffalign.policy.compose import compose, noise_predictions
from diffalign.policy.diffusion import DiffusionPolicy
from diffalign.policy.protocols import select_rows
from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign.train.search import found_weights, search_weights
from diffalign_robot.choices import Environment
from diffalign_robot.cloning import normalized_windows
from diffalign_robot.data.formats import load_demonstrations
from diffalign_robot.evaluate import evaluate
from diffalign_robot.evaluation import Evaluation, evaluate_and_log, evaluate_run, film, open_env, sample_videos
from diffalign_robot.runs import load_policy
from diffalign_robot.source import chunk_denoiser
from diffalign_robot.vector import VectorEnv

_SEARCH_SEED = 7_000  # episode seeds of the search, apart from those of evaluations


@spec
class RobotCompose:
    """A convex composition of the policies in the run folders `parents`; no training.

    Candidate weights (two parents: a grid of `grid` + 1 weights, more: as many random ones) play `episodes` episodes;
    the better half goes on with twice as many until one is left, on episodes that no evaluation uses. The winner and
    every parent are then evaluated alike on fresh episodes. data: a run folder of demonstrations for the screen
    (disagreement) and the closed-form weights, which are reported and, for two parents, join the candidates.
    """

    type: Literal["robot_compose"] = "robot_compose"
    parents: tuple[str, ...]
    data: str
    environment: Environment
    grid: int = 10
    episodes: int = 50
    evaluation: Evaluation = Evaluation(episodes=300)
    num_envs: int = 50
    workers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.parents) < 2:
            raise ValueError(f"a composition needs at least two parents, got {list(self.parents)}")
        for name in ("grid", "num_envs", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.environment.images is not None:
            raise ValueError("policies that see images cannot be composed yet: every step would read them again for "
                             "every parent; use policies of the state")
        if self.episodes < 2:
            raise ValueError(f"episodes must be at least 2, got {self.episodes}")

    def train(self, run: Run) -> None:
        """Screen, search, evaluate afresh, and write composition.json; a finished search is kept."""
        policies = self._parents()
        env = open_env(self.environment, policies[0], self.num_envs, self.workers)
        try:
            if not (run.path / "composition.json").is_file():
                run.write_json("composition.json", self._search(run, policies, env))
            for number, (folder, parent) in enumerate(zip(self.parents, policies, strict=True)):
                if not (run.path / f"evaluations/parent_{number}.json").is_file():
                    result = evaluate(parent, env, seed=self.seed, episodes=self.evaluation.episodes,
                                      sampler=self.evaluation.sampler)
                    run.write_json(f"evaluations/parent_{number}.json", {**result, "step": 0, "run": folder})
            policy = self.trained_policy(run)
            evaluate_and_log(run, policy, env, self.evaluation, seed=self.seed, step=1, name="after")
            film(run, policy, self.environment, self.evaluation, seed=self.seed, name="after")
        finally:
            env.close()

    evaluate = evaluate_run
    sample = sample_videos

    def _parents(self) -> list[DiffusionPolicy]:
        policies = [load_policy(Path(folder)).with_sampler(DDPM()) for folder in self.parents]
        first = chunk_denoiser(policies[0]).action_normalizer
        for folder, policy in zip(self.parents[1:], policies[1:], strict=True):
            seen = [chunk_denoiser(one).history for one in (policies[0], policy)]
            if seen[0] != seen[1]:
                raise ValueError(f"{folder} has a history of {seen[1]} observations and {self.parents[0]} one of "
                                 f"{seen[0]}; compose policies that see the same")
            other = chunk_denoiser(policy).action_normalizer
            if not (torch.allclose(first.shift, other.shift, atol=1e-3)
                    and torch.allclose(first.scale, other.scale, atol=1e-3)):
                raise ValueError(f"{folder} normalizes actions differently from {self.parents[0]} (shift "
                                 f"{other.shift.tolist()} and {first.shift.tolist()}): their noisy chunks are not in "
                                 "the same space; clone the second with normalizers_of: the first")
        return policies

    def _search(self, run: Run, policies: list[DiffusionPolicy], env: VectorEnv) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        data = load_demonstrations(self.data, self.environment)
        cond, chunk = normalized_windows(policies[0], data)
        some = torch.randint(len(chunk), (min(512, len(chunk)),), generator=generator)
        predictions, eps = noise_predictions(policies, chunk[some], select_rows(cond, some), count=8,
                                             generator=generator)
        rounds = 0

        def play(weights: tuple[float, ...], episodes: int) -> float:
            nonlocal rounds
            rounds += 1
            result = evaluate(compose(policies, weights), env, seed=_SEARCH_SEED + self.seed, episodes=episodes,
                              sampler=self.evaluation.sampler)
            run.log(rounds, {"success_rate": result["success_rate"],
                             **{f"weight/{i}": w for i, w in enumerate(weights)}})
            return float(result["success_rate"])

        found = search_weights(predictions, eps, play, grid=self.grid, episodes=self.episodes, generator=generator)
        return {**found, "parents": list(self.parents)}

    def trained_policy(self, run: Run) -> DiffusionPolicy:
        """The composition that the search found. Raises: ValueError if there was no search yet."""
        weights = found_weights(run.path)
        return compose(self._parents(), weights)
