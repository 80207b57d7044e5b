"""Checkpoints: safetensors and one JSON, replaced atomically, complete enough to resume bit for bit.

A checkpoint is a folder `step_00000010/` with modules.safetensors, training.safetensors (optimizer, EMA, statistics,
random state) and state.json. It is written under a temporary name and renamed, so a killed process never leaves a
half-written folder under the final name. No pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.train import distributed, sharding
from diffalign.train.state import TrainState

_NAME = re.compile(r"step_(\d{8})")


def save(folder: Path, state: TrainState, *, keep: int = 2) -> Path:
    """Write `folder/step_XXXXXXXX` for state.step and drop all but the newest `keep` checkpoints.

    All ranks must ask, the first one writes; sharded tensors are written whole.
    """
    target = folder / f"step_{state.step:08d}"
    partial = folder / f".partial_{state.step:08d}"
    if distributed.leads():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    modules = {f"{role}.{name}": tensor for role, module in state.modules.items()
               for name, tensor in module.state_dict().items()}
    _write_tensors(partial / "modules.safetensors", modules)
    training, scalars = _pack_optimizer(state.optimizer)
    training |= {f"statistics.{name}": tensor for name, tensor in state.statistics.items()}
    training["generator"] = state.generator.get_state()
    record: dict[str, Any] = {"step": state.step, "optimizer": scalars, "counters": state.counters}
    if state.ema is not None:
        training |= {f"ema.{name}": tensor for name, tensor in state.ema.weights.items()}
        record["ema_updates"] = state.ema.updates
    _write_tensors(partial / "training.safetensors", training)
    if not distributed.leads():
        return target
    _write_text(partial / "state.json", json.dumps(record))
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    _sync(folder)
    for old in _numbered(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder, or None."""
    found = _numbered(folder)
    return found[-1] if found else None


def load(path: Path, state: TrainState) -> None:
    """Restore a state of the same structure in place.

    Raises: ValueError if the checkpoint belongs to another structure, naming the first differing entry.
    """
    record = json.loads((path / "state.json").read_text())
    require_same_modules(path, state.modules)
    if (state.ema is not None) != ("ema_updates" in record):
        raise ValueError(f"{path}: checkpoint and run disagree on whether an EMA is kept; set the same ema_decay")
    _require_same_groups(state.optimizer, record["optimizer"], path)
    load_modules(path, state.modules)
    training = load_file(path / "training.safetensors")
    _unpack_optimizer(state.optimizer, training, record["optimizer"])
    state.statistics = {name.removeprefix("statistics."): tensor.to(state.generator.device)
                        for name, tensor in training.items() if name.startswith("statistics.")}
    state.generator.set_state(training["generator"])
    if state.ema is not None:
        state.ema.updates = record["ema_updates"]
        for name, weight in state.ema.weights.items():
            weight.copy_(sharding.placed(training[f"ema.{name}"], weight))
    state.counters = record["counters"]
    state.step = record["step"]


def load_modules(path: Path, modules: Mapping[str, nn.Module], *, prefer_ema: bool = False) -> None:
    """Load weights and buffers by role; `prefer_ema` takes the averaged "policy" weights where they exist.

    Raises: ValueError if a module's names or shapes differ from the checkpoint's.
    """
    require_same_modules(path, modules)
    stored = load_file(path / "modules.safetensors")
    for role, module in modules.items():
        module.load_state_dict({name: sharding.placed(stored[f"{role}.{name}"], tensor)
                                for name, tensor in module.state_dict().items()})
    if prefer_ema and "policy" in modules:
        training = load_file(path / "training.safetensors")
        with torch.no_grad():
            for name, parameter in modules["policy"].named_parameters():
                if f"ema.{name}" in training:
                    parameter.copy_(sharding.placed(training[f"ema.{name}"], parameter))


def require_same_modules(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """Raises: ValueError naming the first module entry whose name or shape differs from the checkpoint's."""
    stored = shapes(path)
    for role, module in modules.items():
        own = {name.removeprefix(f"{role}."): shape for name, shape in stored.items() if name.startswith(f"{role}.")}
        expected = module.state_dict()
        for name in sorted(set(own) ^ set(expected)):
            side = "is not in the checkpoint" if name in expected else "is not in the module"
            raise ValueError(f"{path}: {role}.{name} {side}; build the module from the run's own config.yaml")
        for name, tensor in expected.items():
            if tuple(tensor.shape) != own[name]:
                raise ValueError(f"{path}: {role}.{name} has shape {own[name]} in the checkpoint and "
                                 f"{tuple(tensor.shape)} in the module")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every stored module tensor by `role.name`, read from the header alone."""
    with safe_open(path / "modules.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))


def _pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    packed = optimizer.state_dict()
    tensors = {f"optimizer.{index}.{name}": value for index, entry in packed["state"].items()
               for name, value in entry.items()}
    groups = [{key: value for key, value in group.items() if isinstance(value, (int, float, str))}
              for group in packed["param_groups"]]
    return tensors, {"groups": groups}


def _require_same_groups(optimizer: torch.optim.Optimizer, record: Mapping[str, Any], path: Path) -> None:
    own, stored = ([group["name"] for group in groups] for groups in (optimizer.param_groups, record["groups"]))
    if own != stored:
        raise ValueError(f"{path}: the optimizer groups are {stored} in the checkpoint and {own} in the run")


def _unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
                      ) -> None:
    packed = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            like = parameters[int(index)]
            entries.setdefault(int(index), {})[name] = (
                sharding.placed(tensor, like) if tensor.shape == like.shape else tensor)
    for group, stored in zip(packed["param_groups"], record["groups"], strict=True):
        group.update(stored)
    optimizer.load_state_dict({"state": entries, "param_groups": packed["param_groups"]})


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    whole = sharding.gathered(tensors)
    if distributed.leads():
        save_file({name: whole.pop(name).contiguous().clone() for name in [*whole]}, path)  # never both of all
        _sync(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that the rename that follows cannot outrun its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
