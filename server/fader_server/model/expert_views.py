"""What a probe's mixtures compute with instead of the base's experts and routers, in fp32.

Knows stacks and weights; knows no text and no cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fader_adapters.expert_layers import OtherProduct, Stack, experts_forward
from fader_adapters.kernels.routing import Routing
from fader_adapters.layers import Installed
from fader_adapters.stacks import DOWN
from fader_server.model.views import Glass, changed, product


def show_mixtures(model: nn.Module, installed: Installed, glass: Glass) -> None:
    """Let a copy of the base's modules look through `glass` where stacks are installed."""
    modules: dict[str, list[Stack]] = {}
    for stack in installed.stacks.values():
        path = stack.spec.path
        if stack.spec.role == "router":
            _show_router(model.get_submodule(path), stack, glass)
        else:
            modules.setdefault(path.rpartition(".")[0], []).append(stack)
    for path, stacks in modules.items():
        _show_experts(model.get_submodule(path), stacks, glass)


def _show_experts(module: nn.Module, stacks: list[Stack], glass: Glass) -> None:
    (down,) = (s for s in stacks if s.spec.path.endswith(f".{DOWN}"))
    (up,) = (s for s in stacks if s is not down)

    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        routing = Routing.of(top_k_index, up.spec.experts)
        return experts_forward(
            module,
            hidden_states,
            routing,
            top_k_weights,
            up=partial(_product, up, routing, glass, _bias(module, up)),
            down=partial(_product, down, routing, glass, _bias(module, down)),
        )

    setattr(module, "forward", forward)  # noqa: B010 - a method by assignment


def _bias(module: nn.Module, stack: Stack) -> torch.Tensor | None:
    """[experts, out]"""
    return getattr(module, f"{stack.spec.path.rpartition('.')[2]}_bias", None)


def _show_router(module: nn.Module, stack: Stack, glass: Glass) -> None:
    inner: Callable[..., Any] = module.forward

    def routed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        every = None if bias is None else bias[None]
        nowhere_else = torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
        y = _product(stack, Routing.of(nowhere_else, 1), glass, every, rows)
        return y.view(*x.shape[:-1], -1)

    def forward(*args: object, **kwargs: object) -> object:
        with OtherProduct(stack.spec, routed):
            return inner(*args, **kwargs)

    setattr(module, "forward", forward)  # noqa: B010


def _product(
    stack: Stack, routing: Routing, glass: Glass, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """Each pair's product, with the blend beside it, and bias [experts, out], if there is one."""
    view, out = glass.view, stack.spec.out_features
    glass.pause()
    weight = view.stack(stack)
    y, begin = x.new_empty(len(x), out, dtype=torch.float32), 0
    for expert, end in enumerate(routing.ends.tolist()):
        if begin < end:
            rows, first = x[begin:end], expert * out
            part = product(rows, weight, first, first + out, glass.pause)
            change = view.change(stack.index, expert)
            y[begin:end] = part if change is None else changed(part, rows.float(), change)
        begin = end
    if bias is not None:
        y += bias[routing.expert].float()
    return y.to(x.dtype)
