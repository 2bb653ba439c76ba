"""Which modules an adapter config targets: PEFT's rules, but patterns are matched in linear time.

PEFT matches names of modules with Python's ``re``, in which a pattern such as ``(a+)+$`` takes exponential time. Here
RE2 matches them, and PEFT gets plain names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from math import isfinite
from typing import Any

import re2  # type: ignore[import-untyped]
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slr_core.errors import ConfigError

MAX_PATTERN = 4096
"""Characters of a pattern."""
MAX_PATTERNS = 256
"""Patterns of a config that are no plain names."""

_PLAIN = re.compile(r"\^?[\w.-]+")
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False


def resolve_targets(base: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """The config with plain names of modules in place of patterns; the same object where it has no patterns.

    Raises:
        ConfigError: a name or pattern matches no module, is not a regular expression that RE2 knows, or a rank or
            alpha is not a number.
    """
    names = _module_names(base)
    _check_size(config)
    targets = _targets(base, config, names)
    ranks = _values(config.rank_pattern or {}, "rank_pattern", targets)
    alphas = _values(config.alpha_pattern or {}, "alpha_pattern", targets)
    named = not isinstance(config.target_modules, str) or config.target_modules == "all-linear"
    if named and not (ranks or alphas or config.exclude_modules or config.layers_to_transform is not None):
        return config
    resolved = copy.copy(config)
    resolved.target_modules = targets
    resolved.exclude_modules = resolved.layers_to_transform = resolved.layers_pattern = None
    resolved.rank_pattern, resolved.alpha_pattern = _grouped(ranks), _grouped(alphas)
    return resolved


def _module_names(base: nn.Module) -> list[str]:
    """Names of the base model's own modules, without the parts of adapters."""
    names, inside = [], "\0"
    for name, module in base.named_modules():
        if name.startswith(inside):
            continue
        names.append(name)
        if isinstance(module, LoraLayer):
            inside = f"{name}."
    return names


def _check_size(config: LoraConfig) -> None:
    fields: dict[str, Any] = {
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "layers_pattern": config.layers_pattern,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for field, value in fields.items():
        if field.endswith(("rank_pattern", "alpha_pattern")) and not isinstance(value or {}, dict):
            raise ConfigError(f"{field} must map names of modules to numbers")
        try:
            patterns = [value] if isinstance(value, str) else list(value or ())
        except TypeError:
            patterns = [value]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise ConfigError(f"{field} must hold names of modules")
        if any(len(pattern) > MAX_PATTERN for pattern in patterns):
            raise ConfigError(f"{field} has a pattern of more than {MAX_PATTERN} characters")
        if sum(not _PLAIN.fullmatch(pattern) for pattern in patterns) > MAX_PATTERNS:
            raise ConfigError(f"{field} has more than {MAX_PATTERNS} patterns")


def _targets(base: PreTrainedModel, config: LoraConfig, names: list[str]) -> list[str]:
    """Names of the modules that the adapter changes."""
    wanted = config.target_modules
    if wanted is None:
        raise ConfigError("target_modules is missing")
    if wanted == "all-linear":
        head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
        found = {name for name in names if _is_linear(module := base.get_submodule(name)) and module is not head}
    else:
        found = _matching(wanted, "target_modules", names)
        if config.layers_to_transform is not None and config.layers_to_transform != [] and not isinstance(wanted, str):
            found = {name for name in found if name in wanted} | _of_layers(config, found - {*wanted})
    if config.exclude_modules:
        found -= _matching(config.exclude_modules, "exclude_modules", names)
        if not found:
            raise ConfigError("exclude_modules leaves no module of target_modules")
    return [name for name in names if name in found]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, nn.Linear | Conv1D)


def _matching(patterns: str | Iterable[str], field: str, names: list[str]) -> set[str]:
    """Modules whose whole name a pattern matches, or, of a list, whose name ends with an element."""
    if isinstance(patterns, str):
        found = {name for name in names if _compiled(patterns, field).fullmatch(name)}
        if not found:
            raise ConfigError(f"{field} {patterns!r} matches no module of the base model")
        return found
    by_suffix = _by_suffix(names)
    for name in patterns:
        if name not in by_suffix:
            raise ConfigError(f"{field}: {name!r} matches no module of the base model")
    return {name for suffix in patterns for name in by_suffix[suffix]}


def _of_layers(config: LoraConfig, names: set[str]) -> set[str]:
    """The modules in the layers that ``layers_to_transform`` names."""
    wanted = config.layers_to_transform
    layers: list[Any] = wanted if isinstance(wanted, list) else [wanted]
    if not all(isinstance(layer, int) for layer in layers):
        raise ConfigError("layers_to_transform must be numbers of layers")
    patterns = config.layers_pattern or None
    if isinstance(patterns, str):
        patterns = [patterns]
    if patterns is None:
        searches = [_compiled(r".*?\.[^.]*\.(\d+)\.", "layers_pattern")]
    else:
        searches = [_compiled(rf"(?:^|.*?\.){pattern}\.(\d+)\.", "layers_pattern") for pattern in patterns]
    index: dict[str, int] = {}
    unused = set(range(len(searches)))
    for name in names:
        for i, search in enumerate(searches):
            if match := search.match(name):
                index[name] = int(match.groups()[-1])
                unused.discard(i)
                break
    if unused and patterns:
        raise ConfigError(f"layers_pattern {patterns[min(unused)]!r} matches no layer of the base model")
    if absent := sorted(set(layers) - set(index.values())):
        raise ConfigError(f"layers_to_transform: there is no layer {absent[0]} among the target modules")
    return {name for name, layer in index.items() if layer in set(layers)}


def _values(patterns: Mapping[str, Any], field: str, targets: list[str]) -> dict[str, Any]:
    """The value that the first matching pattern gives each module; modules without one are left out."""
    by_suffix = _by_suffix(targets)
    matches: dict[str, tuple[int, Any]] = {}
    for order, (pattern, value) in enumerate(patterns.items()):
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (isinstance(value, float) and isfinite(value))
        if not (whole if field == "rank_pattern" else number) or value <= 0:
            raise ConfigError(f"{field}: {pattern!r} must have a positive number, got {value!r}")
        if not _PLAIN.fullmatch(pattern):
            expression = _compiled(rf"(?:.*\.)?(?:{pattern})", field)
            found = [name for name in targets if expression.fullmatch(name)]
        elif pattern.startswith("^"):
            found = [name for name in by_suffix.get(pattern[1:], ()) if name == pattern[1:]]
        else:
            found = by_suffix.get(pattern, [])
        if not found:
            raise ConfigError(f"{field}: {pattern!r} matches no target module")
        for name in found:
            matches.setdefault(name, (order, value))
    return {name: value for name, (_, value) in matches.items()}


def _grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT pattern for each value, which matches the names of its modules and nothing else."""
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return {"|".join(map(re.escape, names)): value for value, names in groups.items()}


def _by_suffix(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by each of their ends that begins at a part: ``a.b.c`` by ``a.b.c``, ``b.c`` and ``c``."""
    found: dict[str, list[str]] = {}
    for name in names:
        for suffix in _suffixes(name):
            found.setdefault(suffix, []).append(name)
    return found


def _suffixes(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


@lru_cache(maxsize=MAX_PATTERNS)
def _compile(pattern: str) -> Any:
    return re2.compile(pattern, _OPTIONS)


def _compiled(pattern: str, field: str) -> Any:
    try:
        return _compile(pattern)
    except (re2.error, UnicodeEncodeError) as error:
        raise ConfigError(
            f"{field} {pattern!r} is not a regular expression without backreferences and lookaround ({error})"
        ) from error
