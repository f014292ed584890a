"""Which of transformers' classes reads a checkpoint as a model that writes text. Knows configs."""

import inspect
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
)

from fader_adapters.errors import BaseUnsupported

_KINDS: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
"""The first that reads a config makes the model; the second has models that also see or hear."""


def auto_class(config: PretrainedConfig) -> type[Any]:
    """The auto class whose `from_pretrained` and `from_config` make the model.

    Raises BaseUnsupported where the config is of no decoder, or of one that answers an encoder.
    """
    return _kind(config)[0]


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """What `auto_class` makes of this config. Raises BaseUnsupported."""
    return _kind(config)[1][type(config)]


def uses_interface(config: PretrainedConfig) -> bool:
    """Whether a class tells that its attention goes through transformers' AttentionInterface: the
    model's own, or that of its text decoder alone. Raises BaseUnsupported.
    """
    try:
        decoder = MODEL_MAPPING.get(type(config.get_text_config(decoder=True)), None)
    except ValueError:  # a class that transformers lists and does not have
        decoder = None
    classes = (model_class(config), decoder)
    return any(getattr(kind, "_supports_attention_backend", False) for kind in classes)


def _kind(config: PretrainedConfig) -> tuple[Any, Any]:
    found = next((kind for kind in _KINDS if _reads(kind[1], config)), None)
    encoder = config.is_encoder_decoder
    if found is None or encoder or config.get_text_config(decoder=True).is_encoder_decoder:
        raise BaseUnsupported(f"{config.model_type} is not a decoder-only language model")
    return found


def _reads(known: Any, config: PretrainedConfig) -> bool:  # noqa: ANN401  transformers' mapping
    """Whether it makes a model of the config that takes tokens and writes one at a time, and that
    can be saved and read again: of some it makes the decoder, whose own config it does not know.
    """
    made = known.get(type(config), None)
    if made is None or made.config_class not in known:
        return False
    takes = inspect.signature(made.forward).parameters
    return "input_ids" in takes and issubclass(made, GenerationMixin)
