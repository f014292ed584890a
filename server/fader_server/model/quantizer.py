"""Quantises a checkpoint to NF4 with Fader's own kernel while transformers reads it.

Knows transformers' loading steps and bitsandbytes' parameters; knows no files and no models.
"""

from typing import Any, cast

import torch
from bitsandbytes.functional import get_4bit_type
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from fader_adapters.kernels import native

METHOD = "fader_nf4"
"""The name under which transformers finds the quantiser; no checkpoint carries it."""


@register_quantizer(METHOD)
class NativeNf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' NF4 with double quantisation, bit for bit, by the native kernel on the CPU.

    Chosen by `use_native_kernel`. The model it leaves says bitsandbytes, so that what is saved is
    an ordinary checkpoint.
    """

    def __init__(self, quantization_config: BitsAndBytesConfig, **given: Any) -> None:  # noqa: ANN401
        super().__init__(quantization_config, **given)
        self.refused: list[str] = []
        """What was wrong with weights; transformers would swallow an exception on the way."""

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _Quantise(self, self.refused)

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **given: Any,  # noqa: ANN401 - transformers' own
    ) -> PreTrainedModel:
        if self.refused:
            raise ValueError(self.refused[0])
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        cast(Any, model).quantization_method = QuantizationMethod.BITS_AND_BYTES
        return super()._process_model_after_weight_loading(model, **given)


def use_native_kernel(config: BitsAndBytesConfig) -> None:
    """Let the `from_pretrained` that is given `config` quantise by the native kernel."""
    cast(Any, config).quant_method = METHOD


class _Quantise(Bnb4bitQuantize):
    """One weight, as transformers hands it over, to the parameter bitsandbytes would make of it."""

    def __init__(self, quantizer: Bnb4BitHfQuantizer, refused: list[str]) -> None:
        super().__init__(quantizer)
        self._refused = refused

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *_: object, model: nn.Module, **__: object
    ) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for path, given in input_dict.items():
            weight: torch.Tensor = given[0] if isinstance(given, list) else given
            module = model.get_submodule(path.rpartition(".")[0])
            assert isinstance(module, Linear4bit)
            loose: Any = module  # transformers writes on it what bitsandbytes does not declare
            if issubclass(loose.source_cls, Conv1D):
                weight = weight.T
            try:
                made[path] = quantise(weight.contiguous(), module)
            except (TypeError, ValueError) as error:
                self._refused.append(f"{path}: {error}")
                made[path] = Params4bit(torch.empty(0), requires_grad=False)
            loose._is_hf_initialized = True
        return made


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
