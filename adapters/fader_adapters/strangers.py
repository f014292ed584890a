"""What a folder holds where an adapter was expected, as training tools leave it. Opens no file."""

import os

from fader_adapters.roots import CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILES

_SHOWN = 4


def what_is_there(directory: int) -> str:
    """Of a folder without one of the two files, by its descriptor: what it lacks and what to do."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        names = []
    if CONFIG_FILE in names:
        return f"the folder has no {WEIGHTS_FILE}{_instead_of_weights(names)}"
    inner = [name for name in names if _has_config(name, directory)]
    if inner:
        return (
            f"the folder has no {CONFIG_FILE}, but its folders {_listed(inner)} have one: name one "
            "of them"
        )
    return f"the folder has no {CONFIG_FILE}{_instead_of_config(names)}"


def _instead_of_weights(names: list[str]) -> str:
    if f"{WEIGHTS_FILE}.index.json" in names:
        return ", its weights are in shards: save them as one file (a larger max_shard_size)"
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return f"; {_listed(others)}: rename it where it holds the adapter's tensors"
    return ""


def _instead_of_config(names: list[str]) -> str:
    if any(name in names for name in WEIGHTS_FILES):
        return " beside its weights: copy it from where the adapter was trained"
    if any(name.endswith(".gguf") for name in names):
        return " but a GGUF file, as llama.cpp reads: use the folder it was converted from"
    if "config.json" in names:
        return (
            " but a whole model: serve it as a base, or make an adapter of it by `fader extract` "
            "where it was fine-tuned"
        )
    return ""


def _has_config(name: str, directory: int) -> bool:
    try:
        os.stat(f"{name}/{CONFIG_FILE}", dir_fd=directory, follow_symlinks=False)
    except (OSError, ValueError):
        return False
    return True


def _listed(names: list[str]) -> str:
    shown = [name.encode(errors="backslashreplace").decode()[:80] for name in names[:_SHOWN]]
    return ", ".join([*shown, "…"] if len(names) > _SHOWN else shown)
