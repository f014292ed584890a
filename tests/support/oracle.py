"""transformers and PEFT on the very same NF4 base: what Fader's answers are compared with."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from fader_adapters.architecture import auto_class
from fader_adapters.describe import kept_plain_of
from tests.support.peft_adapters import PATTERNS, TIED


def nf4_oracle(source: Path, dtype: torch.dtype, *, experts: bool = False) -> PreTrainedModel:
    """The base quantised by bitsandbytes, then plain linears that hold the decoded weights; with
    `experts` those of mixtures as well."""
    config = AutoConfig.from_pretrained(source)
    model = auto_class(config).from_pretrained(
        source,
        dtype="auto",
        device_map={"": "cpu"},
        # Falcon's eager attention adds distances to a mask that has them already
        attn_implementation="sdpa" if config.model_type == "falcon" else "eager",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept_plain_of(config),
        ),
    )
    decode_linears(model, dtype)
    _round_of_their_own(model)
    if experts:
        _decode_experts(model, dtype)
    model.is_loaded_in_4bit = False  # PEFT is to see plain linears
    kept = _kept_in_fp32(source, config, dtype)
    for path, parameter in model.named_parameters():  # no buffers: rotary frequencies stay in fp32
        parameter.data = parameter.data.to(torch.float32 if path in kept else dtype)
    _scale_as_loaded(model, config, dtype)
    return model.eval()


def _kept_in_fp32(source: Path, config: PretrainedConfig, dtype: torch.dtype) -> set[str]:
    """What of a model that is loaded in `dtype` transformers keeps in fp32; linears that are NF4
    here are of `dtype` whatever it does with them."""
    if dtype == torch.float32:
        return set()
    like = auto_class(config).from_pretrained(source, dtype=dtype)
    linears = {f"{path}.weight" for path, m in like.named_modules() if type(m) is nn.Linear}
    return {path for path, p in like.named_parameters() if p.dtype == torch.float32} - linears


def decode_linears(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """bitsandbytes' linears become plain ones that hold the decoded weights, or their own where
    those are not quantised."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            if state is None:
                plain.weight = nn.Parameter(module.weight.data)
            else:
                state.dtype = dtype
                plain.weight.data = bnb.functional.dequantize_4bit(module.weight.data, state)
            if module.bias is not None:
                plain.bias.data = module.bias.data
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)


def _round_of_their_own(model: PreTrainedModel) -> None:
    """Linears of a class that bitsandbytes does not take keep their forward, over NF4's values."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module).__name__ == "FalconLinear":
            packed, state = quantize_4bit(
                module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            module.weight.data = dequantize_4bit(packed, state)


def ready_oracle(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A checkpoint in NF4 as transformers reads it, then plain linears of the decoded weights."""
    config = AutoConfig.from_pretrained(source)
    model = auto_class(config).from_pretrained(
        source, dtype="auto", device_map={"": "cpu"}, attn_implementation="eager"
    )
    decode_linears(model, dtype)
    model.is_loaded_in_4bit = False  # PEFT is to see plain linears
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _decode_experts(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            stack = dict(module.named_parameters(recurse=False)).get(name)
            if stack is None or stack.dim() != 3:
                continue
            rows = stack.data.mT if module.is_transposed else stack.data
            if rows.shape[-1] % 64:
                continue
            packed, state = bnb.functional.quantize_4bit(
                rows.contiguous().view(-1, rows.shape[-1]), blocksize=64, quant_type="nf4"
            )
            state.dtype = dtype
            decoded = bnb.functional.dequantize_4bit(packed, state).view(rows.shape)
            stack.data = decoded.mT.contiguous() if module.is_transposed else decoded


_OF_ITS_DTYPE = ("embed_scale", "embed_positions.weights")


def _scale_as_loaded(model: PreTrainedModel, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Embeddings multiply by, and sinusoidal positions are, what they would be if transformers had
    loaded the model in `dtype`."""
    held = {path: b for path, b in model.named_buffers() if path.endswith(_OF_ITS_DTYPE)}
    if held:
        like = dict(auto_class(config).from_config(config, dtype=dtype).named_buffers())
        for path, buffer in held.items():
            # a factor that the config gives as an integer stays one
            assert like[path].dtype == (dtype if buffer.is_floating_point() else buffer.dtype)
            buffer.data = like[path].data


class Oracle:
    """Answers one sequence at a time, under the base, an adapter or PEFT's `cat` of several."""

    def __init__(
        self, source: Path | PreTrainedModel, dtype: torch.dtype, adapters: Mapping[str, Path]
    ) -> None:
        """`source`: a checkpoint to quantise, or a model that is to be taken as it is."""
        self._model: PreTrainedModel | PeftModel = (
            nf4_oracle(source, dtype) if isinstance(source, Path) else source
        )
        with warnings.catch_warnings():
            # a Conv1D's adapter on the plain linear that holds its decoded weight
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
            warnings.filterwarnings("ignore", message=TIED)
            warnings.filterwarnings("ignore", message=PATTERNS)
            for name, path in adapters.items():
                if isinstance(self._model, PeftModel):
                    self._model.load_adapter(path, adapter_name=name)
                else:
                    self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name)
        self._model.eval()

    def logits(self, tokens: Sequence[int], blend: Mapping[str, float]) -> torch.Tensor:
        """[len(tokens), vocab] in fp32."""
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            if not isinstance(self._model, PeftModel):
                assert not blend
                return self._model(input_ids=ids, use_cache=False).logits[0].float()
            if not blend:
                with self._model.disable_adapter():
                    return self._model(input_ids=ids, use_cache=False).logits[0].float()
            self._model.set_adapter(self._blended(blend))
            return self._model(input_ids=ids, use_cache=False).logits[0].float()

    def greedy(self, prompt: Sequence[int], count: int, blend: Mapping[str, float]) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, blend)[-1].argmax()))
        return tokens[len(prompt) :]

    def _blended(self, blend: Mapping[str, float]) -> str:
        if len(blend) == 1 and next(iter(blend.values())) == 1.0:
            return next(iter(blend))
        name = "+".join(f"{adapter}*{gamma}" for adapter, gamma in sorted(blend.items()))
        name = name.replace(".", "_")
        assert isinstance(self._model, PeftModel)
        if name not in self._model.peft_config:
            self._model.add_weighted_adapter(
                list(blend), list(blend.values()), name, combination_type="cat"
            )
        return name
