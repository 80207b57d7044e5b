"""Images in the observation, and the networks that read them: specs; importing this needs no simulator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffalign.spec import spec

Pool = Literal["keypoints", "mean"]


@spec
class Images:
    """Square images beside the numbers of an observation, one a camera.

    size: pixels a side; small ones are nearly as slow to render and far faster to learn from. cameras: as the simulator
    calls them; a Gymnasium environment has none to name, its own render() is taken. state: the places of the numbers
    that the policy still sees of the state observation, e.g. those of the robot itself: what is left out it must find
    in the images. Images are of the present; a history is of these numbers only.
    """

    size: int = 64
    cameras: tuple[str, ...] = ()
    state: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"size must be at least 16 pixels, got {self.size}")
        if not self.state or min(self.state) < 0 or len(set(self.state)) != len(self.state):
            raise ValueError("state must name at least one place of the state observation, counted from 0 and each "
                             f"once, got {list(self.state)}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an observation's images: (cameras, 3, size, size)."""
        return (max(1, len(self.cameras)), 3, self.size, self.size)


@spec
class ConvEncoder:
    """A few 3x3 convolutions, the first two of stride 2: the cheap one, for a CPU.

    pool: `keypoints` = where each channel is active, a spatial softmax (arXiv 1504.00702, sec. 5.2), `mean` = how
    active it is. features: how many numbers all cameras come to. shift: pixels of the random shift in cloning (DrQ,
    arXiv 2004.13649, sec. 3.1), 0 for none.
    """

    type: Literal["conv"] = "conv"
    channels: tuple[int, ...] = (16, 32, 32)
    pool: Pool = "keypoints"
    features: int = 64
    shift: int = 4

    def __post_init__(self) -> None:
        if len(self.channels) < 2 or min(self.channels) < 1:
            raise ValueError(f"channels must name at least two layers, got {list(self.channels)}")
        _require_features(self.features, self.shift)


@spec
class ResNetEncoder:
    """torchvision's ResNet-18 with group norm in place of batch norm, untrained (Diffusion Policy, sec. 4.1).

    pool, features, shift: as for conv. Needs the extra [vision].
    """

    type: Literal["resnet18"] = "resnet18"
    pool: Pool = "mean"
    features: int = 64
    shift: int = 4

    def __post_init__(self) -> None:
        _require_features(self.features, self.shift)


@spec
class ViTEncoder:
    """torchvision's vision transformer, untrained, of any size; its class token is read.

    patch: pixels a side, a divisor of the images' size. features, shift: as for conv. Needs the extra [vision].
    """

    type: Literal["vit"] = "vit"
    patch: int = 8
    width: int = 128
    blocks: int = 3
    heads: int = 4
    features: int = 64
    shift: int = 4

    def __post_init__(self) -> None:
        if self.patch < 1 or self.blocks < 1 or self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"need patch and blocks of at least 1 and a width that is a multiple of heads, got "
                             f"{self.patch}, {self.blocks}, width={self.width}, heads={self.heads}")
        _require_features(self.features, self.shift)


def _require_features(features: int, shift: int) -> None:
    if features < 1 or shift < 0:
        raise ValueError(f"need features >= 1 and shift >= 0, got {features} and {shift}")


Encoder = Annotated[ConvEncoder | ResNetEncoder | ViTEncoder, Field(discriminator="type")]
