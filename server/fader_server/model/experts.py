"""Mixtures of experts on a CPU: a row's bits are its own there, too."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fader_adapters.kernels.backend import StackBackend
from fader_adapters.kernels.dense import linear
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.layers import Installed, SiteLinear
from fader_adapters.stacks import absmax_of, experts

BLOCK = 8
"""Rows of a product: few tokens of a step meet in one expert."""

_SIGMOIDS = (torch.sigmoid, torch.Tensor.sigmoid)
_PRODUCTS = (torch.matmul, torch.Tensor.matmul)


def keep_rows_apart(model: PreTrainedModel) -> Callable[[], None]:
    """Compute each row of an fp32 router or expert alike, whoever takes part; what ends that.

    In bf16 torch's own products are as they should be, and those of a step's experts are one call.
    """
    before = {block: block.forward for block in routed(model)}

    def end() -> None:
        for block, forward in before.items():
            setattr(block, "forward", forward)  # noqa: B010 - a method by assignment

    if not before:
        return end
    if model.dtype == torch.float32:
        # one product an expert, by F.linear or x @ weight
        model.set_experts_implementation("eager")
    for block, forward in before.items():
        setattr(block, "forward", _apart(forward))  # noqa: B010
    if model.dtype != torch.float32:
        for _, module in experts(model):
            if "forward" in vars(module) and module not in before:
                before[module] = module.forward
                setattr(module, "forward", _as_they_are(module.forward))  # noqa: B010
    return end


def pack_experts(model: PreTrainedModel, installed: Installed, backend: StackBackend) -> None:
    """Bring stacks of experts into a backend's layout, one after the other; the model's modules
    keep nothing of what they were made of."""
    for stack in installed.stacks.values():
        if stack.spec.role == "experts":
            assert isinstance(stack.weight, StackWeight | Nf4Stack)
            stack.weight = backend.pack_stack(stack.weight)
            names = (stack.spec.path, absmax_of(stack.spec.path))
            for name, tensor in zip(names, stack.weight.resident, strict=False):
                held = model.get_parameter(name) if name == names[0] else model.get_buffer(name)
                held.data = tensor


def routed(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold a router and the experts, whose weights are of three dimensions."""
    for path, module in model.named_modules():
        other = isinstance(module, nn.Conv1d | SiteLinear)  # a filter, a head's panels
        if not other and any(p.dim() == 3 for p in module.parameters(recurse=False)):
            yield model.get_submodule(path.rpartition(".")[0])


def _apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    def apart(*args: object, **kwargs: object) -> object:
        with _Apart():
            return forward(*args, **kwargs)

    return apart


def _as_they_are(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For experts whose products are kernels: nothing in them is fp32, and calls cost less."""

    def plain(*args: object, **kwargs: object) -> object:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    return plain


class _Apart(TorchFunctionMode):
    """What a row becomes does not depend on the number of rows, nor on its place among them."""

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
            if func in _PRODUCTS and not kwargs and args[1].dim() == 2:  # weights [in, out]
                return _product(args[0], args[1].T)
            if func in _SIGMOIDS:  # torch's differs between the middle and the end of a tensor
                return args[0].double().sigmoid().float()
        return func(*args, **(kwargs or {}))


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = linear(x.reshape(-1, x.shape[-1]), weight, bias, block=BLOCK)
    return rows.view(*x.shape[:-1], weight.shape[0])
