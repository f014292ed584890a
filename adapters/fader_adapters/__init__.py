"""LoRA adapters as data: parse, store, place, apply. Knows nothing of HTTP or scheduling."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fader_adapters.notebook import Attached, attach

__all__ = ["Attached", "attach"]


def __getattr__(name: str) -> object:
    """`attach` and `Attached` on first use: the vocabulary must be importable without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fader_adapters import notebook

    return getattr(notebook, name)
