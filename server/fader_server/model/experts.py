"""On a CPU a row's bits are its own, in mixtures of experts and where elements are mapped."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fader_adapters.kernels.dense import linear
from fader_adapters.kernels.native import Tape
from fader_adapters.layers import SiteLinear
from fader_adapters.stacks import experts
from fader_server.model.callers import Heard
from fader_server.model.products import MATMULS
from fader_server.model.steady import Steady, unsteady, within

BLOCK = 8
"""Rows of a product: few tokens of a step meet in one expert."""

_PRODUCTS = frozenset({"linear", "matmul", "mm", "addmm"})
"""What torch's operators are called that multiply by a router's or experts' weights."""


def one_by_one(model: PreTrainedModel) -> None:
    """In fp32 there is one product an expert, by F.linear or x @ weight."""
    if model.dtype == torch.float32 and any(True for _ in routed(model)):
        model.set_experts_implementation("eager")


def keep_rows_apart(
    model: PreTrainedModel, calls: Mapping[nn.Module, Collection[Heard]], tape: Tape | None
) -> Callable[[], None]:
    """Compute each row alike, whoever takes part: functions of single elements, and products of
    fp32 routers and experts. In the modules that were heard to call such; what ends that.

    In bf16 torch's own products are as they should be, and those of a step's experts are one call.
    """
    inside = {module for block in routed(model) for module in block.modules()}
    elements, products = Steady(tape), _Apart(tape)
    before: dict[nn.Module, Callable[..., Any]] = {}
    for module, heard in calls.items():
        own = (module in inside or _slices(module)) and not isinstance(module, SiteLinear)
        if own and any(c.name in _PRODUCTS and c.dtype == torch.float32 for c in heard):
            mode = products
        elif any(map(unsteady, heard)):
            mode = elements
        else:
            continue
        before[module] = module.forward
        setattr(module, "forward", within(mode, module.forward))  # noqa: B010 - a method by assignment
    for child in list(_without_modes(model, before)):
        before[child] = child.forward
        setattr(child, "forward", _plainly(child.forward))  # noqa: B010

    def end() -> None:
        for module, forward in before.items():
            setattr(module, "forward", forward)  # noqa: B010

    return end


def _without_modes(model: PreTrainedModel, apart: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Those children of modules in a mode that need none, and cost less without: their code is
    the model's own, and calls nothing that is kept apart, or that of installed experts."""
    installed = {module for _, module in experts(model)} - set(apart)
    for module in apart:
        for child in module.children():
            if not any("forward" in vars(m) and m not in installed for m in child.modules()):
                yield child


def _plainly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward, out of all modes."""

    def plain(*args: object, **kwargs: object) -> object:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    return plain


def routed(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold a router and the experts, whose weights are of three dimensions."""
    for path, module in model.named_modules():
        other = isinstance(module, nn.Conv1d | SiteLinear)  # a filter, a head's panels
        if not other and any(p.dim() == 3 for p in module.parameters(recurse=False)):
            yield model.get_submodule(path.rpartition(".")[0])


def _slices(module: nn.Module) -> bool:
    """Whether a module that multiplies holds matrices of its own, as mixtures do whose experts are
    rows of one matrix."""
    plain = isinstance(module, nn.Linear | nn.Embedding)
    return not plain and any(p.dim() == 2 for p in module.parameters(recurse=False))


class _Apart(Steady):
    """Nor do products depend on the number of rows."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float32:
            if func is F.linear:
                return _product(*args, **(kwargs or {}))
            if func in MATMULS and not kwargs and args[1].dim() == 2:  # weights [in, out]
                return _product(args[0], args[1].T)
        return super().__torch_function__(func, types, args, kwargs)


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = linear(x.reshape(-1, x.shape[-1]), weight, bias, block=BLOCK)
    return rows.view(*x.shape[:-1], weight.shape[0])
