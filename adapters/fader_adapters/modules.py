"""The modules of an adapter, checked against its config and the base: names, shapes, ranks.

Knows headers; reads no weights.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_adapters.limits import Limits
from fader_adapters.lora_config import LoraConfig
from fader_adapters.orientation import turned
from fader_adapters.parameters import name_parameters
from fader_adapters.pattern_nodes import PatternUnsafe
from fader_adapters.pauses import Pause
from fader_adapters.places import Place
from fader_adapters.saved import ENDS, SavedTable, check_apart, check_saved
from fader_adapters.spec import BaseSpec
from fader_adapters.targets import ALL_LINEAR, Targets
from fader_adapters.tensor_names import ModuleTensors, Named
from fader_adapters.tokens import TokenRows, check_tokens
from fader_adapters.views import view_base

_PLAIN_ONLY = {"experts": "experts", "router": "router"}
"""Places that take A and B alone, and how they are told."""


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the adapter's model."""

    path: str
    """In the adapter's own model."""
    place: Place
    tensors: ModuleTensors
    rank: int
    alpha: float
    scale: float
    turned: bool = False
    """The delta is AᵀBᵀ, for a stack that of every expert."""


@dataclass(frozen=True, slots=True)
class Checked:
    """All that an adapter changes."""

    modules: tuple[Module, ...]
    tokens: tuple[TokenRows, ...]
    saved: tuple[SavedTable, ...] = ()
    tied: tuple[Module, Module] | None = None
    """The embedding and the head, where one delta is to be at both."""
    unmatched: tuple[str, ...] = ()
    """Names of the config that the base has nothing of."""

    @property
    def by_linear(self) -> dict[int, "Checked"]:
        """What concerns each linear of the base, in its order."""
        found: dict[int, tuple[list[Module], list[TokenRows]]] = {}
        for part in (*self.modules, *self.tokens):
            for index in dict.fromkeys(span.linear for span in part.place.spans):
                modules, tokens = found.setdefault(index, ([], []))
                if isinstance(part, Module):
                    modules.append(part)
                else:
                    tokens.append(part)
        return {i: Checked(tuple(found[i][0]), tuple(found[i][1])) for i in sorted(found)}


NOTHING = Checked((), ())


def check_modules(
    named: Named, config: LoraConfig, base: BaseSpec, limits: Limits, pause: Pause
) -> Checked:
    """Every module with its place in the base, rank and scale, and every table with new rows.

    Raises AdapterInvalid, AdapterMismatch, AdapterTooLarge.
    """
    named = name_parameters(named, config.targets, base)
    _check_called(named, base)
    view = view_base({**named.modules, **named.tokens}, base)
    saved = check_saved(named, config, view, base)
    whole = {table.place.path for table in saved if table.trained}
    places = {path: place for path in named.modules if (place := view.place(path))}
    theirs = view.theirs_too  # all that it could have adapted
    unmatched = (
        *_unmatched(config.targets, {**places, **theirs}),
        *(name for name in config.saved if not any(p.endswith(name) for p in (*theirs, *whole))),
    )
    # PEFT adapts nothing that it trains whole, and ties that first
    theirs = {path: place for path, place in theirs.items() if place.path not in whole}
    tying = config.tying and base.tied and not config.ties_saved
    tied = _check_targets(config, named, places, theirs, tying=tying, pause=pause)
    modules: list[Module] = []
    other_way = turned(named.modules, places, config, base)
    for path, tensors in named.modules.items():
        module = _module(path, tensors, places[path], config, limits, turned=path in other_way)
        modules.append(module)
        pause()
    tokens = check_tokens(named.tokens, config.tokens, view, base, limits)
    _check_trained_tokens(tokens, modules, tied=base.tied)
    check_apart(
        saved,
        {
            **{module.place.path: "LoRA factors" for module in modules},
            **{rows.place.path: "trained tokens" for rows in tokens},
        },
    )
    ends = {module.place.role: module for module in modules if module.place.role in ENDS}
    both = tied and len(ends) == len(ENDS)
    pair = (ends["embedding"], ends["head"]) if both else None
    return Checked(tuple(modules), tokens, saved, pair, unmatched)


def _check_called(named: Named, base: BaseSpec) -> None:
    """Raises AdapterMismatch for a linear that the base does not call: PEFT adapts calls."""
    for path in named.modules:
        for own in base.read:
            if f".{own}".endswith(f".{path}") or f".{path}".endswith(f".{own}"):
                raise AdapterMismatch(
                    f"{path[:160]!r} is a linear whose weight the base ({base.model_type}) reads "
                    "by itself: LoRA on it has no effect in transformers with PEFT either; leave "
                    "it out of target_modules"
                )


def _check_trained_tokens(
    tokens: Iterable[TokenRows], modules: Iterable[Module], *, tied: bool
) -> None:
    """Only over a tied head, whose tokens are trained with the embedding's, does LoRA stand on
    trained tokens: the sum of both. Raises AdapterInvalid."""
    taken = {module.place.path: module for module in modules}
    for rows in tokens:
        module = taken.get(rows.place.path)
        if module is None:
            continue
        if not tied or rows.place.role != "head" or module.tensors.magnitude is not None:
            kind = "LoRA factors" if module.tensors.magnitude is None else "DoRA"
            raise AdapterInvalid(
                f"{rows.place.path!r} has both {kind} and trained tokens; leave it out of "
                "target_modules, or train without trainable_token_indices"
            )


def _check_targets(
    config: LoraConfig,
    named: Named,
    own: Mapping[str, Place],
    theirs: Mapping[str, Place],
    *,
    tying: bool,
    pause: Pause,
) -> bool:
    """target_modules and the tensors must mean the same modules of the adapter's model: those that
    are its `own`, out of `theirs` that it could have.

    `tying`: whichever of head and embedding is selected by a name that PEFT knows, it adapts both
    and names the embedding. Returns whether it does.
    """
    targets = config.targets
    places = {**own, **theirs}
    try:
        tied = tying and targets.mean_tied()
        selected: set[str] = set()
        for path, place in places.items():
            if _selects(targets, path, place):
                selected.add(path)
            pause()
        for path in named.modules:
            follows = tied and places[path].role == "head"
            if path not in selected and not follows:
                raise AdapterInvalid(
                    f"the file has tensors for {path[:160]!r}, {_unselected(targets)}"
                )
        ties = tied and any(tensors.embedding for tensors in named.modules.values())
        for path, place in theirs.items():
            # "all-linear" leaves out the output head, which some adapters have nevertheless.
            optional = targets.include == ALL_LINEAR and place.role != "linear"
            wanted = path in selected or (place.role == "head" and ties)
            if path not in named.modules and not optional and wanted:
                raise AdapterInvalid(
                    f"the config selects {path[:160]!r}, the file has no tensors for it: "
                    "a partial adapter"
                )
    except PatternUnsafe as error:
        raise AdapterInvalid(
            f"adapter_config.json: target_modules or exclude_modules cannot be evaluated safely: "
            f"{error}; list the module names instead"
        ) from None
    return tied


def _unmatched(targets: Targets, places: Mapping[str, Place]) -> tuple[str, ...]:
    """Names that mean nothing of the base: lists often name what some families have, and PEFT
    trains the rest. Raises AdapterMismatch where no name means anything."""
    modules = targets.unmatched(path for path, place in places.items() if place.module)
    parameters = targets.unmatched_parameters(
        _parameter(path, place) for path, place in places.items()
    )
    for key, names, strangers in (
        ("target_modules", targets.include, modules),
        ("target_parameters", targets.parameters, parameters),
    ):
        if strangers and isinstance(names, frozenset) and len(strangers) == len(names):
            raise AdapterMismatch(
                f"{key} names {strangers[0][:160]!r}, the base has nothing of that name that could "
                "be adapted here, nor of any other in the list: the adapter was made for another "
                "base"
            )
    return (*modules, *parameters)


def _unselected(targets: Targets) -> str:
    if targets.parameters:
        return "neither target_modules nor target_parameters selects it"
    return "target_modules does not select it"


def _selects(targets: Targets, path: str, place: Place) -> bool:
    """Whether the config selects a place of the adapter's model."""
    named = place.module and targets.select(path)
    return named or targets.select_parameter(_parameter(path, place))


def _parameter(path: str, place: Place) -> str:
    """The parameter's path: experts' own, the weight of a module."""
    return f"{path}.weight" if place.module else path


def _module(
    path: str,
    tensors: ModuleTensors,
    place: Place,
    config: LoraConfig,
    limits: Limits,
    *,
    turned: bool,
) -> Module:
    for info in (tensors.a, tensors.b):
        if len(info.shape) != 2:
            raise AdapterInvalid(f"tensor {info.name!r} has shape {info.shape}, expected a matrix")
    parameter = _parameter(path, place)
    key = parameter if config.targets.select_parameter(parameter) else path
    declared, ranks = config.rank_of(key), tensors.a.shape[0]
    if ranks > limits.rank * place.experts:
        rank = ranks / place.experts
        raise AdapterTooLarge(f"{path!r} has rank {rank:g}, the limit is {limits.rank}")
    expected = declared * place.experts
    if ranks != expected or tensors.b.shape[1] != expected:
        of_all = f" of {place.experts} experts" if place.experts > 1 else ""
        raise AdapterInvalid(
            f"{path!r}: the config declares rank {declared}{of_all}, the tensors have A "
            f"{tensors.a.shape} and B {tensors.b.shape}; expected A [{expected}, in] and B "
            f"[out, {expected}]"
        )
    rank = declared
    _check_dimensions(tensors, place, turned=turned)
    _check_vectors(path, tensors, place, config)
    alpha = config.alpha_of(key)
    return Module(path, place, tensors, rank, alpha, config.scale(rank, alpha), turned)


def _check_dimensions(tensors: ModuleTensors, place: Place, *, turned: bool) -> None:
    given = (tensors.a.shape[1], tensors.b.shape[0])
    given = given[::-1] if turned else given
    if tensors.embedding != (place.role == "embedding"):
        expected = "a linear" if tensors.embedding else "an embedding"
        raise AdapterMismatch(f"{place.path!r} of the base is {expected}, of the adapter not")
    if given != (place.in_features, place.out_features):
        raise AdapterMismatch(
            f"{place.path!r} of the base maps {place.in_features} to {place.out_features} "
            f"features, the adapter {given[0]} to {given[1]}: another base"
        )


def _check_vectors(path: str, tensors: ModuleTensors, place: Place, config: LoraConfig) -> None:
    """DoRA's magnitudes and biases of B stand in every module, or in none: as the config says."""
    bias = config.bias and not tensors.embedding  # PEFT gives embeddings none
    for what, flag, info, wanted in (
        ("lora_magnitude_vector", "use_dora", tensors.magnitude, config.dora),
        ("lora_B.bias", "lora_bias", tensors.bias, bias),
    ):
        if (info is not None) != wanted:
            raise AdapterInvalid(
                f"adapter_config.json: {flag} = {str(wanted).lower()}, but {path[:160]!r} has "
                f"{'a' if info else 'no'} {what}"
            )
        out = tensors.b.shape[0]
        if info is not None and (max(info.shape, default=0), math.prod(info.shape)) != (out, out):
            raise AdapterInvalid(f"tensor {info.name!r} has shape {info.shape}, expected [{out}]")
    told = _PLAIN_ONLY.get(place.role)
    if told and (tensors.magnitude or tensors.bias):
        what = "DoRA" if tensors.magnitude else "lora_bias"
        raise AdapterInvalid(
            f"{path[:160]!r}: {what} of a mixture's {told} is not implemented; train plain LoRA "
            "there, or leave it out"
        )
