"""Which exceptions are the user's to fix, and the one paragraph that says how."""

from __future__ import annotations

import traceback

_OURS = ("diffalign", "diffalign_image", "diffalign_robot")
# extra -> modules whose import proves it; tensorboard is imported through torch, its consumer
EXTRAS = {
    "image": ("diffusers", "transformers", "PIL", "peft", "accelerate", "imageio", "imageio_ffmpeg"),
    "rewards": ("open_clip", "rapidocr"),
    "robot": ("gymnasium", "mujoco", "metaworld", "imageio", "imageio_ffmpeg"),
    "tensorboard": ("tensorboard", "torch.utils.tensorboard"),
    "wandb": ("wandb",),
    "lerobot": ("lerobot", "datasets", "diffusers.schedulers"),  # since 0.6 the last two are lerobot's own extras
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "dds": ("cyclonedds",),
    "data": ("h5py", "zarr", "minari"),
    "fetch": ("gymnasium_robotics",),
    "pusht": ("gym_pusht",),
    "robosuite": ("robosuite",),
    "vision": ("torchvision",),
}
_EXTRA_OF = {name: extra for extra, names in EXTRAS.items() for name in names if "." not in name}
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
    package = _raised_in(error)
    if isinstance(error, ImportError) and package == "lerobot":  # an extra of its own is missing, and it says which
        return f"{error}. With diffalign's versions: {install_line('lerobot')}"
    if isinstance(error, ValueError | ImportError) and package in _OURS:
        return str(error)
    return None


def _raised_in(error: BaseException) -> str:
    frames = list(traceback.walk_tb(error.__traceback__))
    module = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
    return module.partition(".")[0]
