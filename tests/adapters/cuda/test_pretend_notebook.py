"""`attach` on a model that lies on the pretended device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters import attach
from fader_adapters.kernels.backend import BackendName
from fader_server.model import loader
from fader_server.model.checkpoint import read_config
from tests.support.pretend_cuda import PretendDevice, unavailable
from tests.support.pretend_cuda.setting import SMALL, Setting, on_device
from tests.support.pretend_cuda.world import CUDA

pytestmark = [
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.slow,
]
ROWS = [None, "a", {"a": 0.5, "ends": -1.0}]
ENDS = {"rank": 4, "target_modules": ["embed_tokens", "lm_head", "o_proj"]}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    config = LlamaConfig(**SMALL, attention_bias=True)
    return Setting(tmp_path_factory.mktemp("llama"), config, {"a": {"rank": 8}, "ends": ENDS})


@pytest.fixture(scope="module")
def want(setting: Setting) -> list[list[int]]:
    return generated(setting, torch.device("cpu"), "reference")


@pytest.fixture
def device(want: list[list[int]]) -> Iterator[PretendDevice]:
    with on_device() as found:
        yield found


def generated(setting: Setting, device: torch.device, backend: BackendName) -> list[list[int]]:
    source = str(setting.source)
    model = loader.read_nf4(source, read_config(source), device=device, attn_implementation="eager")
    lora = attach(model, arena_bytes=1 << 20, backend=backend)
    for name, path in setting.adapters.items():
        lora.load(name, path)
    ids = torch.arange(5, 20, device=device).view(3, 5)
    run: Any = model.generate
    with lora.rows(ROWS), torch.inference_mode():
        return run(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=-1).tolist()


def test_every_row_of_a_batch_gets_its_own_adapter(
    setting: Setting, want: list[list[int]], device: PretendDevice
) -> None:
    assert generated(setting, CUDA, "cuda") == want
    assert {"shrink", "expand", "nf4_dense"} <= device.kernels
