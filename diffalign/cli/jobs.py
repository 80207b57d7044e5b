"""From a YAML file or a run folder to the job of the right adapter, imported only when it is needed."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from diffalign.train.run import Run

Sampler = Literal["stochastic", "zero_noise", "ode"]
# Known without importing an adapter; tests/test_cli.py asserts that each adapter's JOBS are exactly these.
JOB_TYPES = {
    "robot": ("robot_collect", "robot_bc", "robot_import", "robot_align", "robot_off_policy",
              "robot_preference", "robot_compose", "robot_recordings"),
    "image": ("image_pretrain", "image_distill", "image_align", "image_preference", "image_compose", "image_superpose",
              "image_best_of", "image_finetune"),
}


@runtime_checkable
class Job(Protocol):
    """What the command line needs from a job spec of an adapter."""

    def train(self, run: Run) -> None:
        """Do everything, or go on from the run folder's newest checkpoint."""
        ...


@runtime_checkable
class PolicyJob(Job, Protocol):
    """A job whose run holds a policy."""

    def evaluate(self, run: Run, *, seed: int, episodes: int | None, sampler: Sampler | None) -> dict[str, Any]:
        """One JSON-able object with intervals."""
        ...

    def sample(self, run: Run, out: Path, *, seed: int, count: int) -> list[Path]:
        """Files of pictures or videos by the trained policy."""
        ...


@runtime_checkable
class Shards(Job, Protocol):
    """A job that can spread its model over several processes."""

    @property
    def shards(self) -> bool:
        """Whether it does."""
        ...


def domain(job_type: str) -> str:
    """`robot` or `image`."""
    return job_type.partition("_")[0]


def load_job(file: Path, overrides: list[str]) -> tuple[str, Job]:
    """(type, job) of a YAML file; imports the adapter that its top-level `type` names and no other.

    Raises: ConfigError for a file that is missing, no mapping, of unknown type, or wrong at any dotted path.
    """
    from diffalign import config

    job_type = _type_of(file, overrides)
    module = importlib.import_module(f"diffalign_{domain(job_type)}.jobs")
    cls = next(cls for cls in module.JOBS if cls.type == job_type)
    return job_type, cast(Job, config.load(cls, file, overrides))


def _type_of(file: Path, overrides: list[str]) -> str:
    from diffalign import config

    job_type = config.read(file, overrides).get("type")
    known = [name for names in JOB_TYPES.values() for name in names]
    if job_type not in known:
        close = difflib.get_close_matches(str(job_type), known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        said = "has no top-level `type`" if job_type is None else f"type: unknown value {job_type!r}"
        raise config.ConfigError(f"{file}: {said}{hint} It must be one of {', '.join(known)}")
    return str(job_type)


def open_run(path: Path) -> tuple[Run, PolicyJob]:
    """An existing run folder with its job.

    Raises: ValueError if the folder is missing, holds no run, or holds one without a policy.
    """
    if not (path / "config.yaml").is_file():
        what = "is not a run folder (it has no config.yaml)" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; `diffalign train CONFIG --run {path}` makes one")
    from diffalign.train.run import Run

    job_type, job = load_job(path / "config.yaml", [])
    if not isinstance(job, PolicyJob):
        raise ValueError(f"{path} is a {job_type} run, which holds no policy: there is nothing to evaluate or sample")
    return Run(path), job


def refuse_other_config(path: Path, config_yaml: str) -> None:
    """Refuse to resume a folder whose config differs, naming every differing key.

    Raises: ValueError with `key: old -> new` for each.
    """
    import yaml

    from diffalign import config

    if not (path / "config.yaml").is_file():
        return
    old = dict(_flat(config.read(path / "config.yaml")))
    new = dict(_flat(yaml.safe_load(config_yaml)))
    changed = [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
    ]
    if changed:
        raise ValueError(
            f"{path} was started with another config ({'; '.join(changed)}). To go on with it, give the "
            "same config and overrides; to use the new ones, choose another folder"
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
