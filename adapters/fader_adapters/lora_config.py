"""adapter_config.json, read into the part that decides the delta. Reads no tensors."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fader_adapters.config_keys import check_init, invalid, require_known, shown
from fader_adapters.errors import AdapterInvalid, AdapterTooLarge
from fader_adapters.invocation import read_invocation
from fader_adapters.limits import Limits
from fader_adapters.mlx import MADE_BY_MLX
from fader_adapters.pattern_nodes import Budget, PatternUnsafe
from fader_adapters.patterns import Pattern
from fader_adapters.strict_json import load_object
from fader_adapters.targets import ALL_LINEAR, TIED_NAMES, PathMap, Targets

_NAME = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_MAX_NAMES = 4096
_LORA = '"LORA"; of many other kinds PEFT makes one: peft.save_as_lora'
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION")
"""Those whose adapters have no head of their own."""
_LONGEST_NAME = 512
"""Characters of a base's name that are shown."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of a LoRA config that decides the delta."""

    rank: int
    alpha: float
    rslora: bool
    targets: Targets
    ranks: PathMap
    alphas: PathMap
    base_name: str | None
    """What the adapter says it was trained on; shown, never compared."""
    dora: bool = False
    bias: bool = False
    """Every B has a bias of its own."""
    tying: bool = False
    """The embedding's delta is the output head's too, where the base ties them."""
    peft_version: str | None = None
    """Of the library that saved it, where it says so."""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Trained token rows by module name; "" is the embedding."""
    saved: tuple[str, ...] = ()
    """Names of modules that were trained whole (modules_to_save)."""
    invocation: tuple[int, ...] = ()
    """Tokens that activate it; none: it always applies."""
    mlx: bool = False
    """It was trained by MLX-LM."""

    def saves(self, path: str) -> bool:
        """Whether PEFT trains the module at `path` of the adapter's model whole: by the end of its
        path, dots or not."""
        return f"base_model.model.{path}".endswith(self.saved)

    @property
    def ties_saved(self) -> bool:
        """Whether what is trained of one end of a tied base is trained of both. By names alone."""
        return self.tying and any(name.rpartition(".")[2] in TIED_NAMES for name in self.saved)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the config asks for beside A and B."""
        flags = (
            ("dora", self.dora),
            ("lora_bias", self.bias),
            ("trainable_tokens", bool(self.tokens)),
            ("modules_to_save", bool(self.saved)),
            ("alora", bool(self.invocation)),
        )
        return tuple(kind for kind, there in flags if there)

    def rank_of(self, path: str) -> int:
        """Declared rank of a module of the adapter's own model. Raises AdapterInvalid."""
        try:
            return int(self.ranks.get(path, self.rank))
        except PatternUnsafe as error:
            raise _unsafe("rank_pattern", error) from None

    def alpha_of(self, path: str) -> float:
        """Declared alpha of a module of the adapter's own model. Raises AdapterInvalid."""
        try:
            return self.alphas.get(path, self.alpha)
        except PatternUnsafe as error:
            raise _unsafe("alpha_pattern", error) from None

    def scale(self, rank: int, alpha: float) -> float:
        """What multiplies B·A."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_config(data: bytes, limits: Limits) -> LoraConfig:
    """Check and read adapter_config.json. Raises AdapterInvalid, AdapterTooLarge."""
    fields = load_object(data, "adapter_config.json")
    if fields.get("peft_type") != "LORA":  # first: another kind has other fields too
        raise invalid("peft_type", fields.get("peft_type"), _LORA)
    require_known(fields)
    if fields.get("task_type") not in (None, *_TASKS):
        raise invalid("task_type", fields["task_type"], f"null or one of {', '.join(_TASKS)}")
    if fields.get("bias") not in (None, "none", "all", "lora_only"):
        raise invalid(
            "bias", fields["bias"], '"none", or "all" or "lora_only" without any in the file'
        )
    # Only PEFT's merge reads fan_in_fan_out, and PEFT itself corrects it to the layer's kind.
    _boolean(fields, "fan_in_fan_out")
    check_init(fields.get("init_lora_weights", True))
    dora, bias = _boolean(fields, "use_dora"), _boolean(fields, "lora_bias")
    invocation = read_invocation(fields, limits)
    if dora and bias:
        raise invalid("lora_bias", bias, "false beside use_dora = true")
    budget = Budget(limits.pattern_work)
    base_name, version = fields.get("base_model_name_or_path"), fields.get("peft_version")
    return LoraConfig(
        rank=_rank("r", fields.get("r"), limits),
        alpha=_alpha("lora_alpha", fields.get("lora_alpha"), limits),
        rslora=_boolean(fields, "use_rslora"),
        targets=_targets(fields, budget),
        ranks=_path_map(
            "rank_pattern",
            {k: _rank(k, v, limits) for k, v in _entries(fields, "rank_pattern")},
            budget,
        ),
        alphas=_path_map(
            "alpha_pattern",
            {k: _alpha(k, v, limits) for k, v in _entries(fields, "alpha_pattern")},
            budget,
        ),
        base_name=base_name[:_LONGEST_NAME] if isinstance(base_name, str) else None,
        peft_version=version if isinstance(version, str) else None,
        dora=dora,
        bias=bias,
        tying=_boolean(fields, "ensure_weight_tying"),
        tokens=_tokens(fields.get("trainable_token_indices")),
        saved=_saved(fields.get("modules_to_save")),
        invocation=invocation,
        mlx=fields.get("auto_mapping") == MADE_BY_MLX,
    )


def _targets(fields: dict[str, Any], budget: Budget) -> Targets:
    parameters = _parameters(fields.get("target_parameters"))
    include: frozenset[str] | Pattern | Any = frozenset()
    if not parameters or fields.get("target_modules") not in (None, []):
        include = _names_or_pattern("target_modules", fields.get("target_modules"), budget)
    if not include and not parameters:
        raise invalid("target_modules", fields.get("target_modules"), "names or a pattern")
    layers = _layers(fields.get("layers_to_transform"))
    names = fields.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    if not _strings(names) or not all(_NAME.fullmatch(name) for name in names):
        raise invalid("layers_pattern", names, "plain names such as 'layers'")
    if not isinstance(include, frozenset) and (layers is not None or names):
        raise AdapterInvalid(
            "adapter_config.json: layers_to_transform and layers_pattern need a list in "
            "target_modules, not a pattern"
        )
    return Targets(
        include=include,
        exclude=_exclude(fields.get("exclude_modules"), budget),
        layers=layers,
        layer_names=tuple(names),
        parameters=parameters,
        budget=budget,
    )


def _parameters(value: Any) -> frozenset[str]:  # noqa: ANN401
    if not value:
        return frozenset()
    if _strings(value) and len(value) <= _MAX_NAMES and all(value):
        return frozenset(value)
    raise invalid("target_parameters", value, f"a list of 1 to {_MAX_NAMES} names")


def _exclude(value: Any, budget: Budget) -> frozenset[str] | Pattern:  # noqa: ANN401
    if not value:
        return frozenset()
    exclude = _names_or_pattern("exclude_modules", value, budget)
    return Pattern(ALL_LINEAR, budget) if isinstance(exclude, str) else exclude


def _names_or_pattern(
    key: str,
    value: Any,  # noqa: ANN401
    budget: Budget,
) -> frozenset[str] | Pattern | Any:  # noqa: ANN401
    if isinstance(value, str) and value:
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        try:
            return Pattern(value, budget)
        except PatternUnsafe as error:
            raise _unsafe(key, error) from None
    if _strings(value) and len(value) <= _MAX_NAMES and all(value):
        return frozenset(value)
    raise invalid(key, value, f"a pattern or a list of 1 to {_MAX_NAMES} names")


def _layers(value: Any) -> frozenset[int] | None:  # noqa: ANN401
    if value is None or value == []:
        return None
    layers = [value] if type(value) is int else value
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise invalid("layers_to_transform", value, "a layer index or a list of them")
    return frozenset(layers)


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401
    if not value:
        return {}
    named = value if isinstance(value, dict) else {"": value}
    for tokens in named.values():
        if (
            not isinstance(tokens, list)
            or not tokens
            or not all(type(token) is int and token >= 0 for token in tokens)
            or len(set(tokens)) != len(tokens)
        ):
            raise invalid("trainable_token_indices", value, "lists of different token numbers")
    return {name: tuple(tokens) for name, tokens in named.items()}


def _saved(value: Any) -> tuple[str, ...]:  # noqa: ANN401
    if not value:
        return ()
    if _strings(value) and len(value) <= _MAX_NAMES and all(value):
        return tuple(value)
    raise invalid("modules_to_save", value, f"a list of 1 to {_MAX_NAMES} names")


def _entries(fields: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    value = fields.get(key) or {}
    if not isinstance(value, dict) or len(value) > _MAX_NAMES:
        raise invalid(key, value, f"an object of at most {_MAX_NAMES} entries")
    return list(value.items())


def _path_map(key: str, values: dict[str, Any], budget: Budget) -> PathMap:
    try:
        return PathMap(values, budget)
    except PatternUnsafe as error:
        raise _unsafe(key, error) from None


def _rank(key: str, value: Any, limits: Limits) -> int:  # noqa: ANN401
    if type(value) is not int or value < 1:
        raise invalid(key, value, "a rank ≥ 1")
    if value > limits.rank:
        raise AdapterTooLarge(
            f"adapter_config.json: {key[:80]!r} = {shown(value)}, the limit is {limits.rank}"
        )
    return value


def _alpha(key: str, value: Any, limits: Limits) -> float:  # noqa: ANN401
    if type(value) not in (int, float) or not 0 < value <= limits.alpha:
        raise invalid(key, value, f"an alpha in (0, {limits.alpha:g}]")
    return float(value)


def _boolean(fields: dict[str, Any], key: str) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise invalid(key, value, "true or false")
    return bool(value)


def _strings(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _unsafe(key: str, error: PatternUnsafe) -> AdapterInvalid:
    return AdapterInvalid(
        f"adapter_config.json: a pattern in {key} cannot be evaluated safely: {error}; "
        "list the module names instead"
    )
