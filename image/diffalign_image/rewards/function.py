"""A reward that is any Python function in a file of the user's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.spec import spec
from diffalign_image.rewards.protocol import Metadata, checked, to_bytes


@spec
class PythonFunction:
    """Any Python function, `file.py:function`, called as function(images, prompts, metadata) -> one number an image.

    images: "uint8" gives a tensor [N, 3, H, W] of 0..255, "float" one in [-1, 1]; clips are [N, F, 3, H, W]. metadata
    is one mapping a prompt.
    The file is executed; name only files that you trust.
    """

    type: Literal["python"] = "python"
    function: str
    images: Literal["uint8", "float"] = "uint8"

    def __post_init__(self) -> None:
        file, _, name = self.function.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise ValueError(f"function must be FILE.py:NAME, e.g. rewards/mine.py:brightness, got {self.function!r}")

    def __call__(self, images: Float[Tensor, "N 3 H W"], captions: Sequence[str], metadata: Metadata = ()
                 ) -> Float[Tensor, "N"]:
        """What the function returns. Raises: ValueError for anything but N finite numbers, or if there is no such
        function."""
        given = images if self.images == "float" else torch.from_numpy(to_bytes(images)).movedim(-1, -3)
        found = _load(self.function)(given, list(captions), list(metadata) or [{} for _ in captions])
        return checked(found, len(captions), f"the reward {self.function}")


@lru_cache(maxsize=16)
def _load(function: str) -> Callable[..., Any]:
    file, _, name = function.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"reward.function: {file} does not exist (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(f"diffalign_reward_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"reward.function: {file} has no function {name!r}; it has {', '.join(public) or 'none'}")
    return found  # type: ignore[no-any-return]
