"""The paged cache's memory."""

import math
import mmap
import resource
import time

import pytest
import torch
from torch import nn

from fader_server.model.kv_cache import KVCache, LayerShape

PAGE = resource.getpagesize()
SHAPE = LayerShape(2, 64, 64)


def make(blocks: int = 2048) -> KVCache:
    """One layer of two 8 MiB tensors, 4 KiB a block, in memory that nobody has used before."""

    def fresh(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", fresh)
        place = torch.device("cpu")
        shapes = {nn.Identity(): SHAPE}
        return KVCache(shapes, blocks=blocks, block_size=16, dtype=torch.bfloat16, device=place)


def faults_of_writing(cache: KVCache, blocks: slice) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for layer in cache.layers():
        layer.k[blocks].fill_(1)
        layer.v[blocks].fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_touched_cache_is_written_without_page_faults():
    cold, warm = make(), make()
    warm.touch(60.0)
    pages = warm.nbytes // PAGE
    every = slice(1, None)
    assert faults_of_writing(warm, every) < 0.05 * pages
    assert faults_of_writing(cold, every) > 0.05 * pages or _huge(cold)


def _huge(cache: KVCache) -> bool:
    """Whether the system gives huge pages unasked, of which there are too few to count."""
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        return "[always]" in file.read()


def test_touching_ends_when_its_time_is_over_with_the_first_blocks_done(monkeypatch):
    cache, clock = make(), iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    cache.touch(0.5)
    half = slice(cache.blocks // 2, None)
    assert faults_of_writing(cache, slice(1, 256)) < 64
    assert faults_of_writing(cache, half) > 512 or _huge(cache)


def test_touching_leaves_the_null_block_zero():
    cache = make(blocks=8)
    cache.touch(60.0)
    assert all(not layer.k[0].any() and not layer.v[0].any() for layer in cache.layers())
