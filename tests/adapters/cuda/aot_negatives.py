"""Kernels and configurations that must not ship, to show that the checks see what they look for."""

import triton
import triton.language as tl

from fader_adapters.kernels.cuda import nf4_configs as configs
from fader_adapters.kernels.cuda import nf4_kernels as kernels
from fader_adapters.kernels.cuda.shipped import Shipped

TABLE = tl.constexpr(16)


@triton.jit
def _select(nibble):
    """A code by a tree of selects."""
    b3, b2, b1, b0 = (nibble & 8) != 0, (nibble & 4) != 0, (nibble & 2) != 0, (nibble & 1) != 0
    high = tl.where(
        b2,
        tl.where(b1, tl.where(b0, 1.0, 0.72295684), tl.where(b0, 0.5626170, 0.44070983)),
        tl.where(b1, tl.where(b0, 0.33791524, 0.2461123), tl.where(b0, 0.1609302, 0.0795803)),
    )
    low = tl.where(
        b2,
        tl.where(b1, tl.where(b0, 0.0, -0.09105003), tl.where(b0, -0.18477343, -0.28444138)),
        tl.where(b1, tl.where(b0, -0.3949175, -0.52507305), tl.where(b0, -0.6961928, -1.0)),
    )
    return tl.where(b3, high, low).to(tl.bfloat16)


@triton.jit
def select_tree(
    x_ptr, codes_ptr, scales_ptr, out_ptr, n, blocks, BM: tl.constexpr, BN: tl.constexpr
):
    """nf4_gemm with a select tree, and with a loop that leaves the scales unpipelined."""
    column = tl.program_id(0) * BN
    byte = tl.arange(0, 32)
    row = tl.arange(0, BN)
    token = tl.arange(0, BM)
    code_at = codes_ptr + column * blocks * 32 + row[:, None] * 32 + byte[None, :]
    scale_at = scales_ptr + column * blocks + row
    x_at = x_ptr + token[:, None] * (blocks * 64) + byte[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(blocks):
        packed = tl.load(code_at)
        part = tl.dot(_select(packed >> 4), tl.trans(tl.load(x_at)))
        part = tl.dot(_select(packed & 15), tl.trans(tl.load(x_at + 32)), part)
        acc += part * tl.load(scale_at)[:, None]
        code_at += BN * 32
        scale_at += BN
        x_at += 64
    tl.store(out_ptr + token[None, :] * n + (column + row)[:, None], acc)


@triton.jit
def followed(q_ptr, k_ptr, table, out_ptr, keys, N: tl.constexpr, DIM: tl.constexpr):
    """A product with blocks of keys whose numbers are read in the turn that wants them."""
    row, dim = tl.arange(0, N), tl.arange(0, DIM)
    q = tl.load(q_ptr + row[:, None] * DIM + dim[None, :])
    acc = tl.zeros((N, N), tl.float32)
    for start in tl.range(0, keys, N):
        block = tl.load(table + (start + row) // 16)
        place = block.to(tl.int64) * 16 + row % 16
        k = tl.load(k_ptr + place[None, :] * DIM + dim[:, None])
        acc += tl.dot(q, k)
    tl.store(out_ptr + row[:, None] * N + row[None, :], acc)


def shipped() -> list[Shipped]:
    """A select tree, a tile that spills, a pipeline that does not fit, an argument left out, a
    table that is followed turn by turn."""
    gemm = next(e for e in configs.shipped() if e.kernel is kernels.nf4_gemm)
    tree = {
        "x_ptr": "*bf16",
        "codes_ptr": "*u8",
        "scales_ptr": "*fp32",
        "out_ptr": "*fp32",
        "n": "i32:16",
        "blocks": "i32:16",
    }
    spilling = configs.Launch(256, 64, 4, 2)
    too_big = configs.Launch(128, 128, 8, 14)
    found = [Shipped(select_tree, tree, {"BM": 16, "BN": 128}, 4, 4)]
    for launch in (spilling, too_big):
        constants = configs.gemm_constants(launch, bias=False, exact=False)
        sizes = (launch.warps, launch.stages)
        found.append(Shipped(kernels.nf4_gemm, gemm.signature, constants, *sizes))
    incomplete = {k: v for k, v in tree.items() if k != "blocks"}
    found.append(Shipped(select_tree, incomplete, {"BM": 32, "BN": 128}, 4, 4))
    pointers = {"q_ptr": "*bf16", "k_ptr": "*bf16", "table": "*i32", "out_ptr": "*fp32"}
    found.append(Shipped(followed, pointers | {"keys": "i32"}, {"N": 64, "DIM": 128}, 4, 4))
    return found
