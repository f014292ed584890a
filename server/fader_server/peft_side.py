"""transformers and PEFT on the very same NF4 base: what a server's answers are compared with.

Slow and plain on purpose: nothing here is Fader's own, but for the reading of folders' names and of
checkpoints that are NF4 already, or in codes of other methods.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.describe import kept_plain_of
from fader_adapters.errors import first_line
from fader_adapters.kernels.nf4 import BLOCK
from fader_adapters.stacks import absmax_of, in_nf4, stack_names
from fader_adapters.stacks import experts as mixtures
from fader_server.errors import ConfigInvalid
from fader_server.model.checkpoint import of_bitsandbytes, read_config, read_nf4, values_of
from fader_server.model.precision import cast_base
from fader_server.model.quantizer import Nf4Config


def require_peft() -> ModuleType:
    """Raises ConfigInvalid with what to install."""
    try:
        import peft
    except ImportError:
        raise ConfigInvalid(
            "this compares with PEFT, which is not installed: pip install 'fader[verify]'"
        ) from None
    return peft


def nf4_model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base quantised by bitsandbytes, then plain linears that hold the decoded weights."""
    config = read_config(source)
    # Falcon's eager attention adds distances to a mask that has them already
    attention = "sdpa" if config.model_type == "falcon" else "eager"
    if of_bitsandbytes(config):
        model = read_nf4(source, config, device=torch.device("cpu"), attn_implementation=attention)
    else:
        model, _ = values_of(source, config).load(
            config,
            attn_implementation=attention,
            device_map={"": "cpu"},
            quantization_config=Nf4Config(
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=kept_plain_of(config),
            ),
        )
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            model.set_submodule(path, _plain(module, dtype))
    for _, experts in mixtures(model):
        for name in stack_names(experts):
            if in_nf4(getattr(experts, name)):
                _decode(experts, name, dtype)
    # PEFT is to see plain linears
    model.is_loaded_in_4bit = False  # pyright: ignore[reportArgumentType]
    cast_base(model, dtype)
    return model.eval()


def _plain(module: Linear4bit, dtype: torch.dtype) -> nn.Linear:
    weight = module.weight
    assert isinstance(weight, Params4bit)
    assert weight.quant_state is not None
    weight.quant_state.dtype = dtype
    bias = module.bias if isinstance(module.bias, nn.Parameter) else None
    plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
    plain.weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    if bias is not None:
        plain.bias.data = bias.data
    return plain


def _decode(experts: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Let a module hold a packed stack's values instead of it."""
    packed: torch.Tensor = getattr(experts, name)
    state = functional.QuantState(
        absmax=getattr(experts, absmax_of(name)).reshape(-1),
        shape=torch.Size((*packed.shape[:-1], 2 * packed.shape[-1])),
        code=functional.get_4bit_type("nf4", device="cpu"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    values = functional.dequantize_4bit(packed.data.reshape(-1, 1), state)
    if cast(Any, experts).is_transposed:
        values = values.mT.contiguous()
    setattr(experts, name, nn.Parameter(values, requires_grad=False))


def _activation(model: Any, ids: torch.Tensor, prompt_len: int) -> dict[str, Any]:  # noqa: ANN401
    """From where on an activated adapter applies: PEFT's own search, in the prompt alone, as when
    it generates."""
    if not getattr(model.active_peft_config, "alora_invocation_tokens", None):
        return {}
    from peft.tuners.lora.variants import calculate_alora_offsets

    prompt = ids[:, :prompt_len]
    (offset,) = calculate_alora_offsets(model.peft_config, model.active_adapter, prompt)
    after = ids.shape[1] - prompt_len
    return {"alora_offsets": [None if offset is None else offset + after]}


class PeftSide:
    """Answers one sequence at a time, under the base or one adapter."""

    def __init__(self, source: str, dtype: torch.dtype, adapters: Mapping[str, Path]) -> None:
        """`adapters`: folders by name. Raises ConfigInvalid without PEFT."""
        self._peft = require_peft()
        self._plain: Any = nf4_model(source, dtype)
        self._adapters = adapters
        self._under: tuple[str, Any] | None = None
        """The adapter that was asked for last, and the model that has it."""
        text = self._plain.config.get_text_config(decoder=True)
        self.sums = int(text.num_hidden_layers * text.hidden_size)
        """How many terms an output adds up, roughly."""

    def logits(
        self, tokens: Sequence[int], adapter: str | None, *, prompt_len: int | None = None
    ) -> torch.Tensor:
        """[len(tokens), vocab] in fp32; another adapter than the last one is loaded first.

        prompt_len: so many of the tokens are the prompt, the rest came after it; None: all are.
        Raises ConfigInvalid, also for an activated adapter that PEFT loads and cannot apply.
        """
        model = self._plain if adapter is None else self._with(adapter)
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            places = {} if adapter is None else _activation(model, ids, prompt_len or len(tokens))
            try:
                return model(input_ids=ids, use_cache=False, **places).logits[0].float()
            except IndexError as error:
                if adapter is None or not places:
                    raise
                # linears that a model gives all tokens in one row, as beside experts
                raise ConfigInvalid(
                    f"PEFT cannot apply the activated {self._adapters[adapter]}: "
                    f"{first_line(error)}"
                ) from None

    def _with(self, adapter: str) -> Any:  # noqa: ANN401 - PEFT's model
        """Modules of its own over the base's one set of weights: what PEFT makes of an adapter
        depends on what it has loaded into the same modules before, where it can load it at all.
        Embedding and head are copies, for PEFT writes saved ones over them."""
        if self._under is None or self._under[0] != adapter:
            self._under = None
            ends = (self._plain.get_input_embeddings(), self._plain.get_output_embeddings())
            own = {id(tensor) for end in ends if end is not None for tensor in end.parameters()}
            every = (*self._plain.parameters(), *self._plain.buffers())
            tensors = [tensor for tensor in every if id(tensor) not in own]
            modules = copy.deepcopy(self._plain, {id(tensor): tensor for tensor in tensors})
            self._under = adapter, self._load(modules, adapter)
        return self._under[1]

    def _load(self, modules: object, adapter: str) -> Any:  # noqa: ANN401
        with warnings.catch_warnings():
            # a Conv1D's adapter on the plain linear that holds its decoded weight
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
            # of tables that are tied, which is its advice on training and merging
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            # PEFT asks transformers by names it has changed since
            warnings.filterwarnings("ignore", category=FutureWarning)
            # of experts, whose names it makes patterns of and then looks for among modules
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            folder = str(self._adapters[adapter])
            try:
                return self._peft.PeftModel.from_pretrained(modules, folder).eval()
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigInvalid(f"PEFT cannot load {folder}: {first_line(error)}") from None
