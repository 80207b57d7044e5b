"""The function that a user names as module:function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def function_at(place: str, setting: str) -> Callable[..., Any]:
    """What stands at module:function. Raises: ValueError, with the setting's name, if there is no such function."""
    module, _, name = place.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there and lacks something itself
        raise ValueError(f"{setting} {place!r}: no module named {error.name!r}; put its folder on PYTHONPATH"
                         ) from None
    function: Callable[..., Any] | None = getattr(found, name, None)
    if not callable(function):
        raise ValueError(f"{setting} {place!r}: {module} has no function {name!r}")
    return function
