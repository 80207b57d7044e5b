"""The off-policy loop: act -> replay -> critic and actor updates, as a generator.

Legend: M rows of a batch, K critics, m candidates of a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffalign.diffusion.trajectories import Cond
from diffalign.policy.actors import BoundedActor
from diffalign.policy.improved import ActionCritic, ImprovedPolicy
from diffalign.policy.normalize import Normalizer
from diffalign.policy.operators import Candidates, OnNoise
from diffalign.policy.protocols import BasePolicy, Policy, repeat_rows
from diffalign.rl.ensembles import QEnsemble, expectile_loss, follow, pessimistic
from diffalign.rl.replay import Replay, Transitions, mixed, transitions
from diffalign.rl.rollouts import Rollout
from diffalign.train import distributed, update
from diffalign.train.off_policy_pieces import Learning, OffPolicy
from diffalign.train.state import Iteration, TrainState

Metrics = dict[str, float]


@runtime_checkable
class Source(Protocol):
    """A rollout source that any policy can act in."""

    def collect(self, policy: Policy, *, generator: torch.Generator) -> Rollout: ...


class Temperature(nn.Module):
    """alpha = exp(log_alpha), SAC's entropy price."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))


def build_modules(pieces: OffPolicy, base: BasePolicy, normalizer: Normalizer, *, seed: int, key: str = "obs"
                  ) -> dict[str, nn.Module]:
    """By role: critic, critic_target; actor, temperature, noise_critic, value where the pieces use them."""
    operator, plan, features = pieces.operator, pieces.learning, len(normalizer.shift)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)

        def ensemble(heads: int, event: tuple[int, ...]) -> QEnsemble:
            return QEnsemble(heads, event, features, plan.critic_hidden, key=key, normalizer=normalizer)

        modules: dict[str, nn.Module] = {"critic": ensemble(plan.heads, base.event)}
        modules["critic_target"] = copy.deepcopy(modules["critic"]).requires_grad_(False)
        if operator.needs_actor:
            modules["actor"] = BoundedActor(base.event, features, plan.actor_hidden, std=plan.actor_std, key=key,
                                            takes_action=operator.takes_action, normalizer=normalizer)
            if plan.actor_std is None:
                modules["temperature"] = Temperature(plan.temperature)
        if operator.distills:
            modules["noise_critic"] = ensemble(plan.heads, base.event)
        if plan.backup == "expectile":
            modules["value"] = ensemble(1, ())
    return modules


def build_state(pieces: OffPolicy, modules: Mapping[str, nn.Module], *, seed: int) -> TrainState:
    """A fresh train state with a learning rate for every module but the frozen base ("policy") and the target."""
    plan = pieces.learning
    rates = {name: plan.actor_learning_rate if name == "actor" else plan.critic_learning_rate
             for name in modules if name not in ("policy", "critic_target")}
    return TrainState.create(modules, rates, seed=seed)


def improved_policy(pieces: OffPolicy, base: BasePolicy, modules: Mapping[str, nn.Module]) -> ImprovedPolicy:
    """The base under the pieces' operator with these modules."""
    actor = cast(BoundedActor, modules["actor"]) if "actor" in modules else None
    return ImprovedPolicy(base, pieces.operator, actor, cast(ActionCritic, modules["critic"]))


def optimize(pieces: OffPolicy, policy: ImprovedPolicy, source: Source | None, state: TrainState, *,
             demonstrations: Replay | None = None) -> Iterator[Iteration]:
    """Improve the policy's actor and critic forever; one Iteration per rollout and the updates that follow it.

    The replay lives in state.statistics, so that a checkpoint holds it and a restored state simply goes on. Without a
    source nothing is collected: offline training on the demonstrations, `offline_updates` updates an iteration.

    Raises: ValueError if data are missing or cannot be used; NonFinite.
    """
    _require(pieces, source, demonstrations)
    learner, plan = _Learner(pieces.learning, policy, state), pieces.learning
    while True:
        metrics: Metrics = {}
        replay = Replay(state.statistics, "replay", plan.capacity)
        updates = plan.offline_updates
        if source is not None:
            seed = int(torch.randint(2**62, (1,), generator=state.generator).item())
            warming = state.counters.get("decisions", 0.0) < plan.warmup_decisions
            rollout = source.collect(policy.with_mode("base" if warming else "explore"),
                                     generator=torch.Generator().manual_seed(seed))
            rows = transitions(rollout, learner.ask, gamma=plan.discount, steps=plan.n_step)
            replay.add(rows if pieces.uses_signals else rows.without_signals())
            decisions = state.count("decisions", float(len(rows.reward)))
            metrics |= {**rollout.stats, "reward/mean": float((rollout.reward * rollout.valid).sum(0).mean()),
                        "replay/size": float(len(replay)), "decisions": decisions}
            updates = round(plan.updates_per_decision * len(rows.reward))
        collected = [learner.update(mixed(replay, demonstrations, plan.batch_size, plan.demonstration_fraction,
                                          state.generator)) for _ in range(updates)]
        for name in {name: None for metrics_of_one in collected for name in metrics_of_one}:
            values = [m[name] for m in collected if name in m]
            metrics[name] = sum(values) / len(values)
        state.step += 1
        yield Iteration(state.step, metrics)


def _require(pieces: OffPolicy, source: Source | None, demonstrations: Replay | None) -> None:
    if distributed.world_size() > 1:
        raise ValueError(f"off-policy training runs in one process, got {distributed.world_size()}; start it without "
                         "a distributed launcher")
    if source is None and (demonstrations is None or not len(demonstrations)):
        raise ValueError("offline training needs demonstrations, got none; give data or a source")
    if demonstrations is not None and len(demonstrations) and not pieces.operator.scores_actions:
        raise ValueError("this critic scores initial noise, which demonstrations do not have; set the operator's "
                         "scores to actions (DSRL-NA) or leave the demonstrations out")


class _Learner:
    """One critic update, and mostly one actor update, per batch."""

    def __init__(self, plan: Learning, policy: ImprovedPolicy, state: TrainState) -> None:
        self.plan, self.policy, self.state = plan, policy, state
        modules = state.modules
        self.critic = cast(QEnsemble, modules["critic"])
        self.target = cast(QEnsemble, modules["critic_target"])

    def ask(self, cond: Cond) -> Cond:
        """The base's signals where an episode was cut."""
        return self.policy.operator.ask(self.policy.base, cond, generator=self.state.generator)

    def update(self, batch: Transitions) -> Metrics:
        """One optimizer step on all losses that are due."""
        metrics: Metrics = {}
        done = int(self.state.count("updates", 1.0))
        losses = [self._critic_loss(batch, metrics)]
        modules = self.state.modules
        if "value" in modules:
            losses.append(self._value_loss(batch, metrics))
        if "noise_critic" in modules:
            losses.append(self._distillation_loss(batch, metrics))
        if "actor" in modules and done > self.plan.critic_only_updates and done % self.plan.actor_every == 0:
            losses.append(self._actor_loss(batch, metrics))
        total = torch.stack(losses).sum()
        metrics |= update.step(self.state, [(1.0, lambda: (total, {}))], max_grad_norm=self.plan.max_grad_norm)
        follow(self.target, self.critic, self.plan.target_rate)
        return metrics

    def _critic_loss(self, batch: Transitions, metrics: Metrics) -> Tensor:
        with torch.no_grad():
            target = batch.reward + batch.discount * self._next_value(batch)
            if self.plan.value_range is not None:
                target = target.clamp(*self.plan.value_range)
        value = self.critic(batch.cond, batch.chosen)
        metrics |= {"q/mean": float(value.detach().mean()), "q/target": float(target.mean())}
        loss: Tensor = ((value - target) ** 2).mean(1).sum()  # per head: the heads must stay different
        metrics["loss/critic"] = float(loss.detach()) / self.plan.heads
        return loss

    def _next_value(self, batch: Transitions) -> Tensor:
        """Value of the next state under the policy that will act there."""
        plan, state, policy = self.plan, self.state, self.policy
        value: Tensor
        if plan.backup == "expectile":
            value = state.modules["value"](batch.next_cond)[0]
            return value
        found: Candidates = policy.operator.candidates(policy.base, policy.actor, batch.next_cond, batch.next_signals,
                                                       generator=state.generator)
        values = pessimistic(self.target.score(batch.next_cond, found.value), plan.pair, state.generator)
        best = values.argmax(1, keepdim=True)
        value = values.gather(1, best)[:, 0]
        if plan.entropy_backup and "temperature" in state.modules:
            value = value - self._alpha() * found.log_prob.gather(1, best)[:, 0]
        return value

    def _value_loss(self, batch: Transitions, metrics: Metrics) -> Tensor:
        with torch.no_grad():
            target = pessimistic(self.target(batch.cond, batch.chosen), self.plan.pair, self.state.generator)
        loss = expectile_loss(target - self.state.modules["value"](batch.cond)[0], self.plan.expectile).mean()
        metrics["loss/value"] = float(loss.detach())
        return loss

    def _distillation_loss(self, batch: Transitions, metrics: Metrics) -> Tensor:
        """Q_noise(s, w) regressed on Q(s, base(s, w)), w from the prior (DSRL-NA, eq. 4)."""
        operator, base = self.policy.operator, self.policy.base
        assert isinstance(operator, OnNoise)
        w = operator.prior(base, batch.cond, self.state.generator)
        with torch.no_grad():
            target = self.critic(batch.cond, operator.denoise(base, batch.cond, w)).mean(0)
        loss: Tensor = ((self.state.modules["noise_critic"](batch.cond, w) - target) ** 2).mean(1).sum()
        metrics["loss/noise_critic"] = float(loss.detach()) / self.plan.heads
        return loss

    def _actor_loss(self, batch: Transitions, metrics: Metrics) -> Tensor:
        """alpha log pi - mean of the heads' Q over the actor's moves; gradients reach the actor only."""
        modules, operator = self.state.modules, self.policy.operator
        judge = cast(QEnsemble, modules["noise_critic"] if operator.distills else self.critic)
        moves = operator.moves(cast(BoundedActor, modules["actor"]), batch.cond, batch.signals,
                               generator=self.state.generator)
        frozen = {name: p.detach() for name, p in judge.named_parameters()}
        cond = repeat_rows(batch.cond, moves.value.shape[1])
        value = functional_call(judge, frozen, (cond, moves.value.flatten(0, 1))).mean(0)
        loss: Tensor = -value.mean()
        metrics |= {"actor/q": float(value.detach().mean()), "actor/log_prob": float(moves.log_prob.detach().mean())}
        if "temperature" in modules:
            loss = loss + self._alpha() * moves.log_prob.mean()
            size = moves.value[0, 0].numel()
            surplus = (moves.log_prob.detach().mean() + self.plan.target_entropy * size)
            loss = loss - cast(Temperature, modules["temperature"]).log_alpha * surplus
            metrics["temperature"] = float(self._alpha())
        return loss

    def _alpha(self) -> Tensor:
        alpha: Tensor = cast(Temperature, self.state.modules["temperature"]).log_alpha.detach().exp()
        return alpha

