"""A reward that is any Python function of the user's, and how functions are found by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.protocol import Metadata, checked, to_bytes


@spec
class PythonFunction:
    """Any Python function, called as function(images, prompts, metadata) -> one number an image.

    function: `file.py:name`, or `package.module:name` of something installed; it is executed, so name only what you
    trust. images: "uint8" gives a tensor [N, 3, H, W] of 0..255, "float" one in [-1, 1]; clips are [N, F, 3, H, W].
    metadata is one mapping a prompt.
    """

    type: Literal["python"] = "python"
    function: str
    images: Literal["uint8", "float"] = "uint8"

    def __post_init__(self) -> None:
        check_name(self.function, "function")

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """What the function returns. Raises: ValueError for anything but N finite numbers, or if there is no such
        function."""
        given = images if self.images == "float" else torch.from_numpy(to_bytes(images)).movedim(-1, -3)
        function = load_function(self.function, "reward.function")
        found = function(given, list(captions), list(metadata) or [{} for _ in captions])
        return checked(found, len(captions), f"the reward {self.function}")


def check_name(where: str, setting: str) -> None:
    """Raises: ValueError unless it reads FILE.py:NAME or MODULE:NAME."""
    place, _, name = where.rpartition(":")
    is_module = bool(place) and all(part.isidentifier() for part in place.split("."))
    if not name.isidentifier() or not (place.endswith(".py") or is_module):
        raise ValueError(f"{setting} must be FILE.py:NAME or MODULE:NAME, e.g. rewards/mine.py:brightness, "
                         f"got {where!r}")


@lru_cache(maxsize=16)
def load_function(where: str, setting: str) -> Callable[..., Any]:
    """The function that `where` names; its file or module is executed. Raises: ValueError if there is none."""
    place, _, name = where.rpartition(":")
    module = _from_file(place, setting) if place.endswith(".py") else _from_package(place, setting)
    found = getattr(module, name, None)
    if not callable(found):
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{setting}: {place} has no function {name!r}; it has {', '.join(public) or 'none'}")
    return found  # type: ignore[no-any-return]


def _from_file(file: str, setting: str) -> ModuleType:
    if not Path(file).is_file():
        raise ValueError(f"{setting}: {file} does not exist (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(f"diffalign_reward_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_package(name: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{setting}: the module {name} cannot be imported (no module named {error.name!r}); install "
                         "it, or give FILE.py:NAME") from None
