"""The kernels' own threads: results never depend on them, callers never wait for each other."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fader_adapters.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.fixture
def counted():
    yield native.set_threads
    native.set_threads(None)


def test_a_count_is_used_until_torch_is_followed_again(counted):
    counted(5)
    assert native.threads() == 5
    counted(None)
    assert native.threads() == torch.get_num_threads()
    with pytest.raises(ValueError, match="positive"):
        counted(0)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_threads_gives_the_same_bits(counted, count):
    weight, x = native.PlainPanels.pack(torch.randn(3000, 128)), torch.randn(5, 128)
    counted(1)
    alone = native.gemm(x, weight)
    counted(count)
    for _ in range(50):
        assert torch.equal(native.gemm(x, weight), alone)
    assert not torch.equal(native.gemm(x + 1, weight), alone)


def test_callers_on_several_threads_do_not_disturb_each_other(counted):
    counted(3)
    weight = native.PlainPanels.pack(torch.randn(3000, 128))
    inputs = [torch.randn(4, 128) for _ in range(8)]
    expected = [native.gemm(x, weight) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            got = list(pool.map(lambda x: native.gemm(x, weight), inputs))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_forked_child_hires_threads_of_its_own(counted):
    counted(2)
    weight, x = native.PlainPanels.pack(torch.randn(3000, 128)), torch.randn(5, 128)
    expected = native.gemm(x, weight)
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads, which is the case at hand
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native.gemm(x, weight), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
