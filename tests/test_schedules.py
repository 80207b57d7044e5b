"""Time grids, trained windows, joined trajectories."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from toys import MLPDenoiser, toy_policy

from diffalign.diffusion import FlowSDE, Schedule, TrainedSteps
from diffalign.diffusion.trajectories import concatenate


def test_uniform_grid():
    torch.testing.assert_close(Schedule(steps=4).times(), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    assert Schedule(steps=1).times().tolist() == [1.0, 0.0]
    assert Schedule(steps=10).times().dtype == torch.float32


def test_shift_is_sd3_eq_23():
    """shift 3: t -> 3 t / (1 + 2 t): 0.5 -> 0.75, 0.25 -> 0.5; the ends stay."""
    assert Schedule(steps=4, shift=3.0).times().tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert Schedule(steps=2, shift=0.5).times().tolist() == pytest.approx([1.0, 1 / 3, 0.0])


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 2, "shift": 0.0}, {"steps": 2, "shift": -1.0}])
def test_schedule_refusals(options):
    with pytest.raises(ValueError, match=r"must be at least 1, got 0|shift must be positive"):
        Schedule(**options)


@pytest.mark.parametrize(("trained", "expected"), [
    (TrainedSteps(), [0, 1, 2, 3, 4, 5]), (TrainedSteps(start=2), [2, 3, 4, 5]), (TrainedSteps(stop=2), [0, 1]),
    (TrainedSteps(start=-2), [4, 5]), (TrainedSteps(start=1, stop=4), [1, 2, 3]),
    (TrainedSteps(start=1, stop=4, size=3), [1, 2, 3])])
def test_trained_ranges(trained, expected, generator):
    mask = trained.draw(6, generator)
    assert mask.dtype == torch.bool
    assert mask.nonzero().flatten().tolist() == expected


def test_random_windows_are_contiguous_uniform_and_in_range(generator):
    trained = TrainedSteps(start=1, stop=6, size=2)
    firsts = []
    for _ in range(400):
        steps = trained.draw(8, generator).nonzero().flatten().tolist()
        assert steps == [steps[0], steps[0] + 1]
        firsts.append(steps[0])
    counts = [firsts.count(first) for first in range(1, 5)]
    assert sum(counts) == 400  # never outside 1..4
    assert min(counts) > 60  # 100 expected each; 60 is 4.6 standard deviations below
    again = TrainedSteps(start=1, stop=6, size=2).draw(8, torch.Generator().manual_seed(3))
    assert torch.equal(again, trained.draw(8, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("trained", [TrainedSteps(start=6), TrainedSteps(stop=7), TrainedSteps(start=3, stop=3),
                                     TrainedSteps(start=-7)])
def test_ranges_that_do_not_fit(trained, generator):
    with pytest.raises(ValueError, match="do not fit a schedule of 6 steps"):
        trained.draw(6, generator)


@pytest.mark.parametrize("size", [0, 4])
def test_windows_that_do_not_fit(size, generator):
    with pytest.raises(ValueError, match=f"a window of {size} steps does not fit the trained range of 3"):
        TrainedSteps(start=3, size=size).draw(6, generator)


def test_a_sliding_window_moves_by_its_stride_and_rolls_back():
    """Range 1..6, window 2, stride 2, a move after every 3 updates: places 1 and 3, then 1 again (5 does not fit)."""
    trained = TrainedSteps(start=1, stop=6, size=2, move_every=3, stride=2, ode_elsewhere=True)
    for update, first in ((0, 1), (2, 1), (3, 3), (5, 3), (6, 1), (9, 3)):
        then = trained.at(update, 8)
        assert then.ode_elsewhere
        assert then.draw(8, torch.Generator()).nonzero().flatten().tolist() == [first, first + 1]
    assert torch.equal(trained.draw(8, torch.Generator()), trained.at(0, 8).draw(8, torch.Generator()))
    last = [TrainedSteps(size=4, move_every=25).at(25 * k, 25).start for k in (21, 22)]
    assert last == [21, 0]  # MixGRPO: 22 places for a window of 4 in 25 steps


def test_windows_that_do_not_slide_stay_what_they_are():
    for trained in (TrainedSteps(), TrainedSteps(size=2), TrainedSteps(start=-3)):
        assert trained.at(7, 8) is trained


@pytest.mark.parametrize("options", [{"move_every": 0, "size": 2}, {"move_every": 3}, {"stride": 0}])
def test_sliding_refusals(options):
    with pytest.raises(ValueError, match=r"move_every must be at least 1 or null and moves a window|stride must be at"):
        TrainedSteps(**options)
    with pytest.raises(ValueError, match="a window of 7 steps does not fit the trained range of 6"):
        TrainedSteps(size=7, move_every=1).at(0, 6)


def test_concatenate_keeps_rows_in_order_and_refuses_mixed_windows(generator):
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=4)
    parts = [policy.act({"obs": torch.full((n, 1), float(n))}, generator=generator).trajectory for n in (2, 3)]
    joined = concatenate(parts)
    for name in ("x", "log_prob", "mean", "std"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(p, name) for p in parts]))
    assert joined.cond["obs"].flatten().tolist() == [2, 2, 3, 3, 3]
    assert torch.equal(joined.sample, joined.x[:, 4])
    other = replace(parts[1], trained=torch.tensor([True, False, False, False]))
    with pytest.raises(ValueError, match="must share their time grid and trained steps"):
        concatenate([parts[0], other])
    with pytest.raises(ValueError, match="must share their time grid"):
        concatenate([parts[0], replace(parts[1], times=parts[1].times * 0.9)])


def test_a_grid_rounds_towards_noise_as_the_lcm_scheduler():
    """K = 4 of 50: 0, 12, 25, 37 of them are skipped; diffusers' timesteps 999, 759, 499, 259."""
    assert Schedule(steps=4, grid=50).times().tolist() == pytest.approx([1.0, 0.76, 0.5, 0.26, 0.0])
    for steps in (1, 2, 3, 5, 7, 8, 50):
        scheduler = LCMScheduler(original_inference_steps=50)
        scheduler.set_timesteps(steps)
        ours = (Schedule(steps=steps, grid=50).times()[:-1] * 1000).round() - 1
        assert ours.tolist() == scheduler.timesteps.tolist()


def test_a_terminal_stretches_as_diffusers_does():
    """K = 4, terminal 0.1: 1 - t = 0, 0.25, 0.5, 0.75 is multiplied by 0.9 / 0.75 = 1.2."""
    assert Schedule(steps=4, terminal=0.1).times().tolist() == pytest.approx([1.0, 0.7, 0.4, 0.1, 0.0])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    torch.testing.assert_close(Schedule(steps=6, shift=3.0, terminal=0.02).times(), scheduler.sigmas)


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 8, "grid": 7}, "grid must be at least the 8 steps, got 7"),
    ({"steps": 4, "terminal": 0.0}, "terminal must lie between 0 and 1"),
    ({"steps": 4, "terminal": 1.0}, "terminal must lie between 0 and 1"),
    ({"steps": 1, "terminal": 0.1}, "needs 2 steps or more")])
def test_grid_and_terminal_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)
