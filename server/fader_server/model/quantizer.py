"""Quantises a checkpoint to NF4 with Fader's own kernel while transformers reads it.

Knows transformers' loading steps and bitsandbytes' parameters; knows no files and no models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.functional import get_4bit_type
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from fader_adapters.kernels import native

METHOD = "fader_nf4"
"""The name under which transformers finds the quantiser; no checkpoint carries it."""


class _Quantise(ConversionOps):
    """One weight, as transformers hands it over, to the parameter bitsandbytes would make of it."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *_: object,
        model: torch.nn.Module,
        **__: object,
    ) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for path, given in input_dict.items():
            weight: torch.Tensor = given[0] if isinstance(given, list) else given
            module = model.get_submodule(path.rpartition(".")[0])
            assert isinstance(module, Linear4bit)
            if issubclass(module.source_cls, Conv1D):
                weight = weight.T
            made[path] = quantise(weight.contiguous(), module)
            module._is_hf_initialized = True
        return made


@register_quantizer(METHOD)
class NativeNf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' NF4 with double quantisation, bit for bit, by the native kernel on the CPU."""

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise()


def quantise(weight: torch.Tensor, module: Linear4bit) -> Params4bit:
    """`weight` [out, in], fp32, bf16 or fp16, contiguous, as `module`'s NF4 parameter.

    Raises: ValueError (NaN or Inf inside).
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


@contextmanager
def quantising_natively(config: BitsAndBytesConfig) -> Iterator[None]:
    """Inside, `from_pretrained` with `config` quantises by the native kernel.

    Outside, `config` says bitsandbytes again, so that what is saved is an ordinary checkpoint.
    """
    config.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        config.quant_method = QuantizationMethod.BITS_AND_BYTES
