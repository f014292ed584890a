"""Quantises a checkpoint to NF4 while transformers reads it, by Fader's own kernel where there is
one; experts too, if asked. Reads those that a file holds packed.

Knows transformers' loading steps and bitsandbytes' parameters; knows no files and no models.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from fader_adapters.describe import make_plain
from fader_adapters.kernels import native
from fader_adapters.stacks import absmax_of, experts, in_nf4, stack_names, stack_of

METHOD = "fader_nf4"
"""The name under which transformers finds the quantiser; no checkpoint carries it."""

_OF_METHOD = ("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")


class Nf4Config(BitsAndBytesConfig):
    """bitsandbytes' NF4, by the quantiser of this module."""

    def __init__(
        self,
        *,
        native_kernel: bool = False,
        experts_in_nf4: bool = False,
        **given: Any,  # noqa: ANN401 - bitsandbytes' own
    ) -> None:
        """native_kernel: quantise by Fader's kernel. experts_in_nf4: stacks of experts too; what a
        checkpoint says that holds them so."""
        super().__init__(load_in_4bit=True, **given)
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.native_kernel = native_kernel
        self.experts_in_nf4 = experts_in_nf4

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        told = super().to_dict()
        del told["native_kernel"]
        if not self.experts_in_nf4:
            del told["experts_in_nf4"]
        return told


def read_here(facts: dict[str, Any]) -> dict[str, Any]:
    """The quantisation config of a checkpoint as one that this module's quantiser reads."""
    return {key: value for key, value in facts.items() if key not in _OF_METHOD} | {
        "quant_method": METHOD
    }


class Nf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' NF4 with double quantisation, bit for bit, by whichever kernel.

    The model it leaves says bitsandbytes, so that what is saved is an ordinary checkpoint, but for
    packed experts: uint8 [experts, out, in/2] under their own name, and fp32 [experts, out, in/64]
    under that of `absmax_of`, blocks of 64 along each row.
    """

    def __init__(self, quantization_config: Nf4Config, **given: Any) -> None:  # noqa: ANN401
        super().__init__(quantization_config, **given)
        self.experts_in_nf4 = quantization_config.experts_in_nf4
        self.native_kernel = quantization_config.native_kernel
        self.refused: list[str] = []
        """What was wrong with weights; transformers would swallow an exception on the way."""

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _Quantise(self)

    def param_needs_quantization(
        self,
        model: PreTrainedModel,
        param_name: str,
        **given: Any,  # noqa: ANN401 - transformers' own
    ) -> bool:
        if super().param_needs_quantization(model, param_name, **given):
            return True
        path, _, name = param_name.rpartition(".")
        return absmax_of(name) in dict(model.get_submodule(path).named_buffers(recurse=False))

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: Any,  # noqa: ANN401 - transformers' own
        **given: Any,  # noqa: ANN401
    ) -> None:
        make_plain(model)
        super()._process_model_before_weight_loading(model, device_map, **given)
        if self.experts_in_nf4:
            make_room(model, packed=self.pre_quantized)

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **given: Any,  # noqa: ANN401 - transformers' own
    ) -> PreTrainedModel:
        if self.refused:
            raise ValueError(self.refused[0])
        told = cast(Nf4Config, self.quantization_config)
        told.experts_in_nf4 = any(True for _ in packed_stacks(model))
        told.quant_method = QuantizationMethod.BITS_AND_BYTES
        cast(Any, model).quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **given)


# not as decorators, behind which a class would lose its type
register_quantization_config(METHOD)(Nf4Config)
register_quantizer(METHOD)(Nf4Quantizer)


def make_room(model: nn.Module, *, packed: bool) -> None:
    """Let a model without values take packed experts, of all stacks whose rows are whole blocks.

    packed: they are read so; else parameters wait, as they are, for values that are packed later.
    """
    for _, module in experts(model):
        for name in stack_names(module):
            spec = stack_of(module, name)
            if spec.in_features % native.BLOCK:
                continue
            shape = (spec.experts, spec.out_features, spec.in_features // native.BLOCK)
            device = getattr(module, name).device
            absmax = torch.empty(shape, dtype=torch.float32, device=device)
            module.register_buffer(absmax_of(name), absmax)
            if packed:
                shape = (*shape[:2], spec.in_features // 2)
                codes = torch.empty(shape, dtype=torch.uint8, device=device)
                setattr(module, name, nn.Parameter(codes, requires_grad=False))


def packed_stacks(model: nn.Module) -> Iterator[str]:
    """Paths of the stacks that a model holds packed."""
    for path, module in experts(model):
        for name in stack_names(module):
            if in_nf4(getattr(module, name)):
                yield f"{path}.{name}"


class _Quantise(Bnb4bitQuantize):
    """One weight, as transformers hands it over, to the parameter bitsandbytes would make of it."""

    def __init__(self, quantizer: Nf4Quantizer) -> None:
        super().__init__(quantizer)
        self._native = quantizer.native_kernel
        self._refused = quantizer.refused

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *given: Any,  # noqa: ANN401 - transformers' own
        model: nn.Module,
        **more: Any,  # noqa: ANN401
    ) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for path, value in input_dict.items():
            weight: torch.Tensor = value[0] if isinstance(value, list) else value
            parent, _, name = path.rpartition(".")
            module = model.get_submodule(parent)
            if not isinstance(module, Linear4bit):
                codes, absmax = self._stack(path, weight, module)
                made[path], made[f"{parent}.{absmax_of(name)}"] = codes, absmax
            elif self._native:
                made[path] = self._linear(path, weight, module)
            else:
                made |= super().convert({path: value}, *given, model=model, **more)
        return made

    def _linear(self, path: str, weight: torch.Tensor, module: Linear4bit) -> Params4bit:
        loose: Any = module  # transformers writes on it what bitsandbytes does not declare
        if issubclass(loose.source_cls, Conv1D):
            weight = weight.T
        try:
            made = quantise(weight.contiguous(), module)
        except (TypeError, ValueError) as error:
            self._refused.append(f"{path}: {error}")
            made = Params4bit(torch.empty(0), requires_grad=False)
        loose._is_hf_initialized = True
        return made

    def _stack(
        self, path: str, weight: torch.Tensor, module: nn.Module
    ) -> tuple[nn.Parameter, torch.Tensor]:
        if cast(Any, module).is_transposed:
            weight = weight.mT
        rows = weight.shape[:-1]
        try:
            codes, absmax = _packed(weight.contiguous(), by_native=self._native)
        except (TypeError, ValueError) as error:
            self._refused.append(f"{path}: {error}")
            codes = torch.empty(weight.numel() // 2, dtype=torch.uint8)
            absmax = torch.empty(weight.numel() // native.BLOCK)
        return nn.Parameter(codes.view(*rows, -1), requires_grad=False), absmax.view(*rows, -1)


def _packed(weight: torch.Tensor, *, by_native: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax of a stack [experts, out, in], whose rows are whole blocks. Raises:
    TypeError, ValueError (NaN or Inf inside)."""
    if by_native:
        done = native.quantise_nf4(weight)
        assert done.absmax is not None
        return done.packed, done.absmax
    codes, state = quantize_4bit(weight, blocksize=native.BLOCK, quant_type="nf4")
    if not bool(torch.isfinite(state.absmax).all()):
        raise ValueError("weight must be finite, got NaN or Inf")
    return codes, state.absmax.float()


def quantise(weight: torch.Tensor, module: Linear4bit) -> Params4bit:
    """`weight` [out, in], fp32, bf16 or fp16, contiguous, as `module`'s NF4 parameter.

    Raises: TypeError (another dtype), ValueError (NaN or Inf inside).
    """
    done = native.quantise_nf4(weight, nested=True)
    assert done.nested is not None
    facts = {
        "quant_type": "nf4",
        "blocksize": native.BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": done.shape,
        "absmax": done.nested.codes,
        "quant_map": get_4bit_type("nf4", device="cpu"),
        "nested_absmax": done.nested.absmax,
        "nested_blocksize": native.NESTED_BLOCK,
        "nested_quant_map": done.nested.map,
        "nested_dtype": "float32",
        "nested_offset": done.nested.offset,
    }
    return Params4bit.from_prequantized(done.packed, facts, device="cpu", module=module)
