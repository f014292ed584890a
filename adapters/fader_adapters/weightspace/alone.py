"""What an adapter's own files tell of the base it fits, where no base is at hand."""

from dataclasses import replace

from fader_adapters.errors import AdapterInvalid
from fader_adapters.header import read_header
from fader_adapters.limits import Limits
from fader_adapters.lora_config import LoraConfig, read_config
from fader_adapters.parameters import unwrapped
from fader_adapters.pattern_nodes import PatternUnsafe
from fader_adapters.replaced import WANTS_BASE
from fader_adapters.source import RawAdapter
from fader_adapters.spec import BaseSpec, Digest, LinearSpec, layer_of
from fader_adapters.stacks import DOWN, UP
from fader_adapters.targets import Targets
from fader_adapters.tensor_names import ModuleTensors, sort_tensors
from fader_adapters.tokens import WANTS_TABLE

_STACKS = (*UP, DOWN)
"""In the order in which every module has them."""


def own_linears(raw: RawAdapter) -> BaseSpec:
    """A base of just what the adapter has tensors for. Raises AdapterInvalid, AdapterTooLarge."""
    limits = Limits(tensors=1 << 17, header_bytes=1 << 25)  # whatever mixture it was made for
    config = read_config(raw.config, limits)
    named = sort_tensors(read_header(raw.weights, limits))
    if named.tokens:
        raise AdapterInvalid(WANTS_TABLE)
    if named.whole:
        raise AdapterInvalid(WANTS_BASE)
    linears = [
        _linear(path, tensors, config)
        for path, tensors in named.modules.items()
        if tensors.a.shape and tensors.b.shape
    ]
    tables = [linear for linear in linears if linear.role == "embedding"]
    tied = config.tying and len(tables) == 1
    if tied:
        linears = [_as_head(linear, tables[0], config) for linear in linears]
    linears.sort(key=_place)
    return BaseSpec(tuple(linears), Digest("0" * 64), "unknown", tied=tied)


def _as_head(linear: LinearSpec, table: LinearSpec, config: LoraConfig) -> LinearSpec:
    """The linear as the output head, if it is the one that PEFT adapts unnamed."""
    mirrored = (linear.in_features, linear.out_features) == (table.out_features, table.in_features)
    if linear.role == "linear" and mirrored and not _selects(config.targets, linear.path):
        return replace(linear, role="head")
    return linear


def _linear(path: str, tensors: ModuleTensors, config: LoraConfig) -> LinearSpec:
    width, out = tensors.a.shape[-1], tensors.b.shape[0]
    module, outside = unwrapped(path)
    targets = config.targets
    chosen = [name for name in _STACKS if targets.select_parameter(f"{module}.{name}")]
    itself = targets.select_parameter(f"{path}.weight") or _selects(targets, path)
    if outside < len(chosen) and not itself:
        stack = f"{module}.{chosen[-1 - outside]}"
        experts = tensors.a.shape[0] // config.rank_of(stack)
        return LinearSpec(stack, width, out, layer_of(path), role="experts", experts=experts)
    role = "embedding" if tensors.embedding else "linear"
    return LinearSpec(path, width, out, layer_of(path), role=role)


def _selects(targets: Targets, path: str) -> bool:
    try:
        return targets.select(path)
    except PatternUnsafe as error:
        raise AdapterInvalid(f"target_modules cannot be evaluated safely: {error}") from None


def _place(linear: LinearSpec) -> int:
    name = linear.path.rpartition(".")[2]
    return _STACKS.index(name) if linear.role == "experts" else -1
