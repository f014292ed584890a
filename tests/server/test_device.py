"""Which device a server gets, and what it is told when it cannot have the one it asked for."""

import pytest
import torch

from fader_server.errors import ConfigInvalid
from fader_server.model.device import choose_device, free_bytes, spare_bytes


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A GPU that is not there; its capability may be changed."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability[0])
    return capability


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_is_used(gpu, name):
    assert choose_device(name) == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")


def test_auto_serves_on_the_cpu_where_the_gpu_is_too_old_and_says_why(gpu, caplog):
    gpu[0] = (7, 5)
    assert choose_device("auto") == torch.device("cpu")
    assert "compute capability 7.5 is below 8.0" in caplog.text
    with pytest.raises(ConfigInvalid, match=r"7\.5 is below 8\.0; use --device cpu"):
        choose_device("cuda")


def test_a_torch_without_cuda_is_told_from_a_machine_without_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigInvalid, match="built without CUDA"):
        choose_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigInvalid, match="check the driver"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")
    assert not caplog.records


def test_a_running_server_counts_what_torch_keeps_and_frees_nothing(gpu, monkeypatch):
    def never() -> None:
        raise AssertionError("a graph may be under capture")

    segments = [
        {"device": d, "segment_pool_id": pool, "total_size": 100, "active_size": used}
        for d, pool, used in [(0, (0, 0), 30), (0, (0, 0), 100), (1, (0, 0), 0), (0, (0, 1), 0)]
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "empty_cache", never)
    assert spare_bytes(torch.device("cuda", 0)) == 1070
    with pytest.raises(AssertionError):
        free_bytes(torch.device("cuda", 0))
