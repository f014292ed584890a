"""The launches of experts in NF4: tiles for any routing, and none that is not shipped."""

import pytest
import torch

pytest.importorskip("triton", reason="the configurations name Triton's kernels")

from fader_adapters.kernels.cuda import nf4_expert_configs as configs


def test_the_grid_holds_the_tiles_of_any_routing_and_few_more() -> None:
    generator = torch.Generator().manual_seed(0)
    for experts in (1, 2, 8, 60, 128):
        for pairs in (1, 2, 7, 8, 64, 500):
            for bm in (16, 128):
                most = configs.most_tiles(pairs, experts, bm)
                needed = 0
                for spread in range(1, experts + 1, 5):
                    at = torch.randint(0, spread, (pairs,), generator=generator)
                    counts = torch.bincount(at, minlength=experts)
                    needed = max(needed, int((-(-counts // bm)).sum()))
                assert needed <= most <= pairs
                worst = min(pairs, experts)  # one pair beyond whole tiles, of each that it can
                assert most <= worst + (pairs - worst) // bm + 1


@pytest.mark.parametrize("arch", [80, 90])
def test_every_launch_is_shipped(arch: int) -> None:
    listed = {
        (e.constexprs["BM"], e.constexprs["BN"], e.constexprs["STAGES"], e.num_warps)
        for e in configs.shipped()
        if arch in e.archs and not e.constexprs["EXACT"]
    }
    for experts, n in ((128, 1536), (128, 2048), (8, 28672), (32, 5760), (60, 1408)):
        for pairs in (1, 8, 32, 64, 256, 1000, 8192, 1 << 20):
            config = configs.launch(arch, pairs, experts, n)
            assert (config.bm, config.bn, config.stages, config.warps) in listed
    assert configs.launch(arch, 8, 128, 1536).bn == 64
    assert configs.launch(arch, 256, 128, 1536).bn == 128
    assert configs.launch(arch, 8192, 128, 1536).bm == 128
