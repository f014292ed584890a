"""The choices by shape and machine: exhaustive where small, properties where not."""

import inspect

import pytest

pytest.importorskip("triton", reason="the configurations name Triton's kernels")

from fader_adapters.kernels.cuda import nf4_configs as configs

LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def test_splits_cover_every_block_once_and_come_in_the_compiled_numbers() -> None:
    for arch in configs.MULTIPROCESSORS:
        for n in (1, 127, 128, 129, 1024, 4096, 6144, 14336, 28672, 151936):
            for blocks in range(1, 300):
                each = configs.split_blocks(arch, n, blocks * 64)
                splits = -(-blocks // each)
                assert splits in (1, 2, 4, 8)
                assert (splits - 1) * each < blocks <= splits * each
                assert splits == 1 or each >= configs.LEAST_SPLIT_BLOCKS


def test_narrow_weights_are_split_and_wide_ones_are_not() -> None:
    splits = [-(-k // 64 // configs.split_blocks(90, n, k)) for n, k in LLAMA_8B]
    assert splits == [4, 8, 1, 8]


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


def test_machines_that_were_never_compiled_for_are_left_to_bitsandbytes() -> None:
    known = {(8, 0): 80, (8, 6): 80, (8, 9): 80, (9, 0): 90}
    for capability, arch in known.items():
        assert configs.family(capability) == arch
        assert configs.method(arch, 4096, 4096, 1) == "triton"
    for capability in ((7, 5), (10, 0), (12, 0)):
        assert configs.method(configs.family(capability), 4096, 4096, 1) == "bitsandbytes"


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
