"""Denoisers of action chunks: a network between the normalizers of a data set.

Legend: N rows, Ta actions of a chunk, Da action features.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion import Prediction
from diffalign.diffusion.trajectories import Cond
from diffalign.policy.normalize import Normalizer
from diffalign_robot.choices import ChunkMLP, ChunkUNet, Network
from diffalign_robot.mlp import MLPNet
from diffalign_robot.transformer import Transformer
from diffalign_robot.unet import UNet
from diffalign_robot.vision import ImageEncoder, with_features


class ChunkDenoiser(nn.Module):
    """Predicts eps, x0, v or flow of a normalized chunk from (chunk, time, observation).

    Both normalizers are buffers of this module, so that a checkpoint is complete: observations are normalized inside
    forward, `action_normalizer.unnormalize` turns a sampled chunk into robot units. net: (chunk, t, normalized
    observation) -> chunk. history: how many observations of the simulator an observation of the policy consists of.
    encoder: reads images; the observation's numbers, and their normalizer, then end with its features, so that what is
    encoded is an observation like any other.
    """

    def __init__(self, net: nn.Module, chunk: int, observations: Normalizer, actions: Normalizer, *,
                 prediction: Prediction = "eps", history: int = 1, encoder: ImageEncoder | None = None) -> None:
        super().__init__()
        self.observation_normalizer, self.action_normalizer = observations, actions
        self.event = (chunk, len(actions.shift))
        self.prediction: Prediction = prediction
        self.history = history
        self.encoder, self.net = encoder, net

    @property
    def obs_dim(self) -> int:
        """How many numbers an observation has before its images are encoded."""
        return len(self.observation_normalizer.shift) - (0 if self.encoder is None else self.encoder.features)

    @property
    def frozen_encoder(self) -> bool:
        """Whether images can be encoded once and for all: nothing will train the encoder."""
        return self.encoder is not None and not any(p.requires_grad for p in self.encoder.parameters())

    def encode(self, cond: Cond) -> Cond:
        """Numbers alone, the features of the images at their end; without images the condition as it is."""
        return with_features(self.encoder, cond)

    def forward(self, x: Float[Tensor, "N Ta Da"], t: Float[Tensor, "N"], cond: Cond) -> Float[Tensor, "N Ta Da"]:
        """The prediction at path time t."""
        output: Tensor = self.net(x, t, self.observation_normalizer.normalize(self.encode(cond)["obs"]))
        return output


def build_network(spec: Network, event: tuple[int, int], obs_dim: int) -> nn.Module:
    """The untrained network of a spec: (chunk, t, normalized observation) -> chunk."""
    if isinstance(spec, ChunkMLP):
        return MLPNet(spec, event, obs_dim)
    if isinstance(spec, ChunkUNet):
        return UNet(spec, event, obs_dim)
    return Transformer(spec, event, obs_dim)
