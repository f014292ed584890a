"""Mixtures of experts in a transformers model: their stacks and routers take deltas.

The module's parts (its gate, norms, biases) are its own; the products are computed here, expert by
expert, for they are what a delta belongs to. Knows transformers' interface for experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fader_adapters.kernels.backend import StackBackend, StackKernel
from fader_adapters.kernels.dense import StackWeight, linear
from fader_adapters.kernels.routing import Routing
from fader_adapters.spec import LinearSpec, SiteSpec
from fader_adapters.stacks import DOWN, stack_names
from fader_adapters.step_state import StepState

BLOCK = 8
"""Rows of an fp32 product on a CPU: few tokens of a step meet in one expert."""


@dataclass(frozen=True, eq=False, slots=True)
class Stack:
    """One target of a mixture: a stack of experts, or a router."""

    index: int
    """In BaseSpec.linears."""
    spec: LinearSpec
    weight: StackWeight
    kernel: StackKernel

    @staticmethod
    def bound(backend: StackBackend, index: int, spec: LinearSpec, weight: StackWeight) -> "Stack":
        """Prepare one target."""
        site = SiteSpec((index,), spec.in_features, (spec.out_features,))
        return Stack(index, spec, weight, backend.bind_stack(site, spec.experts))


def install_experts(module: nn.Module, stacks: Iterable[Stack], state: StepState) -> None:
    """Let the module compute its experts with the deltas of the step that runs."""
    named = dict(zip(stack_names(module), stacks, strict=True))
    down = named.pop(DOWN)
    (up,) = named.values()

    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        routing = Routing.of(top_k_index, up.spec.experts)
        state.check_tokens(hidden_states.shape[0])
        step, lane = state.step, state.lane

        def product(stack: Stack, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            merged = None if lane is None else lane.stacks.get(stack.index)
            y = grouped(x, (merged or stack.weight).values, routing, bias)
            return stack.kernel(y, x, routing, step) if merged is None else y

        return experts_forward(
            module, hidden_states, routing, top_k_weights,
            up=lambda x, bias: product(up, x, bias),
            down=lambda x, bias: product(down, x, bias),
        )  # fmt: skip

    # a function, which a copy of the model may share, where a method would bring its owner
    setattr(module, "forward", forward)  # noqa: B010


Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x [pairs, in] and the biases of all experts, or None → [pairs, out]."""


def experts_forward(
    module: nn.Module,
    hidden: torch.Tensor,
    routing: Routing,
    weights: torch.Tensor,
    *,
    up: Product,
    down: Product,
) -> torch.Tensor:
    """What an experts' module makes of [tokens, width], given its two products.

    weights  [tokens, k]: the router's
    """
    own: Any = module
    name = "gate_up_proj" if own.has_gate else "up_proj"
    y = up(hidden[routing.token], getattr(own, f"{name}_bias", None))
    y = own._apply_gate(y) if own.has_gate else own.act_fn(y)
    y = down(y, getattr(own, f"{DOWN}_bias", None))
    if getattr(own, "has_post_expert_norm", False):
        y = own.post_expert_norm(y)
    y = y * weights.reshape(-1)[routing.order].unsqueeze(-1)
    back = torch.empty_like(y)
    back[routing.order] = y
    return back.view(*weights.shape, -1).sum(dim=1).to(hidden.dtype)


def grouped(
    x: torch.Tensor, weight: torch.Tensor, routing: Routing, bias: torch.Tensor | None
) -> torch.Tensor:
    """Each pair's product with its expert's weight [experts, out, in] and bias [experts, out]."""
    if x.dtype == torch.float32 and x.is_cpu:  # one shape of product: a row's bits are its own
        y, begin = x.new_empty(x.shape[0], weight.shape[1]), 0
        # by int: a value that is read tells whoever records a forward that it cannot be repeated
        for expert, end in enumerate(map(int, routing.ends)):
            if begin < end:
                y[begin:end] = linear(x[begin:end], weight[expert], block=BLOCK)
            begin = end
    else:
        y = F.grouped_mm(x.to(weight.dtype), weight.mT, offs=routing.ends)
    return y if bias is None else y.add_(bias[routing.expert])


def install_router(module: nn.Module, stack: Stack, state: StepState) -> None:
    """Let the router's one product take the deltas of the step that runs."""
    inner: Callable[..., Any] = module.forward

    def adapted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        merged = None if state.lane is None else state.lane.stacks.get(stack.index)
        if merged is not None:
            return F.linear(x, merged.values.to(weight.dtype), bias)
        y = F.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        state.check_tokens(rows.shape[0])
        return stack.kernel(y.reshape(len(rows), -1), rows, one_expert(rows), state.step).view_as(y)

    def forward(*args: object, **kwargs: object) -> object:
        if state.step is None and (state.lane is None or stack.index not in state.lane.stacks):
            return inner(*args, **kwargs)
        with OtherProduct(stack.spec, adapted):
            return inner(*args, **kwargs)

    setattr(module, "forward", forward)  # noqa: B010


def one_expert(rows: torch.Tensor) -> Routing:
    """The routing of rows [n, in] that all go to the one there is."""
    return Routing.of(torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device), 1)


class OtherProduct(TorchFunctionMode):
    """Inside, F.linear by a weight of the router's shape is computed by `product` instead."""

    def __init__(
        self,
        spec: LinearSpec,
        product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    ) -> None:
        """product: of x [..., in], weight [out, in] and bias."""
        super().__init__()
        self._shape = (spec.out_features, spec.in_features)
        self._product = product

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        given = kwargs or {}
        if func is not F.linear or tuple(args[1].shape) != self._shape:
            return func(*args, **given)
        x, weight, *bias = args
        return self._product(x, weight, bias[0] if bias else given.get("bias"))
