"""Mixtures of experts in a transformers model: their stacks and routers take deltas.

The module's parts (its gate, norms, biases) are its own; the products are computed here, expert by
expert, for they are what a delta belongs to. Knows transformers' interface for experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fader_adapters.kernels.backend import ExpertsWeight, Product, StackBackend, StackKernel
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.spec import BaseSpec, LinearSpec, SiteSpec
from fader_adapters.stacks import DOWN, absmax_of, in_nf4, stack_names
from fader_adapters.step_state import StepState


@dataclass(eq=False, slots=True)
class Stack:
    """One target of a mixture: a stack of experts, or a router."""

    index: int
    """In BaseSpec.linears."""
    spec: LinearSpec
    weight: ExpertsWeight
    """The base's; of a router StackWeight."""
    kernel: StackKernel

    @staticmethod
    def bound(
        backend: StackBackend, index: int, spec: LinearSpec, weight: ExpertsWeight
    ) -> "Stack":
        """Prepare one target."""
        site = SiteSpec((index,), spec.in_features, (spec.out_features,))
        return Stack(index, spec, weight, backend.bind_stack(site, spec.experts))


def install_mixtures(
    model: PreTrainedModel, spec: BaseSpec, backend: StackBackend, state: StepState
) -> dict[int, Stack]:
    """Let a model's experts and routers take deltas; what was installed, by index in the spec."""
    stacks: dict[int, Stack] = {}
    modules: dict[str, list[Stack]] = {}
    for index, item in enumerate(spec.linears):
        if item.role == "experts":
            path, _, name = item.path.rpartition(".")
        elif item.role == "router":
            path, name = item.path, "weight"
        else:
            continue
        weight = stack_weight(model.get_submodule(path), item, name)
        stacks[index] = Stack.bound(backend, index, item, weight)
        modules.setdefault(path, []).append(stacks[index])
    state.mixtures = bool(stacks)
    for path, own in modules.items():
        module = model.get_submodule(path)
        if own[0].spec.role == "router":
            _install_router(module, own[0], state, backend.router())
        else:
            _install_experts(module, own, state)
    return stacks


def stack_weight(module: nn.Module, spec: LinearSpec, name: str) -> StackWeight | Nf4Stack:
    """A parameter of the module, with the biases of its experts; a router's is its own affair."""
    bias = getattr(module, f"{name}_bias", None) if spec.role == "experts" else None
    source: torch.Tensor = getattr(module, name)
    if not in_nf4(source):
        return StackWeight(source, bias, transposed=spec.conv1d)
    absmax: torch.Tensor = getattr(module, absmax_of(name))
    rows = spec.experts * spec.out_features
    weight = Nf4Weight(source.data.view(-1), absmax.view(-1), rows, spec.in_features)
    return Nf4Stack(weight, spec.experts, bias)


def _install_experts(module: nn.Module, stacks: Iterable[Stack], state: StepState) -> None:
    """Let the module compute its experts with the deltas of the step that runs."""
    named = dict(zip(stack_names(module), stacks, strict=True))
    down = named.pop(DOWN)
    (up,) = named.values()
    adds = cache(partial(_added, state))

    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        routing = Routing.of(top_k_index, up.spec.experts)
        state.check_tokens(hidden_states.shape[0])

        def product(stack: Stack, x: torch.Tensor) -> torch.Tensor:
            merged = None if state.lane is None else state.lane.stacks.get(stack.index)
            if merged is not None:
                return merged.grouped(x, routing)
            y = stack.weight.grouped(x, routing)
            add = adds(stack, routing.chosen)
            state.recorder.run(add, y, x, routing.order, routing.token, routing.expert)
            return y

        return experts_forward(
            module, hidden_states, routing, top_k_weights,
            up=lambda x: product(up, x),
            down=lambda x: product(down, x),
        )  # fmt: skip

    # a function, which a copy of the model may share, where a method would bring its owner
    setattr(module, "forward", forward)  # noqa: B010


def _added(state: StepState, stack: Stack, chosen: int) -> Callable[..., None]:
    """What adds to the pairs' y, in place, the deltas of the step that runs."""
    nobody = torch.empty(0)

    def add(
        y: torch.Tensor,
        x: torch.Tensor,
        order: torch.Tensor,
        token: torch.Tensor,
        expert: torch.Tensor,
    ) -> None:
        if state.step is not None:
            routing = Routing(order, token, expert, nobody, stack.spec.experts, chosen)
            done = stack.kernel(y, x, routing, state.step)
            if done is not y:
                y.copy_(done)

    return add


PairProduct = Callable[[torch.Tensor], torch.Tensor]
"""x [pairs, in] → [pairs, out], bias included."""


def experts_forward(
    module: nn.Module,
    hidden: torch.Tensor,
    routing: Routing,
    weights: torch.Tensor,
    *,
    up: PairProduct,
    down: PairProduct,
) -> torch.Tensor:
    """What an experts' module makes of [tokens, width], given its two products.

    weights  [tokens, k]: the router's
    """
    own: Any = module
    y = up(hidden.index_select(0, routing.token))
    y = own._apply_gate(y) if own.has_gate else own.act_fn(y)
    y = down(y)
    if getattr(own, "has_post_expert_norm", False):
        y = own.post_expert_norm(y)
    y = y * weights.reshape(-1).index_select(0, routing.order).unsqueeze(-1)
    back = torch.empty_like(y).index_copy_(0, routing.order, y)
    return back.view(*weights.shape, -1).sum(dim=1).to(hidden.dtype)


def _install_router(
    module: nn.Module, stack: Stack, state: StepState, product: Product | None
) -> None:
    """Let the router's one product take the deltas of the step that runs.

    product  computes it; None: torch's own
    """
    inner: Callable[..., Any] = module.forward
    add = _added(state, stack, 1)
    multiply = product or F.linear

    def adapted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        merged = None if state.lane is None else state.lane.stacks.get(stack.index)
        if merged is not None:
            assert isinstance(merged, StackWeight)
            return multiply(x, merged.values.to(weight.dtype), bias)
        y = multiply(x, weight, bias)
        if state.step is None and not state.recorder.recording:
            return y
        rows = x.reshape(-1, x.shape[-1])
        state.check_tokens(rows.shape[0])
        every = torch.arange(len(rows), device=rows.device)
        state.recorder.run(add, y.view(len(rows), -1), rows, every, every, torch.zeros_like(every))
        return y

    def forward(*args: object, **kwargs: object) -> object:
        merged = state.lane is not None and stack.index in state.lane.stacks
        if product is None and state.step is None and not merged and not state.recorder.recording:
            return inner(*args, **kwargs)
        with OtherProduct(stack.spec, adapted):
            return inner(*args, **kwargs)

    setattr(module, "forward", forward)  # noqa: B010


class OtherProduct(TorchFunctionMode):
    """Inside, F.linear by a weight of the router's shape is computed by `product` instead."""

    def __init__(
        self,
        spec: LinearSpec,
        product: Product,
    ) -> None:
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
