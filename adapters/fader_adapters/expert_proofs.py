"""Whether a mixture computes as the deltas of its experts and router assume: a few tokens tell."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fader_adapters.expert_layers import OtherProduct, experts_forward, stack_weight
from fader_adapters.kernels.routing import Routing
from fader_adapters.spec import BaseSpec, LinearSpec
from fader_adapters.stacks import DOWN, in_nf4, stack_names, stack_of

TOKENS = 5
SOME = 4
"""Experts that tell what a module does with those it holds packed."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Of the largest element."""


def unproven(model: nn.Module, spec: BaseSpec) -> set[str]:
    """Paths of the spec's experts and routers that compute otherwise, and are no targets."""
    found: set[str] = set()
    sound: dict[str, bool] = {}
    for item in spec.linears:
        if item.role == "experts":
            path = item.path.rpartition(".")[0]
            if path not in sound:
                sound[path] = _experts_as_assumed(model.get_submodule(path))
            if not sound[path]:
                found.add(item.path)
        elif item.role == "router" and not _router_as_assumed(model.get_submodule(item.path), item):
            found.add(item.path)
    return found


@torch.inference_mode()
def _experts_as_assumed(module: nn.Module) -> bool:
    """Whether the module's own forward gives what its two products, gate and weights give."""
    if any(in_nf4(getattr(module, name)) for name in stack_names(module)):
        module = _some_experts(module)
    stacks = {name: stack_of(module, name) for name in stack_names(module)}
    (up,) = (name for name in stacks if name != DOWN)
    weight = getattr(module, up)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, stacks[up].in_features, generator=g).to(weight)
    count = min(2, stacks[up].experts)
    order = [torch.randperm(stacks[up].experts, generator=g)[:count] for _ in range(TOKENS)]
    chosen = torch.stack(order).to(weight.device)
    shares = torch.rand(TOKENS, count, generator=g).to(weight)
    routing = Routing.of(chosen, stacks[up].experts)
    ours = experts_forward(
        module,
        hidden,
        routing,
        shares,
        up=lambda x: stack_weight(module, stacks[up], up).grouped(x, routing),
        down=lambda x: stack_weight(module, stacks[DOWN], DOWN).grouped(x, routing),
    )
    try:
        own: Any = module(hidden, chosen, shares)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False  # it is called otherwise
    return (
        isinstance(own, torch.Tensor)
        and own.shape == ours.shape
        and bool((own - ours).abs().max() <= TOLERANCE[weight.dtype] * own.abs().max())
    )


def _some_experts(module: nn.Module) -> nn.Module:
    """The module with a few of its experts, whose packed matrices are decoded: its own forward
    multiplies by nothing else. Its other parts are the same."""
    twin: Any = copy.copy(module)
    count = min(SOME, stack_of(module, DOWN).experts)
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    dtype = floats[0] if floats else torch.float32
    twin._parameters, twin.num_experts = {}, count
    for name, parameter in module.named_parameters(recurse=False):
        part = parameter.data[:count] if parameter.dim() > 1 else parameter.data
        if name in stack_names(module) and in_nf4(parameter):
            part = _decoded(module, name, count).to(dtype)
        twin._parameters[name] = nn.Parameter(part, requires_grad=False)
    return twin


def _decoded(module: nn.Module, name: str, count: int) -> torch.Tensor:
    """[count, out, in] fp32, or transposed where the module holds them so."""
    spec = stack_of(module, name)
    packed = stack_weight(module, spec, name)
    values = packed.rows(0, count * spec.out_features)
    values = values.view(count, spec.out_features, spec.in_features)
    return values.mT.contiguous() if spec.conv1d else values


@torch.inference_mode()
def _router_as_assumed(module: nn.Module, spec: LinearSpec) -> bool:
    """Whether the router multiplies once, by F.linear."""
    seen: list[torch.Size] = []

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.shape)
        return F.linear(x, weight, bias)

    weight: Any = module.weight
    try:
        with OtherProduct(spec, product):
            module(torch.ones(TOKENS, spec.in_features).to(weight))
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False  # it is called otherwise
    return len(seen) == 1 and seen[0].numel() == TOKENS * spec.in_features
