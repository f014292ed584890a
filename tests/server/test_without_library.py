"""A machine where the native library was not built: slower, said once, and just as right."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels import native
from fader_adapters.kernels.backend import choose
from fader_adapters.kernels.native import library
from fader_adapters.kernels.reference import ReferenceBackend
from fader_server.config import ServeConfig
from fader_server.metrics import Metrics
from fader_server.model.device import choose_dtype
from fader_server.model.torch_attention import TorchAttention
from fader_server.world import open_world
from tests.support.families import write_family
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld

CPU = torch.device("cpu")
SLOW = "running on the slow reference kernels"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of it."""
    folder = tmp_path_factory.mktemp("family")
    base = write_family("llama", folder / "base", scale=0.2)
    return base, write_adapter(base, folder / "adapter", rank=4, seed=1, scale=0.5)


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the library is not there, as after an installation without a compiler."""
    monkeypatch.setattr(library, "LIBRARY", "libfader_kernels_never_built.so")
    library._attempt.cache_clear()
    yield
    monkeypatch.undo()
    library._attempt.cache_clear()


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if SLOW in r.getMessage()]


def _answers(family: tuple[Path, Path]) -> list[list[int]]:
    base, adapter = family
    world = TinyWorld(base)
    world.load("a", adapter)
    prompt = list(range(5, 45))
    asks = [Ask(prompt), Ask(prompt, {"a": 1.0}), Ask(prompt[:7], {"a": -0.5})]
    return [answer.tokens for answer in world.run(asks)]


def test_the_server_starts_and_says_once_that_it_is_slow_and_what_to_do(hidden, caplog):
    config = ServeConfig(arena=16 << 20, kv_cache=16 << 20, max_model_len=128, threads=1)
    with caplog.at_level(logging.WARNING), open_world(config, Metrics()) as world:
        assert world.adapters.list()
    (told,) = _told(caplog)
    assert "python -m fader_adapters.kernels.native.build" in told
    assert "\n" not in told


@pytest.mark.skipif(not native.available(), reason=native.reason())
def test_the_answers_are_those_of_the_native_kernels(family, caplog, monkeypatch, request):
    fast = _answers(family)
    assert not _told(caplog)
    request.getfixturevalue("hidden")
    assert not native.available()
    slow = _answers(family)
    assert len(_told(caplog)) == 1
    assert slow == fast
    assert len({tuple(tokens) for tokens in slow}) == 3


def test_everything_that_chooses_falls_back(family, hidden):
    assert isinstance(choose(CPU, torch.float32), ReferenceBackend)
    assert choose_dtype("auto", CPU) is torch.float32
    world = TinyWorld(family[0])
    assert isinstance(world.runner._attention, TorchAttention)
    with pytest.raises(KernelUnavailable, match=r"never_built\.so was not built"):
        choose(CPU, torch.float32, "native")
