"""Networks that read images.

Legend: N rows, V cameras, S pixels a side, C channels, F features, Do observation features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from diffalign.diffusion.trajectories import Cond
from diffalign.rl.critics import ValueNet
from diffalign_robot.image_choices import ConvEncoder, Encoder, Images, Pool, ResNetEncoder

_BLOCK = 256  # rows at a time: what a rollout's worth of images needs between the layers is a hundred times their size


class ImageEncoder(nn.Module):
    """8-bit images of V cameras -> F numbers of mean 0 and variance 1 (layer norm); every camera has its own network.

    Raises: ModuleNotFoundError without torchvision where the spec needs it.
    """

    def __init__(self, spec: Encoder, images: Images) -> None:
        super().__init__()
        self.shape, self.features, self.shift = images.shape, spec.features, spec.shift
        self.trunks = nn.ModuleList(build_trunk(spec, images.size) for _ in range(images.shape[0]))
        with torch.no_grad():
            found = sum(trunk(torch.zeros(1, *images.shape[1:])).shape[1] for trunk in self.trunks)
        self.outlet = nn.Sequential(nn.Linear(found, spec.features), nn.LayerNorm(spec.features))

    def forward(self, image: UInt8[Tensor, "N V 3 S S"]) -> Float[Tensor, "N F"]:
        """The features of every row."""
        return torch.cat([self._features(block) for block in image.split(_BLOCK)])

    def _features(self, image: Tensor) -> Tensor:
        scaled = image.float() / 127.5 - 1
        seen = [trunk(part) for trunk, part in zip(self.trunks, scaled.unbind(1), strict=True)]
        features: Tensor = self.outlet(torch.cat(seen, 1))
        return features


class Keypoints(nn.Module):
    """Where each channel is active: the mean place (x, y) in [-1, 1] under a softmax over the map.

    Levine et al. 2016, arXiv 1504.00702, sec. 5.2.
    """

    def forward(self, maps: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C2"]:
        """x of every channel, then y."""
        weight = maps.flatten(2).softmax(-1).reshape(maps.shape)
        x, y = (torch.linspace(-1, 1, size, device=maps.device) for size in (maps.shape[3], maps.shape[2]))
        return torch.cat([(weight.sum(2) * x).sum(-1), (weight.sum(3) * y).sum(-1)], 1)


class VisionValue(nn.Module):
    """V(cond) of a value net on the observation and the features of an encoder of its own."""

    def __init__(self, encoder: ImageEncoder, value: ValueNet) -> None:
        super().__init__()
        self.encoder, self.value = encoder, value

    def forward(self, cond: Cond) -> Float[Tensor, "N"]:
        """Value per row."""
        found: Tensor = self.value(with_features(self.encoder, cond))
        return found


def with_features(encoder: ImageEncoder | None, cond: Cond) -> Cond:
    """Numbers alone: `obs` [N, Do + F] with the features of `image` after it; a condition without images is kept."""
    if encoder is None or "image" not in cond:
        return cond
    return {"obs": torch.cat([cond["obs"], encoder(cond["image"])], 1)}


def build_trunk(spec: Encoder, size: int) -> nn.Module:
    """The untrained network of one camera: [N, 3, S, S] in [-1, 1] -> features.

    Raises: ValueError if a transformer's patches do not tile the image.
    """
    if isinstance(spec, ConvEncoder):
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((3, *spec.channels), spec.channels)):
            layers += [nn.Conv2d(before, after, 3, stride=2 if i < 2 else 1, padding=1), nn.ReLU()]
        return nn.Sequential(*layers[:-1], *_pooling(spec.pool))  # no ReLU: a softmax has use for what is below 0
    import torchvision

    if isinstance(spec, ResNetEncoder):
        resnet = torchvision.models.resnet18(weights=None, norm_layer=lambda width: nn.GroupNorm(width // 16, width))
        return nn.Sequential(*list(resnet.children())[:-2], *_pooling(spec.pool))
    if size % spec.patch:
        raise ValueError(f"patch must divide the images' size of {size} pixels, got {spec.patch}")
    vit: nn.Module = torchvision.models.VisionTransformer(
        image_size=size, patch_size=spec.patch, num_layers=spec.blocks, num_heads=spec.heads, hidden_dim=spec.width,
        mlp_dim=4 * spec.width)
    vit.heads = nn.Identity()  # its class token
    return vit


def _pooling(pool: Pool) -> list[nn.Module]:
    return [Keypoints()] if pool == "keypoints" else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def shifted_images(image: UInt8[Tensor, "N V 3 S S"], pixels: int, generator: torch.Generator
                   ) -> UInt8[Tensor, "N V 3 S S"]:
    """Every image moved by up to `pixels` along both axes, its border repeated (DrQ, arXiv 2004.13649, sec. 3.1).

    For the batches of supervised learning. Never between sampling and scoring: the policy would be asked about other
    images than it acted on, and the ratio of a fresh rollout would not be 1.
    """
    rows, cameras, _, size, _ = image.shape
    flat = image.flatten(0, 1)
    move = torch.randint(-pixels, pixels + 1, (2, rows * cameras, 1), generator=generator)
    y, x = (torch.arange(size) + move).clamp(0, size - 1)
    every: Int[Tensor, "M 1 1"] = torch.arange(rows * cameras)[:, None, None]
    return flat.permute(0, 2, 3, 1)[every, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).reshape(image.shape)
