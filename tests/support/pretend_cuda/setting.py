"""What worlds on the pretended device are made of; their answers beside the reference's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig

from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_server.model import graphs, prompt_graphs
from tests.support.families import COMMON, CONFIGS, write_family
from tests.support.peft_adapters import write_adapter
from tests.support.pretend_cuda.base import read_bases
from tests.support.pretend_cuda.device import PretendDevice, pretend
from tests.support.pretend_cuda.world import LIMITS, PretendWorld
from tests.support.world import Answer, Ask, TinyWorld

PIECE = 24
"""Tokens of the smallest captured step of prompts, for the interpreter's sake."""

SMALL: dict[str, Any] = COMMON | {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ADAPTERS: dict[str, dict] = {
    "a": {"rank": 8},
    "b": {"rank": 20},
    "dora": {"rank": 4, "use_dora": True},
    "bias": {"rank": 4, "lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "tokens": {
        "rank": 4,
        "target_modules": ["o_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 40, 41], "lm_head": [9, 40, 50]},
    },
    "late": {"rank": 4, "alora_invocation_tokens": [147, 148]},
    "ends": {"rank": 4, "target_modules": ["embed_tokens", "lm_head", "o_proj"], "copies": True},
}


class Setting:
    """A base of one small layer with adapters of every kind; the reference's world over it."""

    def __init__(
        self,
        folder: Path,
        config: PretrainedConfig | None = None,
        adapters: Mapping[str, dict] = ADAPTERS,
    ) -> None:
        config = config or LlamaConfig(**SMALL, attention_bias=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CONFIGS, "llama", lambda: config)
            self.source = write_family("llama", folder / "base")
        self.adapters = {
            name: write_adapter(self.source, folder / name, seed=seed, **given)
            for seed, (name, given) in enumerate(adapters.items())
        }
        self.reference = TinyWorld(self.source, limits=LIMITS, blocks=40, backend="reference")
        self.load(self.reference)

    def load(self, world: TinyWorld) -> None:
        for name, path in self.adapters.items():
            world.load(name, path)


@contextmanager
def on_device(**given: int) -> Iterator[PretendDevice]:
    """A device that bases can be read to, with small graphs."""
    with pretend(**given) as found, pytest.MonkeyPatch.context() as patch:
        read_bases(found, patch)
        patch.setattr(graphs, "WARM_TOKENS", (20,))
        for module in (nf4, prompt_graphs):
            patch.setattr(module, "PIECE", PIECE)
        patch.setitem(CudaBackend.__init__.__kwdefaults__, "entries", 12)
        yield found


def opened(setting: Setting, **given) -> PretendWorld:
    """A world with every adapter of the setting."""
    world = PretendWorld(setting.source, **given)
    assert isinstance(world.base.backend, CudaBackend)
    setting.load(world)
    return world


def same(got: list[Answer], want: list[Answer]) -> None:
    """The same tokens and ends, and logprobs but for the last bits."""
    for answer, expected in zip(got, want, strict=True):
        assert answer.error is expected.error is None
        assert answer.tokens == expected.tokens
        assert answer.finish == expected.finish
        for ours, theirs in (
            (answer.logprobs, expected.logprobs),
            (answer.prompt_logprobs, expected.prompt_logprobs),
        ):
            assert [entry.token for entry in ours] == [entry.token for entry in theirs]
            told = [entry.logprob for entry in theirs]
            assert [entry.logprob for entry in ours] == pytest.approx(told, abs=1e-4)


def check(setting: Setting, world: PretendWorld, asks: list[Ask]) -> list[Answer]:
    """Serve them here and by the reference."""
    got = world.run(asks)
    same(got, setting.reference.run(asks))
    return got
