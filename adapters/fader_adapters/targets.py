"""Which modules and parameters a PEFT config means: target_modules and its filters, and
target_parameters. Knows paths only.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from fader_adapters.pattern_nodes import Budget
from fader_adapters.patterns import Pattern

ALL_LINEAR = "all-linear"

TIED_NAMES = ("embed_tokens", "lm_head")
"""What PEFT takes for the embedding or the head of a tied base; it knows no others."""

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.", re.ASCII)
_LITERAL = re.compile(r"\^?[A-Za-z0-9_.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Targets:
    """PEFT's choice of modules. Matching may raise PatternUnsafe when `budget` ends."""

    include: frozenset[str] | Pattern | Literal["all-linear"]
    """Names a path equals or ends with after a dot, a pattern, or every linear."""
    exclude: frozenset[str] | Pattern = frozenset()
    layers: frozenset[int] | None = None
    layer_names: tuple[str, ...] = ()
    """Names of the module lists that `layers` counts in; empty: the first numbered one."""
    parameters: frozenset[str] = frozenset()
    """Names a parameter's path equals or ends with after a dot; no filter is asked of them."""
    budget: Budget = field(default_factory=Budget)

    def select(self, path: str) -> bool:
        """Whether PEFT would adapt a linear at `path` in the model the adapter was made for."""
        if self._matches(self.exclude, path):
            return False
        if isinstance(self.include, str):
            return True
        if isinstance(self.include, frozenset) and path in self.include:
            return True  # named as a whole: PEFT asks for no layer
        if not self._matches(self.include, path):
            return False
        return self.layers is None or _layer_index(path, self.layer_names) in self.layers

    def select_parameter(self, path: str) -> bool:
        """Whether PEFT would adapt the parameter at `path`, be it of a linear or not."""
        return not self.parameters.isdisjoint(_endings(path))

    def mean_tied(self) -> bool:
        """Whether PEFT finds an end of a tied base among the targets, and so adapts both ends when
        ensure_weight_tying is set. By names alone: it looks at no base."""
        if isinstance(self.include, Pattern):
            return any(self.include.fullmatch(name, self.budget) for name in TIED_NAMES)
        return any(name.rpartition(".")[2] in TIED_NAMES for name in self.include)

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """The names in `include` that no path of the base answers to, sorted."""
        return _unmatched(self.include, paths)

    def unmatched_parameters(self, paths: Iterable[str]) -> list[str]:
        """The same of `parameters`."""
        return _unmatched(self.parameters, paths)

    def _matches(self, names: frozenset[str] | Pattern, path: str) -> bool:
        if isinstance(names, Pattern):
            return names.fullmatch(path, self.budget)
        return not names.isdisjoint(_endings(path))


def _unmatched(names: frozenset[str] | Pattern | str, paths: Iterable[str]) -> list[str]:
    if not isinstance(names, frozenset):
        return []
    known = {ending for path in paths for ending in _endings(path)}
    return sorted(names - known)


def _endings(path: str) -> list[str]:
    """The path and what follows each of its dots."""
    parts = path.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def _layer_index(path: str, names: tuple[str, ...]) -> int | None:
    if not names:
        match = _LAYER_INDEX.match(path)
        return int(match[1]) if match else None
    parts = path.split(".")
    for name in names:
        for at in range(len(parts) - 2):
            if parts[at] == name and parts[at + 1].isdigit():
                return int(parts[at + 1])
    return None


class PathMap:
    """PEFT's rank_pattern or alpha_pattern: the first key that names a path's end decides."""

    def __init__(self, values: dict[str, float], budget: Budget) -> None:
        """Raises PatternUnsafe."""
        self._budget = budget
        self._rules = [(_PathKey(key, budget), value) for key, value in values.items()]

    def get(self, path: str, default: float) -> float:
        """Raises PatternUnsafe when the budget ends."""
        for key, value in self._rules:
            if key.matches(path, self._budget):
                return value
        return default


class _PathKey:
    """`(.*\\.)?key` as PEFT matches it; keys without operators take a path without regexes."""

    def __init__(self, key: str, budget: Budget) -> None:
        self._literal = key if _LITERAL.fullmatch(key) else None
        self._pattern = Pattern(key, budget, ending=True) if self._literal is None else None

    def matches(self, path: str, budget: Budget) -> bool:
        budget.spend()
        if self._pattern is not None:
            return self._pattern.fullmatch(path, budget)
        assert self._literal is not None
        whole = self._literal.startswith("^")
        key = self._literal.removeprefix("^")
        if not path.endswith(key[key.rfind(".") + 1 :]) or len(key) > len(path):
            return False
        tail, before = path[len(path) - len(key) :], path[: len(path) - len(key)]
        if before and (whole or not before.endswith(".")):
            return False
        return all(k in (".", c) for k, c in zip(key, tail, strict=True))
