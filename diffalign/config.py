"""YAML and dotted overrides to specs, with every problem listed at its path."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError


class ConfigError(ValueError):
    """A config that cannot be used; the message lists every problem."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants a dot) and refuses duplicate keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
    if repeated:
        raise ConfigError(f"line {node.start_mark.line + 1}: {', '.join(repeated)} is given twice")
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with `a.b=value` overrides applied (values are YAML; a.0.b indexes a list).

    Raises: ConfigError for a missing file, bad YAML, or an override that is not KEY=VALUE or whose path is no mapping.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the path of a YAML file, e.g. configs/robot/push_bc.yaml")
    try:
        tree = yaml.load(file.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping of settings, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not KEY=VALUE, e.g. algorithm.optimization.learning_rate=1e-4")
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise ConfigError(f"override {override!r}: {part!r} is not inside a mapping or list")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {override!r}: {last!r} does not name a setting")


def build(kind: Any, tree: dict[str, Any], origin: str) -> Any:
    """An instance of the spec (or union of specs) `kind`.

    Raises: ConfigError listing every problem as `path: message`, with the closest right key for an unknown one.
    """
    try:
        spec = TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        problems = [_problem(kind, tree, problem) for problem in error.errors()]
    else:
        problems = [f"{path}: expected a number, got a truth value" for path in _truths_as_numbers(tree, spec)]
        if not problems:
            return spec
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise ConfigError(f"{origin}: {count}\n" + "\n".join(f"  {line}" for line in problems))


def load(kind: Any, file: Path, overrides: Sequence[str] = ()) -> Any:
    """`build` of `read`."""
    return build(kind, read(file, overrides), str(file))


def dump(spec: Any) -> str:
    """The spec as YAML with every default written out; `load` gives the same spec back."""
    return yaml.safe_dump(dataclasses.asdict(spec), sort_keys=False, allow_unicode=True)


def _problem(kind: Any, tree: Any, problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    shown = ".".join(_visible(location, tree)) or "(top level)"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        here = _spec_at(kind, location[:-1])
        known = sorted(field.name for field in dataclasses.fields(here))
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6) or _anywhere(kind, tree, location[-1])
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{shown}: unknown setting{hint} (known here: {', '.join(known)})"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing" or "missing" in problem["type"]:
        return f"{shown}: required but not given"
    if problem["type"] == "value_error":
        return f"{shown}: {message}"
    return f"{shown}: {message} (got {problem['input']!r})"


def _visible(location: Sequence[str], tree: Any) -> list[str]:
    """The location without the union tags that pydantic inserts."""
    path, node = [], tree
    for part in location:
        if isinstance(node, dict) and part not in node and node.get("type") == part:
            continue
        path.append(part)
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
    return path


def _spec_at(kind: Any, location: Sequence[str]) -> Any:
    """The spec found at a location that pydantic reports (with union tags in it)."""
    for part in location:
        options = _specs(kind)
        tagged = [option for option in options if _tag(option) == part]
        if tagged:
            kind = tagged[0]
        elif not part.isdigit():
            kind = get_type_hints(options[0], include_extras=True)[part]
    return _specs(kind)[0]


def _anywhere(kind: Any, tree: Any, name: str) -> list[str]:
    """The dotted path of the closest setting anywhere in the config, as a list of at most one."""
    paths = list(_paths(kind, tree))
    close = difflib.get_close_matches(name, [path.rpartition(".")[2] for path in paths], n=1, cutoff=0.6)
    return [path for path in paths if path.rpartition(".")[2] == close[0]][:1] if close else []


def _paths(kind: Any, tree: Any) -> Iterator[str]:
    """Dotted paths of all settings of the specs that a tree chooses."""
    options = _specs(kind)
    tagged = [option for option in options if isinstance(tree, dict) and _tag(option) == tree.get("type")]
    chosen = (tagged or options)[:1]
    for option in chosen:
        for name, hint in get_type_hints(option, include_extras=True).items():
            yield name
            below = tree.get(name) if isinstance(tree, dict) else None
            yield from (f"{name}.{path}" for path in _paths(hint, below))


def _truths_as_numbers(tree: Any, spec: Any) -> list[str]:
    """Paths where the config says true or false and the spec read a number."""
    if isinstance(tree, bool):
        return [] if isinstance(spec, bool) else [""]
    if isinstance(tree, dict):
        pairs = [(key, value, spec[key] if isinstance(spec, dict) else getattr(spec, key))
                 for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)):
        pairs = [(str(i), value, below) for i, (value, below) in enumerate(zip(tree, spec, strict=True))]
    else:
        return []
    return [f"{key}.{path}".rstrip(".") for key, value, below in pairs for path in _truths_as_numbers(value, below)]


def _specs(kind: Any) -> list[Any]:
    if dataclasses.is_dataclass(kind):
        return [kind]
    if get_origin(kind) is None:
        return []
    return [option for argument in get_args(kind) for option in _specs(argument)]


def _tag(option: Any) -> str | None:
    values = get_args(get_type_hints(option).get("type"))
    return str(values[0]) if values else None


def members(union: Any) -> dict[str, Any]:
    """The specs of a closed union by their `type`."""
    return {str(_tag(option)): option for option in _specs(union)}
