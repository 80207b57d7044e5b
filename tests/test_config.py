"""Configs: what loads, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import yaml
from pydantic import Field, TypeAdapter, ValidationError

from diffalign import choices
from diffalign.algorithms import Algorithm, OffPolicyAlgorithm, PreferenceAlgorithm
from diffalign.config import ConfigError, build, dump, load, members, read
from diffalign.diffusion import CPS, Schedule, TrainedSteps
from diffalign.rl.surrogates import PPOClip
from diffalign.spec import spec
from diffalign.train.supervised import Pretraining

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name != "accelerate")
ALGORITHMS = members(Algorithm) | members(OffPolicyAlgorithm) | members(PreferenceAlgorithm)
ROOTS = [*ALGORITHMS.values(), Schedule, TrainedSteps, Pretraining,
         *(option for union in choices.UNIONS.values() for option in members(union).values())]


def reachable(kind, found):
    """Every spec class in a type's fields."""
    if dataclasses.is_dataclass(kind):
        if kind not in found:
            found.append(kind)
            for hint in get_type_hints(kind, include_extras=True).values():
                reachable(hint, found)
    elif get_origin(kind) is not None:
        for argument in get_args(kind):
            reachable(argument, found)
    return found


SPECS = [kind for root in ROOTS for kind in reachable(root, [])]
SPECS = list(dict.fromkeys(SPECS))


def required(kind):
    return {"steps": 3} if kind in (Schedule, Pretraining) else {}


@pytest.mark.parametrize("kind", SPECS, ids=lambda kind: kind.__name__)
def test_every_spec_is_frozen_and_refuses_unknown_keys(kind):
    value = kind(**required(kind))
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.anything = 1
    with pytest.raises(TypeError, match="positional"):
        kind(1)
    with pytest.raises(ConfigError, match="surely_not: unknown setting"):
        build(kind, {**required(kind), "surely_not": 1}, "test")


def test_the_specs_are_all_there():
    assert list(ALGORITHMS) == ["ddpo", "dpok", "flow_grpo", "grpo_guard", "dppo", "awm", "nft", "orw", "noise_ppo",
                                "reinflow", "fpo", "fpo_plus", "dsrl", "residual", "expo", "rerank", "seppo", "dpo"]
    assert {name: list(members(union)) for name, union in choices.UNIONS.items()} == {
        "paths": ["flow", "vp"], "kernels": ["ddpm", "ddim", "ode", "flow_sde", "dance_sde", "cps", "noisy_ode"],
        "advantages": ["gae", "group", "best_of_group", "leave_one_out", "prompt_running"],
        "surrogates": ["ppo_clip", "simple_po", "asymmetric_po", "clamped", "divergence_gate", "guard_clip",
                       "contrastive_matching", "weighted"],
        "likelihoods": ["transition", "matching", "pooled_matching", "start"]}
    assert len(SPECS) >= 24


@pytest.mark.parametrize("kind", SPECS, ids=lambda kind: kind.__name__)
def test_dump_and_load_give_the_spec_back(kind, tmp_path):
    value = kind(**required(kind))
    file = tmp_path / "spec.yaml"
    file.write_text(dump(value))
    assert load(kind, file) == value
    assert set(yaml.safe_load(dump(value)) or {}) == {field.name for field in dataclasses.fields(kind)}


def written(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_a_changed_algorithm_comes_back_through_the_union(tmp_path):
    file = written(tmp_path, "type: dppo\nadvantage: {type: group, scale: none}\nsurrogate: {type: simple_po}\n"
                             "optimization: {learning_rate: 3e-5, epochs: 2}\n")
    algorithm = load(Algorithm, file)
    assert type(algorithm) is ALGORITHMS["dppo"]
    assert (algorithm.advantage.type, algorithm.advantage.scale, algorithm.surrogate.type) == (
        "group", "none", "simple_po")
    assert algorithm.optimization.learning_rate == 3e-5
    assert load(Algorithm, written(tmp_path, dump(algorithm))) == algorithm


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.e-4", "0.0001", "1.0e-4", "10e-5"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text):
    """YAML 1.1 reads 1e-4 as a string."""
    tree = read(written(tmp_path, f"value: {text}\nlist: [{text}, 3]\n"))
    assert tree == {"value": pytest.approx(1e-4), "list": [pytest.approx(1e-4), 3]}
    assert isinstance(tree["value"], float)


def test_other_scalars_stay_what_they_were(tmp_path):
    tree = read(written(tmp_path, "a: e4\nb: '1e-4'\nc: 12\nd: 1e\ne: null\nf: true\n"))
    assert tree == {"a": "e4", "b": "1e-4", "c": 12, "d": "1e", "e": None, "f": True}


BAD = """
type: dppo
advantage: {type: gae, gama: 0.9}
surrogate: {type: ppo_clip, low: hello}
denoising_discount: true
optimization:
  learning_rte: 1e-4
  epochs: 2.5
"""


def test_every_problem_is_listed_at_its_path_with_the_closest_key(tmp_path):
    file = written(tmp_path, BAD)
    with pytest.raises(ConfigError) as caught:
        load(Algorithm, file)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{file}: ")
    text = {line.split(":")[0].strip(): line for line in lines}
    assert "unknown setting; did you mean gamma? (known here: gamma, lam, type, whiten)" in text["advantage.gama"]
    assert "got 'hello'" in text["surrogate.low"]
    assert "did you mean learning_rate?" in text["optimization.learning_rte"]
    assert "got 2.5" in text["optimization.epochs"]
    assert len(lines) == int(head.split()[-2]) >= 4


def test_a_setting_of_another_level_is_found(tmp_path):
    with pytest.raises(ConfigError, match=r"learning_rte: unknown setting; did you mean optimization.learning_rate\?"):
        load(Algorithm, written(tmp_path, "type: ddpo\n"), ["learning_rte=1"])


@pytest.mark.parametrize(("text", "message"), [
    ("type: ddpo\nreference_kl: true\n", "reference_kl: expected a number, got a truth value"),
    ("type: ddpo\noptimization: {epochs: true}\n", "optimization.epochs: expected a number, got a truth value"),
    ("type: ddpo\noptimization: {ema_decay: false}\n", "optimization.ema_decay: expected a number"),
    ("type: ddpo\nadvantage: {type: prompt_running, buffer: 4, min_count: 9}\n",
     "advantage: need 2 <= min_count <= buffer, got 9 and 4"),
    ("type: ddpo\nsurrogate: {type: ppo_clip, low: -1}\n", r"surrogate: low must be positive, got -1\.0"),
    ("type: ddpo\nsurrogate: {low: 1}\n", "surrogate: .*discriminator"),
    ("type: ddp\n", "ddp.*does not match any of the expected tags.*'ddpo', 'dpok', 'flow_grpo'"),
    ("type: dppo\nadvantage: {type: group, scale: grup}\n", "advantage.scale: .*'batch' or 'none'.*got 'grup'")])
def test_refusals_name_the_path(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(Algorithm, written(tmp_path, text))


def test_truth_values_stay_where_they_belong(tmp_path):
    algorithm = load(Algorithm, written(tmp_path, "type: dppo\nadvantage: {type: gae, whiten: false}\n"))
    assert algorithm.advantage.whiten is False


def test_missing_settings_are_named():
    with pytest.raises(ConfigError, match="steps: required but not given"):
        build(Schedule, {"shift": 2.0}, "here")


@pytest.mark.parametrize(("text", "message"), [
    ("a: 1\nb: 2\na: 3\n", "config.yaml: line 1: a is given twice"), ("o: {x: 1, y: 2, x: 3}\n", "x is given twice"),
    ("a: [1,\n", "is not valid YAML"), ("- 1\n- 2\n", "must hold a mapping of settings, got list"),
    ("", "must hold a mapping of settings, got NoneType")])
def test_bad_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(written(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml does not exist; give the path of a YAML file"):
        read(tmp_path / "absent.yaml")


def test_overrides(tmp_path):
    file = written(tmp_path, "a: 1\nb: {c: 2, d: [5, {e: 6}]}\n")
    overrides = ["a=x", "b.c=1e-3", "b.d.0=[1, 2]", "b.d.1.e=null", "new.deep.key=true", "text=a=b"]
    assert read(file, overrides) == {"a": "x", "b": {"c": 1e-3, "d": [[1, 2], {"e": None}]},
                                     "new": {"deep": {"key": True}}, "text": "a=b"}
    assert read(file, ["a=1", "a=2"])["a"] == 2


@pytest.mark.parametrize(("override", "message"), [
    ("a", "override 'a' is not KEY=VALUE, e.g."), ("=3", "override '=3' is not KEY=VALUE"),
    ("a.b=1", "override 'a.b=1': 'b' does not name a setting"), ("a.b.c=1", "'b' is not inside a mapping or list"),
    ("l.5=1", "override 'l.5=1': '5' does not name a setting"), ("l.x.y=1", "'x' is not inside a mapping or list"),
    ("a=[1", r"override 'a=\[1': the value is not valid YAML"), ("a={b: 1, b: 2}", "b is given twice")])
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        read(written(tmp_path, "a: 1\nl: [1, 2]\n"), [override])


@spec
class Inner:
    type: str = "inner"
    widths: tuple[int, ...] = (8, 8)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@spec
class Outer:
    inner: Inner = Inner()
    kernels: tuple[choices.Kernel, ...] = (CPS(),)
    clip: Annotated[float, Field(gt=0)] = 0.5


def test_nested_lists_and_maps(tmp_path):
    value = Outer(inner=Inner(widths=(4,), weights={"jpeg": 0.5}), kernels=(CPS(noise_level=0.3), CPS()))
    file = written(tmp_path, dump(value))
    assert load(Outer, file) == value
    assert load(Outer, file, ["kernels.1={type: ddim, eta: 0.5}"]).kernels[1].eta == 0.5
    with pytest.raises(ConfigError, match=r"kernels.0.noise_levl: unknown setting; did you mean noise_level\?"):
        load(Outer, file, ["kernels.0.noise_levl=1"])
    with pytest.raises(ConfigError, match=r"inner.widths.1: .*\(got 'x'\)"):
        load(Outer, file, ["inner.widths=[1, x]"])
    with pytest.raises(ConfigError, match=r"inner.weights.jpeg: expected a number, got a truth value"):
        load(Outer, file, ["inner.weights.jpeg=true"])


def test_a_spec_is_built_in_python_without_pydantic_but_means_the_same():
    assert build(PPOClip, {"low": 0.5}, "x") == PPOClip(low=0.5)
    with pytest.raises(ValidationError):
        TypeAdapter(PPOClip).validate_python({"lo": 0.5})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_config_of_the_project_loads(file, tmp_path):
    """Through the adapter that its type names; the resolved config loads to the same job."""
    job_type = read(file)["type"]
    jobs = importlib.import_module(f"diffalign_{job_type.partition('_')[0]}.jobs").JOBS
    kind = next(kind for kind in jobs if kind.type == job_type)
    job = load(kind, file)
    assert load(kind, written(tmp_path, dump(job))) == job
    with pytest.raises(ConfigError, match="surely_not: unknown setting"):
        load(kind, file, ["surely_not=1"])


def test_there_are_configs():
    assert CONFIGS
