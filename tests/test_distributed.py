"""World-size invariance: two gloo processes do what one process does on the same episodes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_on_policy import demonstrations, setup
from test_steering import steered_toy
from toys import MLPDenoiser, PointMass, PromptBandit, toy_policy

from diffalign.algorithms import DDPO, DPPO, FlowGRPO
from diffalign.diffusion import DDPM, FlowSDE
from diffalign.diffusion.trajectories import concatenate
from diffalign.rl.advantages import GroupNormalized, PromptRunning
from diffalign.rl.likelihoods import Matching, Transition
from diffalign.rl.pooled import PooledMatching
from diffalign.rl.rollouts import Rollout
from diffalign.rl.starts import Start
from diffalign.train import distributed
from diffalign.train.on_policy import Optimization, optimize
from diffalign.train.state import TrainState, frozen_copy

TESTS = Path(__file__).parent
EPISODES = 8
PLAN = Optimization(epochs=2, minibatches=3, ema_decay=0.9)


class Split:
    """Episode b of iteration i depends on (i, b) alone; every rank collects its own columns of them."""

    def __init__(self, toy, *, groups):
        self.toy, self.groups, self.iteration = toy, groups, 0

    def collect(self, policy, *, generator):
        own = torch.arange(EPISODES).chunk(distributed.world_size())[distributed.rank()]
        parts = [self.toy.collect(policy, generator=torch.Generator().manual_seed(1000 * self.iteration + int(b)))
                 for b in own]
        self.iteration += 1
        steps = range(parts[0].reward.shape[0])
        trajectory = concatenate([_row(part.trajectory, h) for h in steps for part in parts])
        after = {"obs": torch.cat([part.next_cond["obs"][h : h + 1] for h in steps for part in parts])}
        stack = {name: torch.cat([getattr(part, name) for part in parts], 1)
                 for name in ("reward", "terminated", "truncated", "valid")}
        group = own % self.groups  # the members of a group live on different ranks
        return Rollout(trajectory, **stack, next_cond=after, group=group, prompt=group, stats={})


def _row(path, h):
    return replace(path, x=path.x[h : h + 1], log_prob=path.log_prob[h : h + 1], mean=path.mean[h : h + 1],
                   std=path.std[h : h + 1], cond={name: leaf[h : h + 1] for name, leaf in path.cond.items()})


class OneImage(PromptBandit):
    def __init__(self):
        super().__init__(prompts=1, images=1)


def flow_grpo():
    policy, state = setup(FlowSDE(), ema_decay=0.9)
    pieces = FlowGRPO(optimization=PLAN, reference_kl=0.1, advantage=GroupNormalized(scale="group")).compose()
    return state, optimize(pieces, policy, Split(OneImage(), groups=3), state, reference=frozen_copy(policy.denoiser))


def ddpo():
    policy, state = setup(FlowSDE(), ema_decay=0.9)
    pieces = DDPO(optimization=PLAN, advantage=PromptRunning(buffer=8, min_count=4)).compose()
    return state, optimize(pieces, policy, Split(OneImage(), groups=2), state)


def dppo():
    """Several decisions, some not executed; a critic that learns alone at first; demonstrations."""
    policy, state = setup(DDPM(min_std=0.3), "eps", critic=True)
    plan = Optimization(epochs=2, critic_warmup=1, weight_decay=0.1)
    pieces = DPPO(optimization=plan, behavior_cloning=0.1).compose()
    return state, optimize(pieces, policy, Split(PointMass(episodes=1), groups=2), state, demonstrations=demonstrations)


CASES = {"flow_grpo": flow_grpo, "ddpo": ddpo, "dppo": dppo}


def outcome(name):
    """(tensors after three iterations, metrics of each)."""
    state, loop = CASES[name]()
    metrics = [next(loop).metrics for _ in range(3)]
    tensors = {f"{role}.{n}": p.detach() for role, m in state.modules.items() for n, p in m.named_parameters()}
    tensors |= {f"ema.{n}": w for n, w in (state.ema.weights if state.ema else {}).items()}
    return tensors | state.statistics, metrics


def work(rank, folder):
    """One of two ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({name: outcome(name) for name in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def fork_two(folder):
    """Run as a script: two forked ranks, so that everything is imported once."""
    TrainState.create({"policy": MLPDenoiser()}, {"policy": 1e-3}, seed=0)
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            work(rank, folder)
            os._exit(0)
    codes = [os.waitpid(child, 0)[1] for child in children]
    raise SystemExit(any(codes))


@pytest.fixture(scope="module")
def alone():
    return {name: outcome(name) for name in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    code = f"import torch; torch.set_num_threads(1); import test_distributed as t; t.fork_two({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, alone, ranks):
    """Parameters, averages, statistics and the logged numbers; rounding is all that may differ."""
    expected_tensors, expected_metrics = alone[name]
    for rank in range(2):
        tensors, metrics = ranks[rank][name]
        assert tensors.keys() == expected_tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected_tensors[key], rtol=0, atol=2e-5, equal_nan=True)
        for line, expected in zip(metrics, expected_metrics):
            for key in ("reward/mean", "reward/std", "advantage/std", "grad_norm/policy"):
                assert line.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-3, abs=1e-5), key
    for key, tensor in ranks[0][name][0].items():
        assert torch.equal(tensor.nan_to_num(), ranks[1][name][0][key].nan_to_num())  # ranks never drift apart


@pytest.mark.parametrize("name", CASES)
def test_every_rank_logs_the_numbers_of_all(name, alone, ranks):
    expected = alone[name][1][1]
    for rank in range(2):
        line = ranks[rank][name][1][1]
        assert line.keys() == expected.keys()
        for key in set(expected) - {"ratio_drift", "log_ratio/std"}:
            assert line[key] == pytest.approx(expected[key], rel=2e-2, abs=1e-4), key


def test_one_process_needs_no_process_group():
    x = torch.arange(6).reshape(2, 3)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert torch.equal(distributed.gather_columns(x), x)
    assert torch.equal(distributed.own_columns(x), x)
    assert distributed.sum_scalar(2.5) == 2.5


@pytest.mark.parametrize("counts", [(5,), (2, 3), (1, 1, 3), (0, 4, 1)], ids=str)
@pytest.mark.parametrize("likelihood", [Transition(), Matching(draws=3), PooledMatching(), Start()], ids=repr)
def test_rows_of_a_process_are_those_of_one_process_at_their_places(likelihood, counts):
    """However the decisions are spread: also where a process has one of several draws, or none at all."""
    policy = steered_toy() if isinstance(likelihood, Start) else toy_policy(MLPDenoiser(event=3), FlowSDE(), event=(3,))
    cond = {"obs": torch.linspace(-1, 1, 5)[:, None]}
    trajectory = policy.act(cond, generator=torch.Generator().manual_seed(0)).trajectory
    advantage = torch.arange(1.0, 6.0)

    def examples(before, count):
        return likelihood.examples(policy, trajectory, advantage, decisions=torch.arange(before, before + count),
                                   generator=torch.Generator().manual_seed(1), others=(before, 5 - before - count))

    whole, places = examples(0, 5), []
    assert whole.place.tolist() == list(range(len(whole)))
    for rank, count in enumerate(counts):
        part = examples(sum(counts[:rank]), count)
        places += part.place.tolist()
        if not count:
            continue
        own, expected = part.rows(torch.arange(len(part))), whole.rows(part.place)
        for one, other in [(own.advantage, expected.advantage), (own.old_log_prob, expected.old_log_prob),
                           *((leaf, expected.data[name]) for name, leaf in own.data.items())]:
            torch.testing.assert_close(one, other)
    assert sorted(places) == list(range(len(whole)))
