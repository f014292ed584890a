"""What ran the client: hardware, versions, command line. Standard library only."""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_SECRET_FLAGS = ("--api-key", "--admin-key")


def machine_facts() -> dict[str, Any]:
    """Processor, memory in bytes, system, versions; None where the system does not say."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or None,
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": _memory(),
        "load_average_1m": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "httpx": _version("httpx"),
        "fader": _version("fader"),
    }


def safe_command(argv: Sequence[str]) -> list[str]:
    """The command line with every key's value struck out."""
    safe: list[str] = []
    for word in argv:
        flag, equals, _ = word.partition("=")
        if safe and safe[-1] in _SECRET_FLAGS:
            safe.append("***")
        elif equals and flag in _SECRET_FLAGS:
            safe.append(f"{flag}=***")
        else:
            safe.append(word)
    return safe


def _field(path: str, name: str) -> str | None:
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _memory() -> int | None:
    total = _field("/proc/meminfo", "MemTotal")
    return int(total.split()[0]) * 1024 if total else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
