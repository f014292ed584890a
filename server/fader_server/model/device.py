"""Where and in what numbers a base computes, and how much memory is free there."""

import os
from typing import Literal

import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.backend import Backend
from fader_adapters.kernels.cpu import NativeBackend
from fader_server.errors import ConfigInvalid

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises ConfigInvalid when CUDA is asked for and not there, or too old."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigInvalid("--device cuda: torch finds no CUDA device; use --device cpu")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise ConfigInvalid(
            f"--device cuda: compute capability {major}.{minor} is below 8.0; use --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


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
    """Use this many threads for CPU work; by default one core is left to the event loop.

    Beside the native kernels' own threads torch keeps one: two pools would spin on the same cores.
    """
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) - 1)
    own = isinstance(backend, NativeBackend)
    native.set_threads(threads if own else None)
    torch.set_num_threads(1 if own else threads)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now, without swap."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
