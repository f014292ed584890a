"""How long a base's sequences may be before its positions change their meaning. Knows configs."""

import logging
from typing import Any

from transformers import PretrainedConfig

log = logging.getLogger(__name__)

DEFAULT = 2048
"""Positions of a config that tells none."""


def longest(text: PretrainedConfig, source: str) -> int:
    """Tokens of the longest sequence whose every position has one meaning.

    Rotary embeddings of the kind longrope turn all keys of a sequence otherwise once it is longer
    than its original length: those that are cached would be of the other kind.
    """
    positions = int(getattr(text, "max_position_embeddings", None) or DEFAULT)
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


def _longropes(text: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of this kind, of all layers or of some."""
    given = getattr(text, "rope_parameters", None) or {}
    kinds = [given, *(value for value in given.values() if isinstance(value, dict))]
    return [kind for kind in kinds if kind.get("rope_type") == "longrope"]


def _original(rope: dict[str, Any], text: PretrainedConfig) -> int | None:
    name = "original_max_position_embeddings"
    found = rope.get(name) or getattr(text, name, None)
    return None if found is None else int(found)
