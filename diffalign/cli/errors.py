"""Which exceptions are the user's to fix, and the one paragraph that says how."""

from __future__ import annotations

import traceback

_OURS = ("diffalign", "diffalign_image", "diffalign_robot")
_EXTRA_OF = {
    "diffusers": "image",
    "transformers": "image",
    "PIL": "image",
    "peft": "image",
    "accelerate": "image",
    "open_clip": "rewards",
    "rapidocr": "rewards",
    "gymnasium": "robot",
    "mujoco": "robot",
    "metaworld": "robot",
    "imageio": "robot",
    "imageio_ffmpeg": "robot",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "lerobot": "lerobot",
    "cyclonedds": "dds",
    "h5py": "data",
    "zarr": "data",
    "minari": "data",
    "gymnasium_robotics": "fetch",
    "gym_pusht": "pusht",
    "robosuite": "robosuite",
    "torchvision": "vision",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}
USER_ERRORS = (ValueError, FloatingPointError, OSError, ImportError)


def install_line(extra: str) -> str:
    """The command that installs an extra in a checkout."""
    return f'pip install -c constraints.txt -e ".[{extra}]"'


def paragraph(error: BaseException) -> str | None:
    """What to print for an error that the user can fix; None for a bug, which keeps its traceback.

    A ValueError counts as the user's only where our own code raised it: one from inside torch or numpy is a defect.
    """
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRA_OF:
            return None
        extra = _EXTRA_OF[module]
        return (
            f"this needs the package {module!r}, part of the extra [{extra}], which is not installed. "
            f"Install it with: {install_line(extra)}"
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, ValueError | ImportError) and _raised_by_us(error):
        return str(error)
    return None


def _raised_by_us(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    module = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
    return module.partition(".")[0] in _OURS
