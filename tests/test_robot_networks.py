"""The chunk networks: shapes, symmetries, conditioning, and that each of them learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffalign.policy.normalize import Normalizer
from diffalign.train.supervised import Pretraining, fit, fresh_state
from diffalign_robot.choices import ChunkMLP, ChunkTransformer, ChunkUNet
from diffalign_robot.cloning import demonstration_batches
from diffalign_robot.networks import ChunkDenoiser, build_network
from diffalign_robot.runs import build_policy
from diffalign_robot.transformer import AdaLNBlock, Transformer
from diffalign_robot.unet import UNet

NETWORKS = {"mlp": ChunkMLP(width=32, blocks=1), "unet": ChunkUNet(widths=(16, 32), groups=4, time_features=16),
            "transformer": ChunkTransformer(width=32, blocks=2, heads=2, time_features=16)}
EACH = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def woken(module):
    """The module with its zero-initialised layers filled in, so that everything is connected."""
    draw = torch.Generator().manual_seed(1)
    for p in module.parameters():
        if not p.any():
            p.data.copy_(0.2 * torch.randn(p.shape, generator=draw))
    return module


def denoiser(network, chunk=4, obs=None, **options):
    torch.manual_seed(0)
    obs = obs or Normalizer(3)
    return ChunkDenoiser(build_network(network, (chunk, 2), len(obs.shift)), chunk, obs, Normalizer(2), **options)


@EACH
@pytest.mark.parametrize("chunk", [2, 3, 4, 7, 16])
def test_any_chunk_length_goes_in_and_comes_out(network, chunk):
    net = woken(denoiser(network, chunk))
    x, cond = torch.randn(5, chunk, 2, requires_grad=True), {"obs": torch.randn(5, 3)}
    out = net(x, torch.rand(5), cond)
    assert out.shape == (5, chunk, 2)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


@EACH
def test_rows_do_not_see_each_other_and_time_and_observation_matter(network):
    net = woken(denoiser(network))
    x, t, obs = torch.randn(6, 4, 2), torch.rand(6), torch.randn(6, 3)
    out = net(x, t, {"obs": obs})
    torch.testing.assert_close(net(x[2:3], t[2:3], {"obs": obs[2:3]}), out[2:3], rtol=1e-4, atol=1e-5)
    assert (net(x, t * 0.5, {"obs": obs}) - out).abs().max() > 1e-3
    assert (net(x, t, {"obs": obs + 1}) - out).abs().max() > 1e-3


@EACH
def test_observations_are_normalized_inside(network):
    observations = Normalizer(3)
    observations.shift.copy_(torch.tensor([3.0, -1.0, 0.0]))
    observations.scale.copy_(torch.tensor([2.0, 0.5, 1.0]))
    net, plain = denoiser(network, obs=observations), denoiser(network)
    x, t, obs = torch.randn(5, 4, 2), torch.rand(5), torch.randn(5, 3)
    woken(net), woken(plain)
    torch.testing.assert_close(plain(x, t, {"obs": (obs - observations.shift) / observations.scale}),
                               net(x, t, {"obs": obs}))


@EACH
def test_each_network_learns_a_conditional_regression(network):
    """Chunks are a function of the observation, which samples of the fitted flow follow and the mean chunk cannot."""
    draw = torch.Generator().manual_seed(0)
    obs = 2 * torch.rand(256, 3, generator=draw) - 1
    chunks = torch.stack([obs[:, :2], -obs[:, :2], 0 * obs[:, :2], obs[:, 1:]], 1)
    torch.manual_seed(0)
    policy = build_policy(network, 4, 3, 2, 5, prediction="flow")
    plan = Pretraining(steps=150, batch_size=64, learning_rate=5e-3, warmup_steps=10, time="grid")
    state = fresh_state(plan, policy.denoiser, seed=0)
    losses = [it.metrics["loss"] for it in fit(plan, policy, demonstration_batches(obs, chunks, 64), state)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    sample = policy.act({"obs": obs}, generator=draw).action
    assert (sample - chunks).square().mean() < 0.5 * chunks.square().mean()  # the chunks' mean is 0


def test_a_u_net_of_one_level_is_translation_equivariant_away_from_the_ends():
    torch.manual_seed(0)
    net = UNet(ChunkUNet(widths=(8,), groups=2, kernel=3), (32, 2), 3)
    x = torch.zeros(1, 32, 2)
    x[0, 14:17] = torch.randn(3, 2)
    t, obs = torch.tensor([0.3]), torch.randn(1, 3)
    out, moved = net(x, t, obs), net(x.roll(2, 1), t, obs)
    assert (out[:, 10:20] - out[:, 9:19]).abs().max() > 1e-2
    torch.testing.assert_close(moved[:, 10:24], out[:, 8:22], rtol=1e-4, atol=1e-5)


def test_the_skip_of_a_level_reaches_the_output_without_the_levels_below():
    torch.manual_seed(0)
    net = woken(UNet(ChunkUNet(widths=(16, 32), groups=4, time_features=16), (8, 2), 3))
    with torch.no_grad():
        net.shrink[0].weight.zero_()  # nothing of x reaches the lower level
        one, other = (net(x, torch.full((1,), 0.5), torch.zeros(1, 3)) for x in torch.randn(2, 1, 8, 2))
    assert float((one - other).abs().max()) > 1e-2


def test_a_transformer_without_positions_is_permutation_equivariant():
    torch.manual_seed(0)
    net = woken(Transformer(NETWORKS["transformer"], (6, 2), 3))
    x, t, obs, order = torch.randn(2, 6, 2), torch.rand(2), torch.randn(2, 3), torch.tensor([3, 0, 5, 1, 2, 4])
    assert (net(x[:, order], t, obs) - net(x, t, obs)[:, order]).abs().max() > 1e-3
    net.position.data.zero_()
    torch.testing.assert_close(net(x[:, order], t, obs), net(x, t, obs)[:, order], rtol=1e-4, atol=1e-5)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    block = AdaLNBlock(8, 2)
    torchs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    torchs.in_proj_weight.data, torchs.in_proj_bias.data = block.query_key_value.weight, block.query_key_value.bias
    torchs.out_proj.weight.data, torchs.out_proj.bias.data = block.mixed.weight, block.mixed.bias
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(block.attend(x), torchs(x, x, x)[0], rtol=1e-4, atol=1e-5)


def test_adaln_zero_starts_as_the_identity_and_the_network_at_zero():
    torch.manual_seed(0)
    block = AdaLNBlock(8, 2)
    x, condition = torch.randn(3, 5, 8), torch.randn(3, 8)
    assert torch.equal(block(x, condition), x)
    assert not torch.allclose(woken(block)(x, condition), x)
    net = Transformer(NETWORKS["transformer"], (4, 2), 3)
    assert not net(torch.randn(2, 4, 2), torch.rand(2), torch.randn(2, 3)).any()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ChunkUNet(widths=(12,)), r"multiples of groups=8, at least one, got \(12,\)"),
    (lambda: ChunkUNet(widths=()), "widths must be multiples"),
    (lambda: ChunkUNet(kernel=4), "kernel must be odd and at least 1, got 4"),
    (lambda: ChunkTransformer(width=30), "multiple of heads and blocks at least 1, got width=30, heads=4"),
    (lambda: replace(ChunkUNet(), time_features=5), "time_features must be even and at least 4, got 5")])
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
