"""The learned initial noise: its density, the frozen base under it, and PPO on it as the core and both jobs run it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_algorithms import Robots
from toys import MLPDenoiser, PromptBandit, toy_policy

from diffalign.algorithms import FlowGRPO, NoisePPO
from diffalign.diffusion import CPS, DDPM, ODE
from diffalign.policy.compose import Composition
from diffalign.policy.normalize import Normalizer
from diffalign.policy.steering import NoiseNet, SteeredDenoiser, steered
from diffalign.rl.advantages import GAE
from diffalign.rl.critics import ValueNet
from diffalign.rl.starts import Start
from diffalign.rl.surrogates import PPOClip
from diffalign.train.on_policy import Optimization, optimize
from diffalign.train.state import TrainState, frozen_copy
from diffalign.train.supervised import Pretraining, fit, fresh_state

COND = {"obs": torch.linspace(-1, 1, 6)[:, None]}
ADVANTAGE = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.3, 0.0])
PLAN = Optimization(learning_rate=1e-2, epochs=3)


def steered_toy(kernel=None, prediction="flow", moved=True, base=None):
    policy = toy_policy(base or MLPDenoiser(prediction=prediction), kernel or ODE())
    policy = replace(policy, denoiser=steered(policy.denoiser, (2,), 1, (16,), key="obs", seed=3))
    if moved:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in policy.denoiser.noise.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("kernel", [ODE(), CPS()])
def test_an_untrained_noise_net_is_the_base_policy(kernel):
    steered_policy = steered_toy(kernel, moved=False)
    base = replace(steered_policy, denoiser=steered_policy.denoiser.denoiser)
    draws = [policy.act(COND, generator=torch.Generator().manual_seed(0)).action for policy in (steered_policy, base)]
    assert torch.equal(*draws)
    assert torch.equal(steered_policy.start(COND).kl(base.start(COND)), torch.zeros(6))


def test_chains_start_where_the_net_says():
    """Sample mean and std of 20,000 starts against the net's, within five standard errors; zero noise is the mean."""
    policy, n = steered_toy(), 20_000
    cond = {"obs": torch.full((n, 1), 0.5)}
    with torch.no_grad():
        start = policy.start({"obs": torch.tensor([[0.5]])})
    assert float(start.std) != 1
    x = policy.act(cond, generator=torch.Generator().manual_seed(0)).trajectory.x[:, 0]
    std = float(start.std)
    assert ((x.mean(0) - start.mean[0]).abs() < 5 * std / n**0.5).all()
    assert ((x.std(0) / std - 1).abs() < 5 / (2 * n) ** 0.5).all()
    still = replace(policy, zero_noise=True).act(COND, generator=torch.Generator()).trajectory.x[:, 0]
    torch.testing.assert_close(still, policy.start(COND).mean)


def test_the_net_reads_its_own_leaf_through_its_normalizer():
    normalizer = Normalizer(4)
    normalizer.shift.fill_(2.0)
    net = NoiseNet((2,), 4, (8,), key="text", normalizer=normalizer)
    with torch.no_grad():
        net.net[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    text = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1))
    expected = net.net(text.flatten(1) - 2)
    torch.testing.assert_close(net({"text": text, "obs": torch.zeros(3, 9)}).mean, expected)


def test_the_start_likelihood_is_the_density_of_the_noise():
    """log N(x_K; mean, std^2) by hand; ratio 1 at the rollout; the gradient is A grad log p and spares the base."""
    policy = steered_toy()
    trajectory = trajectory_of(policy)
    examples = Start().examples(policy, trajectory, ADVANTAGE, decisions=torch.tensor([1, 3]),
                                generator=torch.Generator())
    rows = examples.rows(torch.tensor([1, 0]))
    assert rows.advantage.tolist() == [3.0, -2.0]
    new, start = Start().score(policy, rows), policy.start(COND)
    by_hand = torch.distributions.Normal(start.mean, start.std).log_prob(trajectory.x[:, 0]).sum(1)[[3, 1]]
    torch.testing.assert_close(new.log_prob, by_hand)
    torch.testing.assert_close(rows.old_log_prob, by_hand)
    result = PPOClip(low=0.2, high=0.2, unit="nats")(new, rows)
    parameters = list(policy.denoiser.noise.parameters())
    found = torch.autograd.grad(result.loss.sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad((-rows.advantage * new.log_prob).sum(), parameters)
    assert max(float(e.abs().max()) for e in expected) > 0.1
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in policy.denoiser.denoiser.parameters())


def test_noise_ppo_improves_the_prompt_bandit_through_a_frozen_base():
    """The base makes both targets for either prompt; only the noise can tell them apart, and the base stays bitwise."""
    base = broad_base()
    before = copy.deepcopy(base.state_dict())
    policy = steered_toy(moved=False, base=base)
    state = TrainState.create({"policy": policy.denoiser}, {"policy": 1e-2}, seed=0)
    loop = optimize(NoisePPO(optimization=PLAN, surrogate=PPOClip(low=0.2, high=0.2, unit="nats")).compose(), policy,
                    PromptBandit(images=32), state)
    returns = [next(loop).metrics["reward/mean"] for _ in range(40)]
    assert returns[0] < -1.4
    assert sum(returns[-5:]) / 5 > -0.6
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())


def test_noise_ppo_improves_the_point_mass_with_a_critic():
    policy = steered_toy(DDPM(), prediction="eps", moved=False, base=broad_base("eps"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        critic = ValueNet(1, (32,))
    state = TrainState.create({"policy": policy.denoiser, "critic": critic}, {"policy": 1e-2, "critic": 1e-2}, seed=0)
    algorithm = NoisePPO(advantage=GAE(gamma=0.95, lam=0.95), optimization=PLAN)
    loop = optimize(algorithm.compose(), policy, Robots(), state, reference=frozen_copy(policy.denoiser))
    returns = [next(loop).metrics["reward/mean"] for _ in range(40)]
    assert sum(returns[-5:]) / 5 > returns[0] + 0.5


def broad_base(prediction="flow"):
    """A denoiser of (+-1, 0.5) for any condition: its noise decides which."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = MLPDenoiser(prediction=prediction)
    policy, plan = toy_policy(denoiser, DDPM()), Pretraining(steps=400, batch_size=128, learning_rate=3e-3)

    def batch(generator):
        side = torch.randint(0, 2, (128, 1), generator=generator) * 2.0 - 1
        where = torch.cat([side, torch.full((128, 1), 0.5)], 1) + 0.1 * torch.randn(128, 2, generator=generator)
        return where, {"obs": 3 * torch.rand(128, 1, generator=generator) - 1.5}

    for _ in fit(plan, policy, batch, fresh_state(plan, denoiser, seed=0)):
        pass
    return denoiser


def test_the_reference_kl_is_that_of_the_noise_to_the_standard_normal():
    policy = steered_toy()
    rows = Start().examples(policy, trajectory_of(policy), ADVANTAGE, decisions=torch.arange(6),
                            generator=torch.Generator()).rows(torch.arange(6))
    plain = replace(policy, denoiser=policy.denoiser.denoiser)
    start = policy.start(COND)
    std = float(start.std.detach()[0])
    by_hand = 0.5 * start.mean.square().sum(1) + 2 * (0.5 * std**2 - 0.5 - torch.tensor(std).log())
    new, anchor = (Start().score(p, rows) for p in (policy, plain))
    torch.testing.assert_close(new.gaussian.kl(anchor.gaussian), by_hand)


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda: NoisePPO().compose().require_steering(None), r"Start likelihood needs a learned initial noise, .*=None"),
    (lambda: FlowGRPO().compose().require_steering((8,)), r"Transition likelihood cannot use .* steering=\(8,\)"),
    (lambda: replace(NoisePPO().compose(), reference_velocity=0.1), "Start likelihood has not; use reference_kl"),
    (lambda: Start().examples(replace(steered_toy(), denoiser=MLPDenoiser()), trajectory_of(steered_toy()), ADVANTAGE,
                              decisions=torch.arange(1), generator=torch.Generator()), "got a plain MLPDenoiser"),
    (lambda: Start().score(steered_toy(), start_rows()).velocity, "does not ask the denoiser"),
    (lambda: SteeredDenoiser(Composition((steered_toy(),), (1.0,)), NoiseNet((2,), 1)), "must be a module, got Comp")])
def test_refusals(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        wrong()


def start_rows():
    policy = steered_toy()
    return Start().examples(policy, trajectory_of(policy), ADVANTAGE, decisions=torch.arange(6),
                            generator=torch.Generator()).rows(torch.arange(2))


def trajectory_of(policy):
    return policy.act(COND, generator=torch.Generator().manual_seed(0)).trajectory
