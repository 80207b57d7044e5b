"""What the loop refuses, and that it refuses before anything moved."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_on_policy import Constant, demonstrations, parameters, run, setup
from torch import nn
from toys import MLPDenoiser, PointMass, PromptBandit

from diffalign.algorithms import AWM, DDPO, DPPO, FlowGRPO
from diffalign.diffusion import DDIM, DDPM, ODE, FlowSDE
from diffalign.rl.advantages import GroupNormalized
from diffalign.rl.likelihoods import Matching, Transition
from diffalign.rl.surrogates import ContrastiveMatching, DivergenceGate, GuardClip, PPOClip
from diffalign.train import checkpoint
from diffalign.train.on_policy import OnPolicy, Optimization, RatioDrift, optimize
from diffalign.train.update import NonFinite


def pieces(**options):
    fields = {"likelihood": Transition(), "advantage": GroupNormalized(), "surrogate": PPOClip(),
              "optimization": Optimization()}
    return OnPolicy(**(fields | options))


@pytest.mark.parametrize(("options", "message"), [
    ({"surrogate": DivergenceGate(), "likelihood": Matching()}, r"DivergenceGate needs the gaussian step .* Matching"),
    ({"surrogate": GuardClip(), "likelihood": Matching()}, r"GuardClip needs the gaussian step .* Matching"),
    ({"surrogate": ContrastiveMatching()}, r"ContrastiveMatching needs the old error .* Transition"),
    ({"behavior": "averaged", "optimization": Optimization(ema_decay=0.9)}, "averaged rollouts need .* Transition"),
    ({"behavior": "averaged", "likelihood": Matching()}, "averaged rollouts need .* got ema_decay=None"),
    ({"reference_kl": 0.1, "likelihood": Matching()}, "reference_kl=0.1 needs Gaussian steps.*use reference_velocity"),
    ({"ema_velocity": 0.1}, "ema_velocity=0.1 needs averaged weights; set optimization.ema_decay"),
    ({"reference_kl": -0.1}, "reference_kl must be at least 0, got -0.1"),
    ({"reference_velocity": -1.0}, "reference_velocity must be at least 0"),
    ({"behavior_cloning": math.nan}, "behavior_cloning must be at least 0, got nan"),
    ({"value_loss": -1.0}, "value_loss must be at least 0")])
def test_compositions(options, message):
    with pytest.raises(ValueError, match=message):
        pieces(**options)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"minibatches": 0}, {"microbatch_rows": 0}, {"learning_rate": 0.0},
                                     {"critic_learning_rate": -1.0}, {"ratio_tolerance": 0.0}])
def test_optimization(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        Optimization(**options)


@pytest.mark.parametrize(("algorithm", "kernel", "message"), [
    (FlowGRPO(reference_kl=0.1), FlowSDE(), r"reference_kl=0.1, .* need a reference denoiser, got None"),
    (AWM(reference_velocity=0.2), ODE(), "reference_velocity=0.2 need a reference denoiser"),
    (DPPO(), FlowSDE(), r"the GAE advantage needs a critic in state.modules, got \['policy'\]"),
    (DPPO(advantage=GroupNormalized(), behavior_cloning=0.5), FlowSDE(), "behavior_cloning=0.5 needs demonstrations"),
    (FlowGRPO(), ODE(), r"ODE\(type='ode'\) is deterministic and has no transition density"),
    (FlowGRPO(), DDIM(eta=0.0), r"DDIM\(.*eta=0.0.* is deterministic"),
    (FlowGRPO(), FlowSDE(noise_level=0.0), r"FlowSDE\(.*is deterministic")])
def test_missing_parts(algorithm, kernel, message):
    policy, state = setup(kernel)
    with pytest.raises(ValueError, match=message):
        run(algorithm.compose(), policy, PromptBandit(), state, 1)
    assert state.step == 0


def test_state_and_policy_must_share_the_module():
    policy, state = setup(FlowSDE())
    other = replace(policy, denoiser=MLPDenoiser())
    with pytest.raises(ValueError, match="must be the policy's denoiser, got another module"):
        run(FlowGRPO().compose(), other, PromptBandit(), state, 1)


def test_more_minibatches_than_rows():
    policy, state = setup(FlowSDE(), steps=2)
    plan = Optimization(minibatches=33)
    with pytest.raises(ValueError, match="32 rows cannot fill 33 minibatches"):
        run(FlowGRPO(optimization=plan).compose(), policy, PromptBandit(), state, 1)


def test_one_step_of_a_kernel_without_noise_there():
    policy, state = setup(FlowSDE(), steps=1)
    with pytest.raises(ValueError, match="has no stochastic trained step"):
        run(FlowGRPO().compose(), policy, PromptBandit(), state, 1)


class Forgetful(MLPDenoiser):
    """Dropout is on: the same input gives another output."""

    def __init__(self):
        super().__init__()
        self.net.insert(4, nn.Dropout(0.2))


def test_dropout_is_caught_as_ratio_drift():
    policy, state = setup(FlowSDE())
    policy = replace(policy, denoiser=Forgetful().train())
    state.modules["policy"] = policy.denoiser
    before = parameters(state)
    with pytest.raises(RatioDrift, match=r"on the first minibatch the log-ratio reaches .* nothing was updated"):
        run(FlowGRPO().compose(), policy, PromptBandit(), state, 1)
    assert torch.equal(parameters(state), before)
    policy.denoiser.eval()
    run(FlowGRPO().compose(), policy, PromptBandit(), state, 1)


@pytest.mark.parametrize(("offset", "refused"), [(0.04, False), (0.06, True), (-0.06, True)])
def test_the_drift_tolerance_is_in_nats(offset, refused):
    def shift(rollout):
        path = rollout.trajectory
        return replace(rollout, trajectory=replace(path, log_prob=path.log_prob + offset * path.trained))

    policy, state = setup(FlowSDE())
    algorithm = FlowGRPO(optimization=Optimization(ratio_tolerance=0.05)).compose()
    if refused:
        with pytest.raises(RatioDrift, match=r"reaches 0\.06 nats.*ratio_tolerance=0.05"):
            run(algorithm, policy, Constant(PromptBandit(), shift), state, 1)
    else:
        (metrics,) = run(algorithm, policy, Constant(PromptBandit(), shift), state, 1)
        assert metrics["ratio_drift"] == pytest.approx(0.04, abs=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_reward_is_named_and_the_last_checkpoint_holds(tmp_path, value):
    """Iteration 2 meets a bad reward: parameters stay those of the checkpoint, which loads."""
    policy, state = setup(DDPM(min_std=0.1), "eps", critic=True)
    calls = []

    def spoil(rollout):
        calls.append(1)
        reward = rollout.reward.clone()
        if len(calls) == 2:
            reward[3, 5] = value
        return replace(rollout, reward=reward)

    loop = optimize(DPPO().compose(), policy, Constant(PointMass(), spoil), state)
    next(loop)
    saved = checkpoint.save(tmp_path, state)
    before = parameters(state)
    with pytest.raises(FloatingPointError, match=r"reward of decision 3, episode 5 is (nan|inf); 1 of 192 rewards"):
        next(loop)
    assert torch.equal(parameters(state), before)
    _, fresh = setup(DDPM(min_std=0.1), "eps", critic=True, seed=5)
    checkpoint.load(saved, fresh)
    assert torch.equal(parameters(fresh), before)


def test_an_exploding_update_is_stopped():
    """Rewards of 1e30 overflow the norm of a finite gradient: NonFinite says so and the weights are the ones before."""
    policy, state = setup(FlowSDE())
    before = parameters(state)
    huge = Constant(PromptBandit(), lambda r: replace(r, reward=1e30 * r.reward))
    algorithm = FlowGRPO(advantage=GroupNormalized(scale="none", clip=None)).compose()
    with pytest.raises(NonFinite, match=r"the gradient norm of policy is not finite at step 0; the weights are those"):
        run(algorithm, policy, huge, state, 1)
    assert torch.equal(parameters(state), before)


def test_a_good_composition_is_not_refused():
    policy, state = setup(FlowSDE(), ema_decay=0.9)
    plan = Optimization(ema_decay=0.9)
    for algorithm in (DDPO(optimization=plan), AWM(ema_velocity=0.1, optimization=plan)):
        run(algorithm.compose(), policy, PromptBandit(), state, 1)
    policy, state = setup(DDIM(eta=0.0, min_std=0.1), "eps", critic=True)
    run(DPPO(behavior_cloning=0.1).compose(), policy, PointMass(), state, 1, demonstrations=demonstrations)
