"""The denoising chain as a policy: what it stores is what it would be scored at."""

from __future__ import annotations

import pytest
import torch
from toys import GaussianDenoiser, MLPDenoiser, toy_policy

from diffalign.diffusion import CPS, DDIM, DDPM, ODE, DanceSDE, FlowPath, FlowSDE, Schedule, TrainedSteps, VPPath
from diffalign.policy.normalize import Normalizer
from diffalign.policy.protocols import num_rows, select_rows
from diffalign.rl.likelihoods import Transition

COND = {"obs": torch.linspace(-1, 1, 6)[:, None]}
VP = VPPath(betas="linear", train_steps=100)  # alpha stays above 0.6: no rounding in x0
CASES = [(DDPM(), "eps", VP), (DDPM(min_std=0.1), "x0", VP),
         (DDIM(eta=0.7), "v", VP), (DDIM(eta=1.0, min_std=0.2), "eps", VP),
         (CPS(), "v", VP), (FlowSDE(), "flow", FlowPath()), (DanceSDE(), "flow", FlowPath()),
         (CPS(), "flow", FlowPath()), (DDPM(), "flow", FlowPath()), (DDIM(eta=0.5), "v", FlowPath())]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
@pytest.mark.parametrize(("kernel", "prediction", "path"), CASES, ids=repr)
def test_stored_log_prob_is_the_score_of_the_stored_step(kernel, prediction, path, steps, shift, generator):
    """ReinFlow scores on another grid than it samples on: first ratio 0.37 at K = 2 (robot_peers D6). Here it is 1."""
    policy = toy_policy(MLPDenoiser(prediction=prediction, event=3), kernel, path=path, event=(3,))
    policy = policy.with_sampler(kernel, Schedule(steps=steps, shift=shift))
    trajectory = policy.act(COND, generator=generator).trajectory
    floored = getattr(kernel, "min_std", 0) > 0
    assert trajectory.trained.tolist() == [True] * (steps - 1) + [floored]
    advantage, every = torch.zeros(6), torch.arange(6)
    if not trajectory.trained.any():
        with pytest.raises(ValueError, match="has no stochastic trained step"):
            Transition().examples(policy, trajectory, advantage, decisions=every, generator=generator)
        return
    examples = Transition().examples(policy, trajectory, advantage, decisions=every, generator=generator)
    rows = examples.rows(torch.arange(len(examples)))
    new = Transition().score(policy, rows)
    assert new.dims == 3
    torch.testing.assert_close(new.log_prob, rows.old_log_prob, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows.old.kl(new.gaussian), torch.zeros(len(examples)), rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.old.log_prob(rows.data["x_next"]), rows.old_log_prob, rtol=1e-4, atol=1e-4)


def test_trajectory_contents(generator):
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=4)
    decision = policy.act(COND, generator=generator)
    trajectory = decision.trajectory
    assert trajectory.x.shape == (6, 5, 2)
    assert torch.equal(trajectory.times, Schedule(steps=4).times())
    assert torch.equal(decision.action, trajectory.x[:, -1])
    assert trajectory.trained.tolist() == [True, True, True, False]
    assert (trajectory.std[:, :3] > 0).all()
    for leaf in (trajectory.log_prob, trajectory.std, trajectory.mean):
        assert (leaf[:, 3] == 0).all()
    x = trajectory.x
    assert not torch.equal(x[0, 0], x[1, 0])  # rows start from their own noise
    residual = (x[:, 1:4] - trajectory.mean[:, :3]) / trajectory.std[:, :3]
    assert 0.6 < residual.std() < 1.4  # 36 draws of N(0, 1): 3.4 standard errors


def test_the_generator_decides_everything():
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=3)
    one, same, other = (policy.act(COND, generator=torch.Generator().manual_seed(s)).action for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_untrained_steps(elsewhere, generator):
    """With ode_elsewhere they are x0 and eps put together again; without, they are as noisy but not scored."""
    trained = TrainedSteps(start=1, stop=3, ode_elsewhere=elsewhere)
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=5, trained=trained)
    trajectory = policy.act(COND, generator=generator).trajectory
    assert trajectory.trained.tolist() == [False, True, True, False, False]
    assert (trajectory.log_prob[:, [0, 3, 4]] == 0).all()
    assert (trajectory.log_prob[:, 1:3] != 0).all()
    for k in (0, 3):
        t = trajectory.times[k].expand(6)
        x0, eps = policy.predict(trajectory.x[:, k], t, COND)
        still = policy.with_sampler(ODE()).step(trajectory.x[:, k], t, trajectory.times[k + 1].expand(6), x0, eps, COND)
        gap = (trajectory.x[:, k + 1] - still.mean).abs().max().item()
        assert (gap < 1e-6) == elsewhere


def test_a_given_window_overrides_the_draw(generator):
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=5, trained=TrainedSteps(size=2))
    window = torch.tensor([False, False, True, True, True])
    trajectory = policy.act(COND, generator=generator, trained=window).trajectory
    assert trajectory.trained.tolist() == [False, False, True, True, False]  # the last step is noiseless
    assert window.tolist() == [False, False, True, True, True]


def test_given_noise_starts_the_chain_and_must_fit(generator):
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=4)
    noise = torch.tensor([[0.3, -1.0], [2.0, 0.0]])
    trajectory = policy.act({"obs": torch.zeros(2, 1)}, generator=generator, noise=noise).trajectory
    assert torch.equal(trajectory.x[:, 0], noise)
    with pytest.raises(ValueError, match=r"noise must be \(3, 2\) .* got \(2, 2\)"):
        policy.act({"obs": torch.zeros(3, 1)}, generator=generator, noise=noise)


def test_zero_noise_and_ode_make_a_function(generator):
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=4).with_sampler(ODE(), Schedule(steps=8), zero_noise=True)
    one, two = (policy.act(COND, generator=torch.Generator().manual_seed(s)).trajectory for s in (1, 2))
    assert torch.equal(one.x, two.x)
    assert (one.x[:, 0] == 0).all()
    assert one.x.shape[1] == 9
    assert not one.trained.any()
    noisy = policy.with_sampler(ODE()).act(COND, generator=generator).trajectory
    assert noisy.x[:, 0].std() > 0.5  # with_sampler does not carry zero_noise on
    assert noisy.x.shape[1] == 9


def test_with_sampler_trains_every_step_again(generator):
    policy = toy_policy(MLPDenoiser(), FlowSDE(), steps=4, trained=TrainedSteps(start=2, ode_elsewhere=True))
    assert policy.with_sampler(DanceSDE()).act(COND, generator=generator).trajectory.trained.tolist() == [
        True, True, True, False]


def test_clip_x0_bounds_the_sample_and_keeps_x_explained(generator):
    """x0 is clamped and eps follows from x = alpha x0 + sigma eps (the exact denoiser of N(3, 0.5^2), clip 1)."""
    path = VPPath(train_steps=100)
    policy = toy_policy(GaussianDenoiser(path, "eps", mean=3.0), DDPM(), steps=10, path=path, clip_x0=1.0)
    x, t = torch.randn(6, 2), torch.full((6,), 0.5)
    x0, eps = policy.predict(x, t, COND)
    assert (x0 == 1).all()
    level = path.level(t, 1)
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x)
    assert (policy.act(COND, generator=generator).action.abs() <= 1).all()
    free = toy_policy(GaussianDenoiser(path, "eps", mean=3.0), DDPM(), steps=10, path=path)
    assert (free.act(COND, generator=generator).action > 1).all()


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE()], ids=repr)
def test_flow_kernels_refuse_other_paths(kernel):
    with pytest.raises(ValueError, match=r"(FlowSDE|DanceSDE) is derived for the flow path, got VPPath"):
        toy_policy(MLPDenoiser(prediction="v"), kernel, path=VPPath())


def test_conditioning_rows():
    cond = {"a": torch.arange(4.0), "b": torch.arange(8.0).reshape(4, 2)}
    assert num_rows(cond) == 4
    picked = select_rows(cond, torch.tensor([3, 0]))
    assert picked["a"].tolist() == [3, 0]
    assert picked["b"].tolist() == [[6, 7], [0, 1]]
    with pytest.raises(ValueError, match="must share their first axis"):
        num_rows({"a": torch.zeros(4), "b": torch.zeros(3)})


def test_normalizer():
    """gaussian: mean 0, population std 1; limits: [-1, 1]; a constant feature maps to 0 and back."""
    data = torch.tensor([[0.0, 5.0, -2.0], [2.0, 5.0, 0.0], [4.0, 5.0, 10.0]])
    gaussian = Normalizer.fit(data)
    normal = gaussian.normalize(data)
    torch.testing.assert_close(normal.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(normal.std(0, correction=0), torch.tensor([1.0, 0.0, 1.0]))
    limits = Normalizer.fit(data, "limits")
    torch.testing.assert_close(limits.normalize(data)[:, [0, 2]],
                               torch.tensor([[-1.0, -1.0], [0.0, -2 / 3], [1.0, 1.0]]))
    assert (limits.normalize(data)[:, 1] == 0).all()
    for normalizer in (gaussian, limits):
        torch.testing.assert_close(normalizer.unnormalize(normalizer.normalize(data)), data)
    empty = Normalizer(3)
    assert torch.equal(empty.normalize(data), data)
    empty.load_state_dict(limits.state_dict())
    assert torch.equal(empty.normalize(data), limits.normalize(data))


def test_a_normalizer_holds_what_lies_beyond_its_limit():
    """A feature that hardly moved is held at the limit; without one, and for appended features, it is not."""
    data = torch.tensor([[-1.0, -0.01], [1.0, 0.01]])
    held, free = Normalizer.fit(data, limit=10.0), Normalizer.fit(data)
    far = torch.tensor([[3.0, 5.0], [-3.0, -5.0]])
    torch.testing.assert_close(free.normalize(far), torch.tensor([[3.0, 500.0], [-3.0, -500.0]]))
    torch.testing.assert_close(held.normalize(far), torch.tensor([[3.0, 10.0], [-3.0, -10.0]]))
    torch.testing.assert_close(held.normalize(data), free.normalize(data))
    longer = torch.cat([far, torch.full((2, 1), 70.0)], 1)
    torch.testing.assert_close(held.extended(1).normalize(longer), torch.cat([held.normalize(far), longer[:, 2:]], 1))
    parts = torch.cat([held.normalize(far), free.normalize(far)], 1)
    torch.testing.assert_close(held.followed_by(free).normalize(far.repeat(1, 2)), parts)
    restored = Normalizer(2)
    restored.load_state_dict(held.state_dict())
    assert torch.equal(restored.normalize(far), held.normalize(far))


@pytest.mark.parametrize(("data", "mode", "message"), [
    (torch.zeros(0, 2), "gaussian", "empty data set"),
    (torch.tensor([[0.0, 1.0], [0.0, float("inf")]]), "gaussian", "feature 1 of the data set holds non-finite"),
    (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), "limits", "feature 0")])
def test_normalizer_refusals(data, mode, message):
    with pytest.raises(ValueError, match=message):
        Normalizer.fit(data, mode)
