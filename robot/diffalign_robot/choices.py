"""The closed unions of environments and policy networks; importing this needs no simulator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffalign.spec import spec
from diffalign_robot.image_choices import Images


@spec
class MetaWorld:
    """A Meta-World v3 task with state observations; object and goal are placed anew from each episode's seed.

    images: of the model's cameras, beside the numbers of the state that they name (0 to 3 are hand and gripper).

    reward `sparse` is 1 on the step that succeeds and 0 elsewhere, `dense` the task's own shaped reward. With
    success_ends the episode terminates at the first success; otherwise it runs to the horizon (a time-out).
    """

    type: Literal["metaworld"] = "metaworld"
    task: str = "pick-place-v3"
    horizon: int = 100
    reward: Literal["sparse", "dense"] = "sparse"
    success_ends: bool = True
    images: Images | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.horizon <= 500:
            raise ValueError(f"horizon must lie in 1..500 (Meta-World's own limit), got {self.horizon}")
        _refuse_paid_avoidance(self.reward, self.success_ends)
        _require_cameras(self.images, "corner2 or behindGripper")


@spec
class Robosuite:
    """A robosuite task; the default keys and controller are those of robomimic's low-dimensional data sets.

    keys: robosuite's names, `object` for its object-state. reward, success_ends, images: as for metaworld.
    """

    type: Literal["robosuite"] = "robosuite"
    task: str = "Lift"
    robots: tuple[str, ...] = ("Panda",)
    horizon: int = 100
    control_rate_hz: int = 20
    reward: Literal["sparse", "dense"] = "sparse"
    success_ends: bool = True
    keys: tuple[str, ...] = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    images: Images | None = None

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.control_rate_hz < 1 or not self.robots or not self.keys:
            raise ValueError("need horizon >= 1, control_rate_hz >= 1, a robot and a key; got "
                             f"{self.horizon}, {self.control_rate_hz}, {self.robots}, {self.keys}")
        _refuse_paid_avoidance(self.reward, self.success_ends)
        _require_cameras(self.images, "agentview or robot0_eye_in_hand")


@spec
class Gymnasium:
    """Any registered Gymnasium environment with Box actions and Box or Dict observations.

    Success is info["success"] or info["is_success"] where the environment reports one. horizon None keeps the
    environment's own time limit. keys: the entries of a Dict observation that are read, one after the other (Fetch,
    mazes and the Adroit hand of gymnasium-robotics: add achieved_goal for all of them). `module:Id-v0` imports a module
    that registers the id. images: what its render() gives as an rgb_array, at the size that they name.
    """

    type: Literal["gymnasium"] = "gymnasium"
    id: str
    horizon: int | None = None
    keys: tuple[str, ...] = ("observation", "desired_goal")
    images: Images | None = None

    def __post_init__(self) -> None:
        _require_gymnasium(self.horizon, self.keys, self.images)


@spec
class Custom:
    """A Gymnasium environment of your own: `factory` names a function without arguments, as module:function.

    Otherwise as the gymnasium type; for images the factory must give it the render mode rgb_array.
    """

    type: Literal["custom"] = "custom"
    factory: str
    horizon: int | None = None
    keys: tuple[str, ...] = ("observation", "desired_goal")
    images: Images | None = None

    def __post_init__(self) -> None:
        module, colon, function = self.factory.partition(":")
        if not module or not colon or not function.isidentifier():
            raise ValueError(f"factory must be module:function, e.g. my_robot.envs:make_arm, got {self.factory!r}")
        _require_gymnasium(self.horizon, self.keys, self.images)


def _refuse_paid_avoidance(reward: str, success_ends: bool) -> None:
    if reward == "dense" and success_ends:
        raise ValueError("a dense reward that ends at success pays for avoiding success; set success_ends to false")


def _require_cameras(images: Images | None, known: str) -> None:
    if images is not None and not images.cameras:
        raise ValueError(f"images.cameras must name at least one camera of the simulator, e.g. {known}, got none")


def _require_gymnasium(horizon: int | None, keys: tuple[str, ...], images: Images | None) -> None:
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    if not keys:
        raise ValueError("keys must name at least one entry of the observation, got none")
    if images is not None and images.cameras:
        raise ValueError("a Gymnasium environment chooses itself where it renders from: leave images.cameras out, got "
                         f"{list(images.cameras)}")


@spec
class ChunkMLP:
    """A residual MLP over (noisy chunk, time, observation), as DPPO's for state observations."""

    type: Literal["mlp"] = "mlp"
    width: int = 256
    blocks: int = 2
    time_features: int = 16

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 1:
            raise ValueError(f"width and blocks must be at least 1, got {self.width} and {self.blocks}")
        _require_time_features(self.time_features)


@spec
class ChunkUNet:
    """A 1-D convolutional U-Net over the actions of a chunk (Diffusion Policy, arXiv 2303.04137, sec. 4.1).

    widths: channels of each level, one halving of the chunk between two; groups must divide all of them.
    """

    type: Literal["unet"] = "unet"
    widths: tuple[int, ...] = (64, 128)
    kernel: int = 5
    groups: int = 8
    time_features: int = 32

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"widths must be multiples of groups={self.groups}, at least one, got {self.widths}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {self.kernel}")
        _require_time_features(self.time_features)


@spec
class ChunkTransformer:
    """A transformer over the actions of a chunk with adaLN-zero conditioning (DiT, arXiv 2212.09748, sec. 3.2)."""

    type: Literal["transformer"] = "transformer"
    width: int = 128
    blocks: int = 4
    heads: int = 4
    time_features: int = 32

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads and blocks at least 1, got width={self.width}, "
                             f"heads={self.heads}, blocks={self.blocks}")
        _require_time_features(self.time_features)


def _require_time_features(count: int) -> None:
    if count < 4 or count % 2:
        raise ValueError(f"time_features must be even and at least 4, got {count}")


Environment = Annotated[MetaWorld | Robosuite | Gymnasium | Custom, Field(discriminator="type")]
Network = Annotated[ChunkMLP | ChunkUNet | ChunkTransformer, Field(discriminator="type")]
