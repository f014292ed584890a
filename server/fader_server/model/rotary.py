"""How long a base's sequences may be before its positions change their meaning. Knows configs."""

import logging
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

log = logging.getLogger(__name__)

DEFAULT = 2048
"""Positions of a config that tells none."""
_LENGTHS = ("max_position_embeddings", "max_seq_len")
"""What configs call their number of positions."""
_KEPT = "keep_window_size"
"""Keys that a token of Doge attends to: all of them, as long as there are no more."""


def longest(text: PretrainedConfig, source: str) -> int:
    """Tokens of the longest sequence whose every position has one meaning.

    Rotary embeddings of the kind longrope turn all keys of a sequence otherwise once it is longer
    than its original length: those that are cached would be of the other kind. Those of the kind
    yarn reach their factor times the original length, also where only they were written into the
    config, as the cards of Qwen tell. Families that attend to a choice of keys do so to all up to
    its size.
    """
    told = (getattr(text, name, None) for name in _LENGTHS)
    positions = max(int(next(filter(None, told), DEFAULT)), _yarn(text))
    kept = getattr(text, _KEPT, None)
    if kept and kept < positions:
        log.warning(
            "%s: sequences end at %d tokens, not %d: past that it attends to a choice of keys, "
            "which depends on how a prompt is cut",
            source,
            kept,
            positions,
        )
        positions = int(kept)
    original = min((_original(rope, text) or positions for rope in _longropes(text)), default=0)
    if not 0 < original < positions:
        return positions
    log.warning(
        "%s: sequences end at %d tokens, not %d: past that its longrope turns every key otherwise",
        source,
        original,
        positions,
    )
    return original


def unknown_rope(config: PretrainedConfig) -> str:
    """What is wrong with a config whose rotary embeddings transformers does not have; or empty."""
    text = config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or {}
    for kind in (given, *given.values()):
        name = kind.get("rope_type") if isinstance(kind, dict) else None
        if name not in (None, "default", *ROPE_INIT_FUNCTIONS):
            return f"rope_type in rope_parameters (rope_scaling) is {name!r}, of no known kind"
    return ""


def _yarn(text: PretrainedConfig) -> int:
    """Positions that a yarn of all layers stretches to, 0 without one that tells its original."""
    rope = getattr(text, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if rope.get("rope_type") != "yarn" or not original or not factor:
        return 0
    return int(original * factor)


def _longropes(text: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of this kind, of all layers or of some."""
    given = getattr(text, "rope_parameters", None) or {}
    kinds = [given, *(value for value in given.values() if isinstance(value, dict))]
    return [kind for kind in kinds if kind.get("rope_type") == "longrope"]


def _original(rope: dict[str, Any], text: PretrainedConfig) -> int | None:
    name = "original_max_position_embeddings"
    found = rope.get(name) or getattr(text, name, None)
    return None if found is None else int(found)
