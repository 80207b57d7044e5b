"""Scripted experts and the simulators they were written for; skipped where a simulator is not installed."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign_robot.choices import Gymnasium, Robosuite
from diffalign_robot.collection import RobotCollect
from diffalign_robot.demos import collect, scripted_expert
from diffalign_robot.envs import make

PUSHT = Gymnasium(id="gym_pusht:gym_pusht/PushT-v0", horizon=300)
FETCH = Gymnasium(id="gymnasium_robotics:FetchPickAndPlace-v4", horizon=50)


def wins(spec, place, seeds):
    return [won for _, _, won in collect(spec, scripted_expert(spec, place), seeds=seeds, action_noise=0.0,
                                         noise_seed=0)]


def test_the_resting_controller_fits_any_action_and_noise_makes_it_random():
    spec = Gymnasium(id="toy_env:ToySlowPoint-v0")
    rest = scripted_expert(spec, "diffalign_robot.scripted_rest:rest")
    still, noisy = (next(collect(spec, rest, seeds=[0], action_noise=noise, noise_seed=0)) for noise in (0.0, 0.4))
    assert still[1].shape == (16, 2)
    assert not still[1].any()
    assert 0.2 < noisy[1].std() < 0.6


def test_an_expert_that_cannot_be_found_says_why():
    spec = Gymnasium(id="toy_env:ToyPoint-v0")
    with pytest.raises(ValueError, match="'gymnasium' has no scripted expert of its own; set expert to module:"):
        scripted_expert(spec)
    with pytest.raises(ValueError, match=r"diffalign_robot\.scripted_lift has no function 'drop'"):
        scripted_expert(spec, "diffalign_robot.scripted_lift:drop")
    with pytest.raises(ValueError, match="no module named 'nowhere'"):
        scripted_expert(spec, "nowhere:act")
    with pytest.raises(ValueError, match="either expert or policy acts, got a:b and runs/x"):
        RobotCollect(environment=spec, expert="a:b", policy="runs/x")


def test_robosuite_settings_are_checked():
    with pytest.raises(ValueError, match="pays for avoiding success; set success_ends to false"):
        Robosuite(reward="dense")
    with pytest.raises(ValueError, match="need horizon >= 1"):
        Robosuite(horizon=0)


@pytest.fixture(scope="module")
def lift():
    pytest.importorskip("robosuite")
    episode = make(Robosuite(horizon=60))
    yield episode
    episode.close()


def test_a_robosuite_episode_repeats_from_its_seed_and_leaves_numpys_state(lift):
    seen = []
    for seed in (2**31 + 5, 6, 2**31 + 5):
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        lift.reset(seed)
        assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
        log = [lift.observe()]
        for action in np.random.default_rng(0).uniform(-1, 1, (5, 7)):
            lift.advance(action)
            log.append(lift.observe())
        seen.append(np.stack(log))
    np.testing.assert_array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0][0], seen[1][0])
    assert (lift.obs_dim, lift.action_dim, lift.control_rate_hz) == (19, 7, 20.0)


def test_robosuites_time_limit_truncates(lift):
    lift.reset(0)
    steps = [lift.advance(np.zeros(7, np.float32)) for _ in range(60)]
    assert [step.truncated for step in steps] == [False] * 59 + [True]
    assert not any(step.terminated or step.success or step.reward for step in steps)


def test_the_scripted_lift_lifts():
    pytest.importorskip("robosuite")
    assert all(wins(Robosuite(), "diffalign_robot.scripted_lift:lift", [1, 2, 3]))


def test_unknown_robosuite_tasks_and_keys_are_refused():
    pytest.importorskip("robosuite")
    with pytest.raises(ValueError, match=r"no task 'Lfit'; did you mean \['Lift'\]"):
        make(Robosuite(task="Lfit"))
    with pytest.raises(ValueError, match=r"no flat observations \['cube'\]; set keys to some of"):
        make(Robosuite(keys=("object", "cube")))


def test_the_scripted_pick_and_place_reaches_the_goal():
    pytest.importorskip("gymnasium_robotics")
    assert sum(wins(FETCH, "diffalign_robot.scripted_fetch:pick_and_place", [1, 2, 3, 4])) >= 3


@pytest.mark.filterwarnings("ignore")  # pygame's own
def test_the_scripted_push_covers_the_goal():
    pytest.importorskip("gym_pusht")
    assert sum(wins(PUSHT, "diffalign_robot.scripted_pusht:push", [1, 2, 9])) >= 2
