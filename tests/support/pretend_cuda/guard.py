"""Builds and loads guard.cpp, once a process; the library is kept for the next one."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")


@cache
def register() -> None:
    """Give torch a device guard for CUDA that does nothing. It stays for the process's life."""
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL(str(_library()))


def obstacle() -> str:
    """Why it cannot be built; empty when it can."""
    if torch.version.cuda is not None:
        return "this torch was built for CUDA and has a device guard of its own"
    return "" if shutil.which("g++") else "g++ is not installed"


def _library() -> Path:
    told = f"{SOURCE.read_text()}{torch.__version__}{torch.__file__}"
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fader-pretend-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to somebody else"
    library = folder / f"guard-{key}.so"
    if not library.exists():
        root = Path(torch.__file__).parent
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O1", f"-I{root / 'include'}"]
        command += [str(SOURCE), f"-L{root / 'lib'}", "-lc10", "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        made.replace(library)
    return library
