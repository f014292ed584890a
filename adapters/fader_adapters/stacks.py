"""Mixtures of experts as targets: stacks of matrices that one module computes with, and routers.

Knows transformers' interface for experts; looks at no weight but to prove a forward.
"""

from collections.abc import Iterator

import torch
from torch import nn

from fader_adapters.spec import LinearSpec

UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"


def experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that compute by transformers' ExpertsInterface, in model order."""
    for path, module in model.named_modules():
        if _by_interface(module):
            yield path, module


def routers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Modules that stand beside experts, are no linears and hold a matrix [experts, width]."""
    for path, module in experts(model):
        parent = path.rpartition(".")[0]
        for name, child in model.get_submodule(parent).named_children():
            weight = getattr(child, "weight", None)
            if (
                not isinstance(child, nn.Linear)
                and isinstance(weight, nn.Parameter)
                and tuple(weight.shape) == (stack_of(module, DOWN).experts, width_of(module))
            ):
                yield f"{parent}.{name}", weight


def stack_names(module: nn.Module) -> list[str]:
    """Parameters of the module that are stacks of weights, in the module's order."""
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and name in (*UP, DOWN)
    ]


def in_nf4(parameter: torch.Tensor) -> bool:
    """Whether a stack of weights is packed: uint8 [experts, out, in/2], in whichever order the
    module itself would hold them, and fp32 [experts, out, in/64] in the buffer `absmax_of`."""
    return parameter.dtype == torch.uint8


def absmax_of(name: str) -> str:
    """The buffer that holds the scales of a packed stack."""
    return f"{name}_absmax"


def width_of(module: nn.Module) -> int:
    """Features of what the experts are given."""
    (up,) = (name for name in stack_names(module) if name != DOWN)
    return stack_of(module, up).in_features


def stack_of(module: nn.Module, name: str, path: str = "", layer: int | None = None) -> LinearSpec:
    """One parameter of the module as a target."""
    parameter = getattr(module, name)
    count, out, width = tuple(parameter.shape)
    if in_nf4(parameter):
        width *= 2
    elif module.is_transposed:
        out, width = width, out
    parts = (out // 2, out // 2) if name == "gate_up_proj" else (out,)
    if not getattr(module, "is_concatenated", True):
        parts = ()
    full = f"{path}.{name}" if path else name
    return LinearSpec(
        full, width, out, layer, bool(module.is_transposed), "experts", parts=parts, experts=count
    )


def _by_interface(module: nn.Module) -> bool:
    """Whether it has what `use_experts_implementation` gives a class, and whole matrices."""
    told = all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed"))
    if not told or getattr(module, "_is_expert_parallel", False):
        return False
    return len(names := stack_names(module)) == 2 and DOWN in names
