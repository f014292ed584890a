"""The choices by shape and machine: exhaustive where small, properties where not."""

import inspect

import pytest
import torch

pytest.importorskip("triton", reason="the configurations name Triton's kernels")

from fader_adapters.kernels.cuda import machines, nf4
from fader_adapters.kernels.cuda import nf4_configs as configs

LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def test_splits_cover_every_block_once_and_come_in_the_compiled_numbers() -> None:
    compiled = {e.constexprs["SPLITS"] for e in configs.shipped() if "SPLITS" in e.constexprs} | {1}
    assert 1 + configs.MOST_SPLITS not in compiled
    for arch in configs.MULTIPROCESSORS:
        for n in (1, 127, 128, 129, 1024, 4096, 6144, 14336, 28672, 151936):
            for blocks in range(1, 300):
                each = configs.split_blocks(arch, n, blocks * 64)
                splits = -(-blocks // each)
                assert splits in compiled
                assert (splits - 1) * each < blocks <= splits * each
                assert splits == 1 or each >= configs.LEAST_SPLIT_BLOCKS


def test_narrow_weights_are_split_and_wide_ones_are_not() -> None:
    splits = [-(-k // 64 // configs.split_blocks(90, n, k)) for n, k in LLAMA_8B]
    assert splits == [8, 8, 1, 8]


def test_no_other_number_of_splits_leaves_the_busiest_multiprocessor_much_less_to_do() -> None:
    """But for the planes' own cost: a machine that waits for one of its parts was a third slower
    by these numbers where 48 tiles were cut in four."""
    for n, k in (*LLAMA_8B, (4608, 3584), (10240, 8192), (2048, 8192)):
        tiles = -(-n // 128)

        def work(splits: int, tiles: int = tiles) -> float:
            return max(2, -(-splits * tiles // 132)) / splits

        best = min(map(work, range(1, min(8, k // 64 // 8) + 1)))
        chosen = configs.splits(90, n, k)
        assert work(chosen) <= 1.2 * best, (n, k)
    assert work(4, 48) > 1.2 * work(8, 48)


@pytest.mark.parametrize("arch", [80, 90])
def test_each_number_of_rows_has_a_launch_that_is_compiled(arch: int) -> None:
    compiled = {
        (e.constexprs["BM"], e.num_warps, e.constexprs["STAGES"])
        for e in configs.shipped()
        if arch in e.archs and "BM" in e.constexprs
    }
    for rows in range(1, 300):
        launch = configs.launch(arch, rows)
        assert rows <= launch.bm or launch.bm == 128
        assert (launch.bm, launch.warps, launch.stages) in compiled
    assert (7, 4, 4) not in compiled


def test_shipped_signatures_name_exactly_the_arguments_of_their_kernel() -> None:
    for entry in configs.shipped():
        function = getattr(entry.kernel, "fn", entry.kernel)
        names = set(inspect.signature(function).parameters)
        assert names == set(entry.signature) | set(entry.constexprs)
        assert not set(entry.signature) & set(entry.constexprs)


def test_machines_that_were_never_compiled_for_are_left_to_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def arch_on(capability: machines.Capability) -> machines.Arch | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return nf4.checked_arch(torch.device("cuda"))

    known = {(8, 0): 80, (8, 6): 80, (8, 9): 80, (9, 0): 90, (12, 0): 80, (12, 1): 80}
    for capability, arch in known.items():
        assert arch_on(capability) == arch
        assert configs.method(arch_on(capability), 4096, 4096, 1) == "triton"
    for capability in ((7, 5), (10, 0), (11, 0)):
        assert configs.method(arch_on(capability), 4096, 4096, 1) == "bitsandbytes"


def test_other_kernels_take_the_newest_table_and_the_memory_that_there_is() -> None:
    capabilities = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]
    archs = [80, 80, 80, 80, 90, 90, 90, 90]
    assert [machines.arch_of(capability) for capability in capabilities] == archs
    small = [capability for capability in capabilities if not machines.roomy(capability)]
    assert small == [(8, 6), (8, 9), (12, 0), (12, 1)]


def test_the_method_is_one_for_all_decode_rows_and_the_scratch_beyond() -> None:
    for rows in range(1, configs.FUSED_ROWS + 1):
        assert configs.method(90, 4096, 4096, rows) == "triton"
    assert configs.FUSED_ROWS >= configs.DECODE_ROWS
    assert configs.method(90, 4096, 4096, configs.FUSED_ROWS + 1) == "scratch"


def test_the_table_overrides_the_default_for_its_shape_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(configs, "METHODS", {(90, 256, 128): "bitsandbytes"})
    assert configs.method(90, 256, 128, 1000) == "bitsandbytes"
    assert configs.method(80, 256, 128, 1) == "triton"
    assert configs.method(90, 256, 192, 1) == "triton"
