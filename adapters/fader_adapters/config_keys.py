"""Which fields of adapter_config.json may stand there, and with what initialisation. Data, mostly.

Anything that could change the mathematics and is not implemented exactly is refused by name.
"""

from typing import Any

from fader_adapters.errors import AdapterInvalid

_IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Metadata, training-time and initialisation-time fields: they change no trained delta."""

_READ = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)

_REMEDY = {
    "layer_replication": "the base's layers are shared and cannot be replicated",
}

_UNKNOWN = (
    "this field is not implemented; set it to null only if it changes nothing once training is over"
)

_HARMLESS_INIT = frozenset({"eva", "gaussian", "mica", "orthogonal"})
_BASE_CHANGING_INIT = ("pissa", "olora", "loftq", "corda", "lora_ga")


def require_known(fields: dict[str, Any]) -> None:
    """Refuse fields that are not known, unless their value says "off". Raises AdapterInvalid."""
    for key, value in fields.items():
        if (
            key in _READ
            or key in _IGNORED
            or value is None
            or value is False
            or value in ({}, [], "")
        ):
            continue
        remedy = _REMEDY.get(key, _UNKNOWN)
        raise AdapterInvalid(
            f"adapter_config.json: {key[:80]!r} = {shown(value)}, expected null or false: {remedy}"
        )


def check_init(init: Any) -> None:  # noqa: ANN401 - a stranger's JSON, as below
    """Refuse initialisations that train against a changed base. Raises AdapterInvalid."""
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init in _HARMLESS_INIT):
        return
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INIT):
        raise AdapterInvalid(
            f"adapter_config.json: init_lora_weights = {shown(init)} trains against changed base "
            "weights, the base here is shared; convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    raise invalid(
        "init_lora_weights", init, f"a boolean or one of {', '.join(sorted(_HARMLESS_INIT))}"
    )


def invalid(key: str, value: Any, expected: str) -> AdapterInvalid:  # noqa: ANN401
    """The error for a known field with a value outside its allow-list."""
    return AdapterInvalid(
        f"adapter_config.json: {key[:80]!r} = {shown(value)}, expected {expected}"
    )


def shown(value: Any) -> str:  # noqa: ANN401
    """A stranger's value in a message, whatever its length."""
    return repr(value)[:80]
