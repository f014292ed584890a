"""Small models with two adapters each, written once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.families import write_family
from tests.support.peft_adapters import write_adapter

_DOMAIN = {"gpt2": ["c_attn", "c_fc"], "phi3": ["qkv_proj", "down_proj"]}


@dataclass(frozen=True)
class Files:
    """A base and two adapters of other ranks and targets."""

    base: Path
    tone: Path
    domain: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    made: dict[str, Files] = {}

    def of(family: str) -> Files:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            base = write_family(family, root / "base")
            targets = _DOMAIN.get(family, ["q_proj", "o_proj"])
            made[family] = Files(
                base,
                write_adapter(base, root / "tone", rank=4, seed=1),
                write_adapter(base, root / "domain", rank=8, seed=2, target_modules=targets),
            )
        return made[family]

    return of
