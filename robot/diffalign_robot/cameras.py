"""Pictures of simulators off the screen. No torch here: worker processes import this module."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign_robot.image_choices import Images

Picture = NDArray[np.uint8]


class MujocoCamera:
    """Pictures [size, size, 3] of MuJoCo models, without shadows, reflections and antialiasing: three times faster.

    All models must be of the same file: textures and meshes are those of the first one (150 MB for Meta-World).
    """

    def __init__(self, model: Any, size: int) -> None:
        import mujoco

        self._mujoco: Any = mujoco
        samples, model.vis.quality.offsamples = model.vis.quality.offsamples, 0
        self._renderer = mujoco.Renderer(model, size, size)
        atexit.register(self._renderer.close)  # later its libraries are gone and it says so
        model.vis.quality.offsamples = samples
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        self._shown = mujoco.MjData(model)

    def picture(self, model: Any, data: Any, camera: str) -> Picture:
        """What a camera sees; the simulation is not touched.

        Places are computed afresh from the joints: between steps those of sites and moving cameras are out of date.

        Raises: ValueError for a camera that the model lacks, naming those it has.
        """
        lib = self._mujoco
        number = lib.mj_name2id(model, lib.mjtObj.mjOBJ_CAMERA, camera)
        if number < 0:
            known = ", ".join(model.camera(i).name for i in range(model.ncam))
            raise ValueError(f"the simulator has no camera {camera!r}; it has {known}")
        lib.mj_copyData(self._shown, model, data)
        for update in (lib.mj_kinematics, lib.mj_comPos, lib.mj_camlight):
            update(model, self._shown)
        view = lib.MjvCamera()
        view.type, view.fixedcamid = lib.mjtCamera.mjCAMERA_FIXED, number
        lib.mjv_updateScene(model, self._shown, lib.MjvOption(), None, view, lib.mjtCatBit.mjCAT_ALL,
                            self._renderer.scene)
        found: Picture = self._renderer.render()
        return found


@cache
def shared_camera(model_of: Callable[[Any], Any], spec: Hashable, size: int) -> MujocoCamera:
    """One camera a process for all episodes of a spec, of which `model_of` makes a model."""
    return MujocoCamera(model_of(spec), size)


def resized(picture: Picture, size: int) -> Picture:
    """A picture at size x size pixels, each the mean of those that it covers."""
    if picture.shape[:2] == (size, size):
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))


def images_of(frame: Callable[[str | None, int], Picture], images: Images) -> NDArray[np.uint8]:
    """The images of an observation [V, 3, S, S], by the `frame` of an episode."""
    seen = [frame(camera, images.size) for camera in images.cameras or (None,)]
    return np.ascontiguousarray(np.stack(seen).transpose(0, 3, 1, 2))
