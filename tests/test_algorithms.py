"""The learning table: every algorithm improves every toy, with every kernel that has a density, by a stated margin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_on_policy import Constant, flat_reward, setup
from toys import PointMass, PromptBandit

from diffalign.algorithms import AWM, DDPO, DPOK, DPPO, FPO, ORW, DiffusionNFT, FlowGRPO, FPOPlus, GRPOGuard, ReinFlow
from diffalign.diffusion import CPS, DDIM, DDPM, ODE, DanceSDE, FlowSDE, NoisyODE, TrainedSteps
from diffalign.rl.advantages import GAE, GroupNormalized, LeaveOneOut
from diffalign.rl.asymmetric import AsymmetricPO
from diffalign.rl.clamped import ClampedRatio
from diffalign.rl.likelihoods import Matching
from diffalign.rl.surrogates import DivergenceGate, GuardClip, PPOClip, SimplePO, WeightedRegression
from diffalign.train.on_policy import Optimization, optimize
from diffalign.train.state import frozen_copy

PLAN = Optimization(epochs=3, minibatches=1)
AVERAGED = replace(PLAN, ema_decay=0.5)
WIDE = PPOClip(low=0.2, high=0.3)
EIGHT = Matching(draws=8)
LOUD = NoisyODE(min_std=0.1, max_std=0.5)


class Robots(PointMass):
    """The point mass with all episodes in one group, for advantages that compare episodes."""

    def collect(self, policy, *, generator):
        rollout = super().collect(policy, generator=generator)
        return replace(rollout, group=torch.zeros_like(rollout.group), prompt=torch.zeros_like(rollout.prompt))


def learn(algorithm, kernel, source, *, prediction="flow", iterations=25, rates=1e-2, seed=0, **options):
    """Mean return of the first iteration and of the last five."""
    pieces = algorithm.compose()
    policy, state = setup(kernel, prediction, critic=pieces.needs_critic, rates=rates, seed=seed,
                          ema_decay=algorithm.optimization.ema_decay, **options)
    loop = optimize(pieces, policy, source, state, reference=frozen_copy(policy.denoiser))
    returns = [next(loop).metrics["reward/mean"] for _ in range(iterations)]
    return returns[0], sum(returns[-5:]) / 5


# An answer that ignores the prompt gets at best -1, the optimum is 0.
BANDIT = {
    "ddpo-ddpm": (DDPO(surrogate=WIDE, optimization=PLAN), DDPM(), "eps"),
    "ddpo-ddim": (DDPO(surrogate=WIDE, optimization=PLAN), DDIM(eta=0.8), "v"),
    "ddpo-published-clip": (DDPO(surrogate=PPOClip(low=0.1, high=0.1, unit="per_dim"), optimization=PLAN), DDPM(),
                            "eps"),
    "ddpo-floor": (DDPO(surrogate=WIDE, optimization=PLAN), DDIM(eta=0.0, min_std=0.15), "x0"),
    "dpok-prompt": (DPOK(surrogate=ClampedRatio(limit=0.3), optimization=PLAN), DDPM(), "eps"),
    "dpok-value": (DPOK(surrogate=ClampedRatio(limit=0.3), advantage=GAE(), optimization=PLAN), DDIM(), "v"),
    "dpok-published-clamp": (DPOK(surrogate=ClampedRatio(limit=0.1, unit="per_dim"), optimization=PLAN), DDPM(), "eps"),
    "flow_grpo-sde": (FlowGRPO(surrogate=WIDE, optimization=PLAN), FlowSDE(), "flow"),
    "flow_grpo-dance": (FlowGRPO(surrogate=WIDE, optimization=PLAN), DanceSDE(eta=0.6), "flow"),
    "flow_grpo-cps": (FlowGRPO(surrogate=WIDE, optimization=PLAN), CPS(), "flow"),
    "flow_grpo-ddpm": (FlowGRPO(surrogate=WIDE, optimization=PLAN), DDPM(), "flow"),
    "flow_grpo-gate": (FlowGRPO(surrogate=DivergenceGate(limit=0.1), optimization=PLAN), FlowSDE(), "flow"),
    "flow_grpo-simple_po": (FlowGRPO(surrogate=SimplePO(limit=0.3), optimization=PLAN), FlowSDE(), "flow"),
    "flow_grpo-loo-kl": (FlowGRPO(surrogate=WIDE, optimization=PLAN, advantage=LeaveOneOut(), reference_kl=1e-3),
                         FlowSDE(), "flow"),
    "guard-sde": (GRPOGuard(optimization=PLAN), FlowSDE(), "flow"),
    "guard-cps-published": (GRPOGuard(surrogate=GuardClip(low=0.1, high=0.1, unit="per_dim"), optimization=PLAN), CPS(),
                            "flow"),
    "guard-ddpm": (GRPOGuard(optimization=PLAN), DDPM(), "eps"),
    "dppo": (DPPO(surrogate=WIDE, optimization=PLAN), DDPM(min_std=0.1), "eps"),
    "awm-ode": (AWM(optimization=PLAN, matching=Matching(draws=8)), ODE(), "flow"),
    "awm-sde": (AWM(optimization=PLAN, matching=Matching(draws=8)), FlowSDE(), "flow"),
    "nft-ode": (DiffusionNFT(matching=Matching(draws=8), optimization=AVERAGED), ODE(), "flow"),
    "nft-live-sde": (DiffusionNFT(matching=Matching(draws=8), optimization=PLAN, behavior="live"), FlowSDE(), "flow"),
    "orw-best": (ORW(optimization=PLAN, matching=Matching(draws=8)), ODE(), "flow"),
    "orw-exp": (ORW(optimization=PLAN, matching=Matching(draws=8), advantage=GroupNormalized(),
                    surrogate=WeightedRegression(temperature=0.5)), FlowSDE(), "flow"),
    "fpo": (FPO(optimization=PLAN, advantage=GroupNormalized(), surrogate=WIDE, matching=EIGHT), ODE(), "flow"),
    "fpo_plus-aspo": (FPOPlus(optimization=PLAN, advantage=GroupNormalized(), surrogate=AsymmetricPO(limit=0.2),
                              matching=EIGHT), ODE(), "flow"),
    "fpo_plus-clip": (FPOPlus(optimization=PLAN, advantage=GroupNormalized(), surrogate=WIDE, matching=EIGHT), CPS(),
                      "flow"),
    "reinflow-fixed": (ReinFlow(optimization=PLAN, advantage=GroupNormalized(), surrogate=WIDE),
                       NoisyODE(min_std=0.3, max_std=0.5), "flow"),
    "flow_grpo-floor": (FlowGRPO(surrogate=WIDE, optimization=PLAN), FlowSDE(min_std=0.1), "flow"),
    "nft-v": (DiffusionNFT(matching=Matching(draws=8), optimization=AVERAGED), DDPM(), "v"),
}


@pytest.mark.parametrize(("algorithm", "kernel", "prediction"), BANDIT.values(), ids=BANDIT)
def test_the_prompt_bandit_improves(algorithm, kernel, prediction):
    before, after = learn(algorithm, kernel, PromptBandit(), prediction=prediction)
    assert before < -1.1
    assert after > -0.5


WINDOWS = [TrainedSteps(size=2, ode_elsewhere=True), TrainedSteps(start=-3, stop=4),
           TrainedSteps(stop=4, size=2, move_every=3, ode_elsewhere=True)]


@pytest.mark.parametrize("trained", WINDOWS, ids=repr)
def test_a_window_of_trained_steps_is_enough(trained):
    algorithm = FlowGRPO(surrogate=WIDE, optimization=PLAN)
    before, after = learn(algorithm, FlowSDE(), PromptBandit(), trained=trained)
    assert before < -1.1
    assert after > -0.5


class InFours(PromptBandit):
    """The bandit in groups of four images, LOOP's K."""

    def collect(self, policy, *, generator):
        rollout = super().collect(policy, generator=generator)
        return replace(rollout, group=torch.arange(len(rollout.group)) // 4)


def test_loop_learns_from_groups_of_four():
    """LOOP (arXiv 2503.00897): DDPO's steps and clip, each return against the mean of the other three."""
    algorithm = DDPO(surrogate=WIDE, optimization=PLAN, advantage=LeaveOneOut())
    before, after = learn(algorithm, DDIM(), InFours(), prediction="eps")
    assert before < -1.1
    assert after > -0.5


# The point mass: one success is worth 1; at the start about one episode in five reaches the goal.
ROBOT = {
    "dppo": (DPPO(surrogate=WIDE, optimization=PLAN), DDPM(min_std=0.1), "eps"),
    "dppo-clip-schedule": (DPPO(surrogate=PPOClip(low=0.2, high=0.2, step_start=0.1), optimization=PLAN,
                             denoising_discount=0.9), DDPM(min_std=0.1), "eps"),
    "dppo-flow": (DPPO(surrogate=WIDE, optimization=PLAN, advantage=GAE(lam=0.9)), FlowSDE(), "flow"),
    "ddpo": (DDPO(surrogate=WIDE, optimization=PLAN), DDPM(min_std=0.1), "eps"),
    "flow_grpo": (FlowGRPO(surrogate=WIDE, optimization=PLAN, advantage=GroupNormalized()), FlowSDE(), "flow"),
    "guard": (GRPOGuard(optimization=PLAN, advantage=GAE()), FlowSDE(), "flow"),
    "fpo": (FPO(optimization=PLAN, surrogate=WIDE), ODE(), "flow"),
    "fpo_plus": (FPOPlus(optimization=PLAN, surrogate=AsymmetricPO(limit=0.2)), ODE(), "flow"),
    "dppo-cps-floor": (DPPO(surrogate=WIDE, optimization=PLAN), CPS(min_std=0.1), "flow"),
    "nft": (DiffusionNFT(optimization=AVERAGED, advantage=GAE()), ODE(), "flow"),
    "awm": (AWM(optimization=PLAN, advantage=GAE(), matching=Matching(draws=4)), ODE(), "flow"),
    "awr": (ORW(optimization=PLAN, advantage=GAE(), matching=Matching(draws=4),
                surrogate=WeightedRegression(temperature=0.5)), ODE(), "flow"),
}


@pytest.mark.parametrize(("algorithm", "kernel", "prediction"), ROBOT.values(), ids=ROBOT)
def test_the_point_mass_improves(algorithm, kernel, prediction):
    before, after = learn(algorithm, kernel, Robots(), prediction=prediction)
    assert before < 0.0
    assert after > before + 0.6


REINFLOW = ReinFlow(optimization=PLAN, surrogate=WIDE)


def test_reinflow_with_learned_noise_improves_both_toys():
    before, after = learn(replace(REINFLOW, advantage=GroupNormalized()), LOUD, PromptBandit(), noise=(16,))
    assert before < -1.1
    assert after > -0.5
    before, after = learn(REINFLOW, LOUD, Robots(), noise=(16,))
    assert before < 0.0
    assert after > before + 0.6


def test_without_a_reward_signal_nothing_is_learned():
    """The control of the table: the same run on a constant reward stays where it was."""
    seen = []

    def record(rollout):
        seen.append(float(rollout.reward.mean()))
        return flat_reward(rollout)

    learn(FlowGRPO(surrogate=WIDE, optimization=PLAN), FlowSDE(), Constant(PromptBandit(), record))
    assert abs(sum(seen[-5:]) / 5 - sum(seen[:5]) / 5) < 0.6
