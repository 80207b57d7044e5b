"""`diffalign doctor`: what of this machine and installation is usable, and the fix for what is not."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import diffalign
from diffalign.cli import rendering
from diffalign.cli.errors import EXTRAS, install_line

_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "diffusers",
    "transformers",
    "gymnasium",
    "mujoco",
    "metaworld",
    "lerobot",
    "onnxruntime",
)


def doctor(args: argparse.Namespace) -> int:
    """`diffalign doctor [--json]`: 0 if the core and at least one of the two domains work, 1 otherwise."""
    found = examine()
    print(json.dumps(found) if args.json else as_text(found))
    return 0 if any(found["extras"][name]["usable"] for name in ("image", "robot")) else 1


def examine() -> dict[str, Any]:
    """Versions, devices, threads, extras and renderers as one JSON-able object."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
        extras = dict(zip(EXTRAS, pool.map(_extra, EXTRAS, EXTRAS.values()), strict=True))
        pictures = list(pool.map(_renderer, rendering.FIXES)) if extras["robot"]["usable"] else []
    renderers = dict(zip(rendering.FIXES, pictures)) if pictures else {}
    return {
        "diffalign": diffalign.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cpu_cores": os.cpu_count(),
        **_torch(),
        "extras": extras,
        "renderers": renderers,
        "renderer": next((name for name, result in renderers.items() if result["usable"]), None),
        "MUJOCO_GL": os.environ.get("MUJOCO_GL"),
    }


def _torch() -> dict[str, Any]:
    """Threads and accelerators, or why torch (the one hard dependency that breaks) cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"torch": f"not usable: {error}", "threads": None, "accelerators": []}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    apple = ["Apple MPS"] if torch.backends.mps.is_available() else []
    return {"torch": "usable", "threads": torch.get_num_threads(), "accelerators": gpus + apple}


def _renderer(backend: str) -> dict[str, Any]:
    error = rendering.problem(backend)
    return {"usable": True} if error is None else {"usable": False, "why": error, "fix": rendering.FIXES[backend]}


def _extra(name: str, modules: tuple[str, ...]) -> dict[str, Any]:
    """Imported in a process of its own: some of these are slow, print, or change global state."""
    missing = [module for module in modules if importlib.util.find_spec(module.partition(".")[0]) is None]
    if missing:
        return {"usable": False, "why": f"not installed: {', '.join(missing)}", "fix": install_line(name)}
    error = rendering.python("".join(f"import {module}\n" for module in modules), dict(os.environ))
    return {"usable": True} if error is None else {"usable": False, "why": error, "fix": install_line(name)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_text(found: dict[str, Any]) -> str:
    """The examination as aligned lines."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    rows = [
        ("diffalign", f"{found['diffalign']} on Python {found['python']}, {found['platform']}"),
        ("packages", versions),
        ("processor", f"{found['cpu_cores']} cores"),
        ("torch", f"{found['torch']}, {found['threads']} threads"),
        ("accelerators", ", ".join(found["accelerators"]) or "none (CPU only)"),
    ]
    rows += [(f"[{name}]", _verdict(result)) for name, result in found["extras"].items()]
    rows += [(f"render {name}", _verdict(result)) for name, result in found["renderers"].items()]
    if found["renderers"]:
        advice = f"set MUJOCO_GL={found['renderer']}" if found["renderer"] else "videos cannot be made here"
        rows.append(("renderer", f"{advice} (now {found['MUJOCO_GL'] or 'unset: diffalign picks one'})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _verdict(result: dict[str, Any]) -> str:
    return "usable" if result["usable"] else f"not usable: {result['why']}\n{'':>16}fix: {result['fix']}"
