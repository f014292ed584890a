"""What a base's folder or repository says beside its tokenizer, and which files it lacks."""

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

_OTHERS = ("vocab.json", "vocab.txt", "spiece.model", "tokenizer.tiktoken", "tekken.json")
"""What else a tokenizer can be read from."""


def what_is_missing(source: str, revision: str | None) -> str:
    """Which file or library a base lacks whose tokenizer could not be read; empty where none."""
    if _file(source, "tokenizer.json", revision):
        return ""
    if not _file(source, "tokenizer.model", revision):
        found = any(_file(source, name, revision) for name in _OTHERS)
        return "" if found else "there is none; copy tokenizer.json from the model it was made of"
    if importlib.util.find_spec("sentencepiece"):
        return ""
    return (
        "it has a tokenizer.model and no tokenizer.json; copy that from the model it was made of, "
        "or install sentencepiece"
    )


def _file(source: str, name: str, revision: str | None) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return cached_file(
            source, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    return None


def processor_template(source: str, revision: str | None) -> str | None:
    """The template that models which also see or hear keep with their processor."""
    for name in ("chat_template.json", "processor_config.json"):
        with contextlib.suppress(OSError, ValueError):
            file = _file(source, name, revision)
            facts = json.loads(Path(file).read_text()) if file else None
            found = facts.get("chat_template") if isinstance(facts, dict) else None
            if isinstance(found, str):
                return found
    return None


def generation_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """What generation_config.json itself says; empty where there is none, or a broken one."""
    with contextlib.suppress(OSError, ValueError):
        file = _file(source, "generation_config.json", revision)
        facts = json.loads(Path(file).read_text()) if file else None
        return facts if isinstance(facts, dict) else {}
    return {}


def config_eos(source: str, revision: str | None) -> list[int]:
    """End tokens of generation_config.json, else of config.json."""
    found: object = None
    try:
        config = GenerationConfig.from_pretrained(source, revision=revision or "main")
        found = config.eos_token_id
    except OSError:
        with contextlib.suppress(OSError):
            found = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get(
                "eos_token_id"
            )
    ids = found if isinstance(found, list) else [found]
    return [token for token in ids if isinstance(token, int)]
