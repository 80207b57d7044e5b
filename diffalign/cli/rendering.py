"""Which OpenGL backend MuJoCo may load on a machine without a display, and whether it truly renders."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes.util import find_library

LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
FIXES = {
    "egl": "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (Debian, Ubuntu)",
    "osmesa": "apt-get install libosmesa6 (Debian, Ubuntu)",
}
OFF = "disable"
_PICTURE = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 2"/><geom size=".3" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 48, 48) as renderer:
    renderer.update_scene(data)
    picture = renderer.render()
assert picture.std() > 1, "the picture is blank"
"""


def choose() -> None:
    """Set MUJOCO_GL before anything imports mujoco, unless it is set or there is a display.

    Without any library rendering is switched off, because mujoco then cannot even be imported with a backend named.
    """
    if sys.platform != "linux" or os.environ.get("DISPLAY") or "MUJOCO_GL" in os.environ:
        return
    use(next((backend for backend, library in LIBRARIES.items() if find_library(library)), OFF))


def use(backend: str) -> None:
    """Set the backend for this process and those it starts."""
    os.environ["MUJOCO_GL"] = backend
    if backend in LIBRARIES:
        os.environ["PYOPENGL_PLATFORM"] = backend


def works() -> bool:
    """Whether the present choice renders; if it does not, rendering is switched off."""
    if python(_PICTURE, dict(os.environ)) is None:
        return True
    use(OFF)
    return False


def problem(backend: str) -> str | None:
    """None if the backend renders a picture, otherwise why not. In a process of its own: a failure may abort it."""
    return python(_PICTURE, {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend})


def python(code: str, env: dict[str, str]) -> str | None:
    """Run code in a fresh interpreter: None, or the last line of what went wrong."""
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "no answer in 180 s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]
