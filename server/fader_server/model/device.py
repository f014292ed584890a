"""Where and in what numbers a base computes, and how much memory is free there."""

import logging
import os
from typing import Literal

import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.backend import Backend
from fader_adapters.kernels.cpu import NativeBackend
from fader_server.errors import ConfigInvalid

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHARED = (0, 0)
"""The pool of memory that belongs to no graph."""


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` is the GPU where one can be used. Raises ConfigInvalid when `cuda` cannot be had."""
    if name == "cpu":
        return torch.device("cpu")
    obstacle = _cuda_obstacle()
    if not obstacle:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise ConfigInvalid(f"--device cuda: {obstacle}; use --device cpu")
    if torch.cuda.is_available():
        log.warning("running on the CPU: %s", obstacle)
    return torch.device("cpu")


def _cuda_obstacle() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    return ""


def choose_dtype(
    name: Literal["auto", "bfloat16", "float16", "float32"], device: torch.device
) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if native.available() and _multiplies_bf16() else torch.float32


def _multiplies_bf16() -> bool:
    return native.best_isa() == "avx512_bf16"


def set_threads(threads: int | None, backend: Backend) -> None:
    """Use this many threads for CPU work.

    By default as many native ones as there are cores: they share work out piece by piece, so that
    one that makes room for the event loop delays only its piece. torch's wait for each other, and
    leave one core to the event loop. Beside native ones torch keeps one: two pools would spin on
    the same cores.
    """
    own = isinstance(backend, NativeBackend)
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) - (not own))
    native.set_threads(threads if own else None)
    torch.set_num_threads(1 if own else threads)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now, without swap."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps without using it can be had too
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def spare_bytes(device: torch.device) -> int:
    """The same on any thread of a running server: torch frees nothing while a graph is captured,
    so what it keeps is counted instead."""
    if device.type != "cuda":
        return free_bytes(device)
    return torch.cuda.mem_get_info(device)[0] + sum(
        segment["total_size"] - segment["active_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device.index and tuple(segment["segment_pool_id"]) == _SHARED
    )
