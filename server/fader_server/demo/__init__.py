"""The bundled demo: where its base, adapters and blends lie in the package. Loads nothing."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

SERVED_NAME = "fader-demo"

PROBE = (
    "What colour is the sky?",
    "What is the capital of France?",
    "What is the opposite of hot?",
    "What is a young dog?",
    "What is two plus three?",
    "Where does the baker work?",
)
"""Questions the base answers; enough text to compare two sets of weights on."""


@dataclass(frozen=True, slots=True)
class DemoTerm:
    """One adapter of a demo blend and its γ."""

    name: str
    weight: float


@dataclass(frozen=True, slots=True)
class DemoBlend:
    """A blend worth showing, with a question that shows it."""

    name: str
    adapters: tuple[DemoTerm, ...]
    description: str
    prompt: str


def _root() -> Path:
    return Path(str(files(__name__)))


def base_dir() -> Path:
    """The NF4 checkpoint, with tokenizer and chat template."""
    return _root() / "base"


def adapter_dirs() -> dict[str, Path]:
    """Adapter name to its PEFT folder, in name order."""
    folders = sorted((_root() / "adapters").iterdir())
    return {f.name: f for f in folders if (f / "adapter_config.json").is_file()}


def blends() -> tuple[DemoBlend, ...]:
    """The measured blends, as shipped in ``blends.json``."""
    entries = json.loads((_root() / "blends.json").read_text(encoding="utf-8"))
    return tuple(
        DemoBlend(
            entry["name"],
            tuple(DemoTerm(term["name"], term["weight"]) for term in entry["adapters"]),
            entry["description"],
            entry["prompt"],
        )
        for entry in entries
    )
