"""A synchronous vector of simulators that executes whole action chunks, in this process or split over a few.

Legend: B environments, Ta actions of a chunk, Da action features, Do observation features. No torch here: worker
processes import this module. Results do not depend on the number of workers: every episode has its own seed.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from diffalign_robot.cameras import Picture, images_of
from diffalign_robot.choices import Environment
from diffalign_robot.envs import Array, Episode, make
from diffalign_robot.history import HistoryEpisode

_DIED = "a simulator process died (killed or out of memory); lower num_envs or workers"


class ChunkStep(NamedTuple):
    """The outcome of one chunk per environment.

    obs [B, Do] is the observation after the last executed step and before any reset; reward [B] sums the executed
    steps only; executed [B] counts them (0 once an episode has ended); success [B] tells whether any of them succeeded.
    """

    obs: Array
    reward: Array
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    executed: NDArray[np.int64]
    success: NDArray[np.bool_]


class VectorEnv(Protocol):
    """What rollouts and evaluations need of B environments that end on their own and are reset together."""

    count: int
    obs_dim: int
    action_dim: int

    def reset(self, seeds: Sequence[int]) -> Array:
        """Start an episode per environment from its seed; the observations [B, Do]."""
        ...

    def step(self, chunks: Array) -> ChunkStep:
        """Execute one chunk [B, Ta, Da] per environment."""
        ...

    def images(self) -> Picture | None:
        """What the cameras show now [B, V, 3, S, S]; None where observations have no images."""
        ...

    def frame(self, i: int) -> Picture:
        """A picture of environment i."""
        ...

    def close(self) -> None:
        """End workers and renderers."""
        ...


def _episode(spec: Environment, history: int) -> Episode:
    episode = make(spec)
    return episode if history == 1 else HistoryEpisode(episode, history)


class _Slice:
    """Some of the environments, stepped one after the other."""

    def __init__(self, spec: Environment, count: int, history: int) -> None:
        self.episodes = [_episode(spec, history) for _ in range(count)]
        self.over = [True] * count
        self._cameras = spec.images
        self._shown: list[Picture | None] = [None] * count

    def reset(self, seeds: Sequence[int]) -> Array:
        for episode, seed in zip(self.episodes, seeds, strict=True):
            episode.reset(seed)
        self.over = [False] * len(self.episodes)
        self._shown = [None] * len(self.episodes)
        return np.stack([episode.observe() for episode in self.episodes])

    def step(self, chunks: Array) -> ChunkStep:
        results = [self._run(i, chunk) for i, chunk in enumerate(chunks)]
        columns = list(zip(*results, strict=True))
        return ChunkStep(np.stack(columns[0]), np.array(columns[1], np.float32), np.array(columns[2]),
                         np.array(columns[3]), np.array(columns[4]), np.array(columns[5]))

    def _run(self, i: int, chunk: Array) -> tuple[Array, float, bool, bool, int, bool]:
        episode, reward, executed, success = self.episodes[i], 0.0, 0, False
        terminated = truncated = False
        if not self.over[i]:
            self._shown[i] = None
            for action in chunk:
                step = episode.advance(action)
                reward, executed, success = reward + step.reward, executed + 1, success or step.success
                terminated, truncated = step.terminated, step.truncated
                if terminated or truncated:
                    self.over[i] = True
                    break
        return episode.observe(), reward, terminated, truncated, executed, success

    def images(self) -> Picture | None:
        """Those of an episode that has not moved since, e.g. because it is over, are not rendered again."""
        if self._cameras is None:
            return None
        shown = [images_of(episode.frame, self._cameras) if before is None else before
                 for episode, before in zip(self.episodes, self._shown)]
        self._shown = list(shown)
        return np.stack(shown)

    def frame(self, i: int) -> Picture:
        return self.episodes[i].frame()

    def close(self) -> None:
        for episode in self.episodes:
            episode.close()


class ChunkVectorEnv:
    """B simulators; an environment whose episode has ended idles until the next reset of all."""

    def __init__(self, spec: Environment, count: int, *, workers: int = 1, history: int = 1) -> None:
        """workers 1 steps in this process; more split the environments evenly over that many processes.

        history: how many observations, one a control step, an observation consists of.

        Raises: ValueError on counts below 1, and whatever making the environment raises.
        """
        if count < 1 or workers < 1:
            raise ValueError(f"the number of environments and workers must be at least 1, got {count} and {workers}")
        self.count, self._sees = count, spec.images is not None
        sizes = [len(part) for part in np.array_split(np.arange(count), min(workers, count))]
        self._bounds = np.cumsum([0, *sizes])
        probe = _episode(spec, history)
        self.obs_dim, self.action_dim = probe.obs_dim, probe.action_dim
        self.action_low, self.action_high = probe.action_low, probe.action_high
        probe.close()
        self._local = _Slice(spec, count, history) if len(sizes) == 1 else None
        self._workers = [] if self._local else [_Worker(spec, size, history) for size in sizes]

    def reset(self, seeds: Sequence[int]) -> Array:
        """Start an episode per environment from its seed; the observations [B, Do]."""
        if len(seeds) != self.count:
            raise ValueError(f"{self.count} environments need {self.count} seeds, got {len(seeds)}")
        if self._local:
            return self._local.reset(seeds)
        parts = [seeds[a:b] for a, b in zip(self._bounds, self._bounds[1:])]
        return np.concatenate(self._all("reset", parts))

    def step(self, chunks: Array) -> ChunkStep:
        """Execute one chunk [B, Ta, Da] per environment (actions are clipped to the limits by the simulators).

        Raises: FloatingPointError on a non-finite action, naming the environment; nothing is executed then. And on a
        non-finite observation, which a policy that holds far observations would not show in its actions.
        """
        if chunks.shape[0] != self.count or chunks.shape[2] != self.action_dim:
            raise ValueError(f"chunks must be [{self.count}, Ta, {self.action_dim}], got {chunks.shape}")
        bad = ~np.isfinite(chunks).all(axis=(1, 2))
        if bad.any():
            raise FloatingPointError(f"the action chunk of environment {int(bad.argmax())} is not finite; "
                                     "nothing was executed")
        if self._local:
            done = self._local.step(chunks)
        else:
            parts = self._all("step", [chunks[a:b] for a, b in zip(self._bounds, self._bounds[1:])])
            done = ChunkStep(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        lost = ~np.isfinite(done.obs).all(axis=1)
        if lost.any():
            where = int(lost.argmax())
            raise FloatingPointError(f"the observation of environment {where} is not finite after a chunk: "
                                     "its simulation diverged. Check the limits of its actions and its time step")
        return done

    def images(self) -> Picture | None:
        """What the cameras show now [B, V, 3, S, S]; None where observations have no images.

        A chunk is rendered once, after its last step, and only if somebody looks.
        """
        if not self._sees:
            return None
        if self._local:
            return self._local.images()
        parts: list[Picture] = self._all("images", [None] * len(self._workers))
        return np.concatenate(parts)

    def frame(self, i: int) -> Picture:
        """A picture of environment i; only without workers."""
        if self._local is None:
            raise ValueError("pictures need workers=1, because a renderer lives in one process")
        return self._local.frame(i)

    def close(self) -> None:
        """End workers and renderers."""
        if self._local:
            self._local.close()
        for worker in self._workers:
            worker.close()

    def _all(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        for worker, argument in zip(self._workers, arguments, strict=True):
            worker.send(method, argument)
        return [worker.receive() for worker in self._workers]


class _Worker:
    """A process that holds a slice."""

    def __init__(self, spec: Environment, count: int, history: int) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec, count, history), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, method: str, argument: Any) -> None:
        try:
            self._pipe.send((method, argument))
        except BrokenPipeError:
            raise RuntimeError(_DIED) from None

    def receive(self) -> Any:
        try:
            ok, result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(_DIED) from None
        if not ok:
            raise RuntimeError(f"a simulator process failed: {result}")
        return result

    def close(self) -> None:
        if self._process.is_alive():
            self.send("close", None)
        self._pipe.close()
        self._process.join(timeout=5)


def _serve(pipe: Connection, spec: Environment, count: int, history: int) -> None:
    part = _Slice(spec, count, history)
    calls: dict[str, Callable[[Any], Any]] = {"reset": part.reset, "step": part.step, "images": lambda _: part.images()}
    while True:
        try:
            method, argument = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if method == "close":
            part.close()
            return
        try:
            result = calls[method](argument)
        except Exception as error:  # sent to the parent, which raises it
            pipe.send((False, f"{type(error).__name__}: {error}"))
            return
        pipe.send((True, result))
