"""Loads the shared library and gives its functions their C types. Knows no tensors' meaning; the
one place
that reads FADER_CPU_ISA (scalar, avx2, avx512, avx512_bf16), which lets tests choose a slower
path."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch  # first: its libgomp must be the one both use

from fader_adapters.kernels.native.build import LIBRARY

ABI = 14
BUILDER = "fader_adapters.kernels.native.build"
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MESSAGES = {
    -1: "a size, pointer or dtype that the kernel does not take",
    -2: "scratch too small",
    -3: "a slot, row, block number or arena offset lies outside its table",
    -4: "this machine or build lacks that instruction set",
}
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "fader_abi": [],
    "fader_best_isa": [],
    "fader_isa": [],
    "fader_set_isa": [_I],
    "fader_repack": [_L, _L, _P, _P, _P, _P, _I],
    "fader_panels_dense": [_L, _L, _P, _P, _P, _I, _I],
    "fader_pack": [_L, _L, _P, _I, _P, _I],
    "fader_screen_pack": [_L, _L, _P, _I, _P, _P, _I],
    "fader_panel_rows": [_L, _L, _P, _I, _P, _L, _P],
    "fader_quantise": [_L, _P, _I, _P, _P, _I],
    "fader_quantise_keeping": [_L, _L, _P, _P, _L, _F, _P, _P, _I],
    "fader_dequantise": [_L, _P, _P, _P, _I, _I],
    "fader_quantise8": [_L, _P, _F, _P, _P, _P, _I],
    "fader_dequantise8": [_L, _P, _P, _P, _F, _P, _I],
    "fader_plan_build": [_L, _L, _P, _P, _P, _P, ctypes.c_int32, _P, _L],
    "fader_site": [_P, _P, _L, _P, _I, _L, _P, _I, _L, _P, _L, _P, _I],
    "fader_lookup": [_P, _P, _L, _P, _P, _I, _L, _P, _L, _P, _I],
    "fader_experts": [_P, _L, _P, _P, _I, _L, _P, _I, _L, _P, _L, _P, _I],
    "fader_rms_norm": [_L, _L, _P, _L, _P, _I, _I, _F, _P, _I],
    "fader_gated_norm": [_L, _L, _L, _P, _I, _L, _P, _I, _L, _P, _I, _F, _P, _I],
    "fader_conv": [_P, _L, _L, _P, _P, _L, _P, _I],
    "fader_scan": [_P, _L, _L, _P, _P, _I, _L, _P, _P, _I, _I],
    "fader_selective": [_P, _L, _L, _P, _P, _I, _L, _P, _P, _L, _P, _I],
    "fader_largest": [_P, _L, _P, _P, _P, _L, _P, _I],
    "fader_draw": [_P, _P, _L, _P, _L, _P, _I],
    "fader_score": [_P, _P, _L, _P, _L, _P, _I],
    "fader_map": [_P],
    "fader_run": [_P, _L, _P, _P, _P, _L, _P, _I],
    "fader_attention": [_P, _L, _L, _P, _P, _P, _P, _P, _P, _L, _P, _I],
    "fader_write_kv": [_P, _L, _P, _L, _P, _L, _P, _I],
}


class SiteStruct(ctypes.Structure):
    """fader_site_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _P) for name in ("panels", "scales", "bias")],
        *[("n", _L), ("k", _L), ("arena", _P), ("arena_count", _L)],
        *[
            (name, _P)
            for name in ("a_off", "b_off", "gain_off", "bias_off", "rank", "scale", "cols")
        ],
        ("table_stride", _L),
        *[(name, ctypes.c_int32) for name in ("members", "slots", "arena_dtype", "weights")],
        ("screen", _P),
    ]


class WantedStruct(ctypes.Structure):
    """fader_wanted_t of csrc/fader.h, field for field."""

    _fields_ = [
        ("key", _L),
        *[(name, ctypes.c_int32) for name in ("keep", "race")],
        *[(name, _F) for name in ("heat", "reach")],
        *[("top_p", ctypes.c_double), ("least", _L)],
    ]


class ScreenStruct(ctypes.Structure):
    """fader_screen_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _P) for name in ("codes", "scales")],
        ("rows", ctypes.POINTER(WantedStruct)),
        *[(name, _L) for name in ("count", "computed")],
    ]


class ExpertsStruct(ctypes.Structure):
    """fader_experts_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _P) for name in ("panels", "scales", "bias")],
        *[(name, _L) for name in ("n", "k", "experts")],
        ("weights", ctypes.c_int32),
    ]


class RowsStruct(ctypes.Structure):
    """fader_rows_t of csrc/fader.h, field for field."""

    _fields_ = [(name, _P) for name in ("start", "came_from", "to")]


class ConvStruct(ctypes.Structure):
    """fader_conv_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _P) for name in ("states", "weight", "bias")],
        *[(name, _L) for name in ("slots", "channels", "taps")],
        *[(name, ctypes.c_int32) for name in ("dtype", "silu")],
    ]


class ScanStruct(ctypes.Structure):
    """fader_scan_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _P) for name in ("states", "skip")],
        *[(name, _L) for name in ("slots", "groups", "heads", "keys", "values", "q", "k", "v")],
        *[(name, ctypes.c_int32) for name in ("delta", "unit", "by_key", "pad")],
    ]


class SelectiveStruct(ctypes.Structure):
    """fader_selective_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _P) for name in ("states", "decay", "bias", "skip")],
        *[(name, _L) for name in ("slots", "channels", "keys")],
        *[(name, ctypes.c_int32) for name in ("softplus", "pad")],
    ]


class AttentionStruct(ctypes.Structure):
    """fader_attn_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _P) for name in ("k_cache", "v_cache", "sinks")],
        *[
            (name, _L)
            for name in (
                *("blocks", "block_size", "kv_heads", "heads"),
                *("dim", "value_dim", "max_blocks", "window"),
            )
        ],
        *[("scale", _F), ("softcap", _F), ("dtype", ctypes.c_int32), ("pad", ctypes.c_int32)],
    ]


class LogitsStruct(ctypes.Structure):
    """fader_logits_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _P) for name in ("x", "index")],
        *[(name, _L) for name in ("rows", "n", "stride")],
        *[(name, ctypes.c_int32) for name in ("dtype", "pad")],
    ]


class DrawStruct(ctypes.Structure):
    """fader_draw_t of csrc/fader.h, field for field."""

    _fields_ = [(name, _P) for name in ("heat", "top_k", "top_p", "min_p", "key", "tokens")]


class ScoresStruct(ctypes.Structure):
    """fader_scores_t of csrc/fader.h, field for field."""

    _fields_ = [("tokens", _P), ("out", _P), ("top", _L)]


def _open(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    for name, types in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes = types
        function.restype = _I
    for name, types in (("fader_probe_read", [_P, _L, _I]), ("fader_probe_dot", [_L, _I])):
        getattr(lib, name).argtypes = types
        getattr(lib, name).restype = ctypes.c_double
    lib.fader_advise_huge.argtypes = [_P, _L]
    lib.fader_advise_huge.restype = None
    lib.fader_plan_words.argtypes = [_L, _L, _L]
    lib.fader_plan_words.restype = _L
    if lib.fader_abi() != ABI:
        raise OSError(f"{path} has ABI {lib.fader_abi()}, this package needs {ABI}: build it again")
    return lib


@cache
def _attempt() -> tuple[ctypes.CDLL | None, str]:
    path = Path(__file__).resolve().parent / LIBRARY
    if not path.exists():
        return (
            None,
            f"{LIBRARY} was not built: run `python -m {BUILDER}` (needs g++)",
        )
    try:
        lib = _open(path)
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}"
    wanted = os.environ.get("FADER_CPU_ISA")
    if wanted:
        if wanted not in LEVELS:
            return None, f"FADER_CPU_ISA must be one of {', '.join(LEVELS)}, got {wanted!r}"
        if lib.fader_set_isa(LEVELS.index(wanted)):
            return None, f"FADER_CPU_ISA={wanted}: {MESSAGES[-4]}"
    return lib, ""


def available() -> bool:
    """Whether the library is built and loads on this machine."""
    return _attempt()[0] is not None


def reason() -> str:
    """Why `available()` is False, with what to do; empty when it is True."""
    return _attempt()[1]


def library() -> ctypes.CDLL:
    """The loaded library. Raises: RuntimeError with `reason()` when there is none."""
    lib, why = _attempt()
    if lib is None:
        raise RuntimeError(why)
    return lib


def isa() -> str:
    """Name of the instruction set in use."""
    return LEVELS[library().fader_isa()]


def best_isa() -> str:
    """Name of the best instruction set of this machine."""
    return LEVELS[library().fader_best_isa()]


def set_isa(level: str | None) -> None:
    """Use `level` from now on; None picks the best. Raises: ValueError if unknown or not on this
    machine."""
    if level is not None and level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    if library().fader_set_isa(-1 if level is None else LEVELS.index(level)):
        raise ValueError(f"level {level}: {MESSAGES[-4]} (best is {best_isa()})")


def check(code: int, what: str) -> None:
    """Raise ValueError for a failed call of `what`."""
    if code:
        raise ValueError(f"{what}: {MESSAGES.get(code, f'status {code}')}")
