"""What every robot job with a policy shares: how it evaluates and films itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from diffalign.spec import spec
from diffalign.train.run import Run
from diffalign_robot.choices import Environment, MetaWorld
from diffalign_robot.evaluate import RobotPolicy, Sampler, evaluate, evaluation_policy, record
from diffalign_robot.queued import for_policy
from diffalign_robot.runs import require_same_shapes
from diffalign_robot.source import chunk_denoiser
from diffalign_robot.vector import ChunkVectorEnv, VectorEnv


@spec
class Evaluation:
    """Episodes per evaluation, how actions are sampled, every how many iterations, and how many episodes to film.

    sampler: `stochastic` = the policy's own chain without exploration floors, `zero_noise` = ODE from x = 0, `ode`.
    """

    episodes: int = 100
    sampler: Sampler = "stochastic"
    every: int = 10
    videos: int = 3

    def __post_init__(self) -> None:
        if self.episodes < 2 or self.every < 1 or self.videos < 0:
            raise ValueError("need episodes >= 2, every >= 1, videos >= 0; "
                             f"got {self.episodes}, {self.every}, {self.videos}")


def open_env(environment: Environment, policy: RobotPolicy, num_envs: int, workers: int) -> VectorEnv:
    """The environment for a policy, with its queue if it has one.

    Raises: ValueError if the policy was trained for another one.
    """
    network = chunk_denoiser(policy)
    env = ChunkVectorEnv(environment, num_envs, workers=workers, history=network.history)
    require_same_shapes((env.obs_dim, env.action_dim), (network.obs_dim, network.event[1]), environment)
    seen = None if network.encoder is None else network.encoder.shape
    if seen != (None if environment.images is None else environment.images.shape):
        raise ValueError(f"the policy sees images of the shape {seen} (cameras, 3, size, size; None is none), but "
                         f"{environment} shows others; choose the matching base or environment")
    return for_policy(env, policy)


class TrainedJob(Protocol):
    """A robot job whose run holds a policy: what its evaluation needs."""

    @property
    def environment(self) -> Environment: ...
    @property
    def evaluation(self) -> Evaluation: ...
    @property
    def num_envs(self) -> int: ...
    @property
    def workers(self) -> int: ...
    def trained_policy(self, run: Run) -> RobotPolicy: ...


def evaluate_run(job: TrainedJob, run: Run, *, seed: int, episodes: int | None = None, sampler: Sampler | None = None
                 ) -> dict[str, Any]:
    """Success rate of a finished run's policy; None takes the job's own. Jobs have it as their `evaluate`."""
    plan, policy = job.evaluation, job.trained_policy(run)
    sampler = sampler or plan.sampler
    env = open_env(job.environment, evaluation_policy(policy, sampler), job.num_envs, job.workers)
    try:
        return evaluate(policy, env, seed=seed, episodes=episodes or plan.episodes, sampler=sampler)
    finally:
        env.close()


def evaluate_and_log(run: Run, policy: RobotPolicy, env: VectorEnv, plan: Evaluation, *, seed: int, step: int,
                     name: str) -> dict[str, Any]:
    """Evaluate, append an eval line to the log and write evaluations/<name>.json."""
    result = evaluate(policy, env, seed=seed, episodes=plan.episodes, sampler=plan.sampler)
    low, high = result["interval"]
    run.log(step, {"success_rate": result["success_rate"], "success_low": low, "success_high": high,
                   "return": result["return_mean"]}, phase="eval")
    run.write_json(f"evaluations/{name}.json", {**result, "step": step})
    return result


def film(run: Run, policy: RobotPolicy, environment: Environment, plan: Evaluation, *, seed: int, name: str
         ) -> None:
    """Write videos/<name>.mp4 where the environment can be rendered."""
    if plan.videos and (isinstance(environment, MetaWorld) or environment.images is not None):
        record(policy, environment, run.folder("videos") / f"{name}.mp4", seed=seed, count=plan.videos,
               sampler=plan.sampler)


def sample_videos(job: TrainedJob, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
    """One video of a finished run's policy per episode seed, out/episode_<i>.mp4. Jobs have it as their `sample`."""
    policy = job.trained_policy(run)
    return [record(policy, job.environment, out / f"episode_{i}.mp4", seed=seed + i, count=1,
                   sampler=job.evaluation.sampler) for i in range(count)]
