"""The kinds of values a setting may have: one reader each, from text or TOML, checked.

Every reader raises ValueError saying what it expects. Knows no setting by name.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fader_adapters.spec import ADAPTER_NAME, LOCAL_PROTOCOLS, NESTED_NAME, URL_PREFIX

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,255}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB|K|M|G|T)?", re.IGNORECASE)
_BINARY = {"": 0, "B": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SWITCH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

MANY_THREADS = 64
"""Always allowed; four times the cores of the machine, where that is more."""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter to load at start: NAME=SOURCE."""

    name: str
    source: str


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected text that is not empty")
    return value


def path(value: object) -> Path:
    return Path(text(value)).expanduser()


def key(value: object) -> str:
    """A secret. Never repeated in a message."""
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]{1,512}", value):
        raise ValueError("expected a key of 1 to 512 visible ASCII characters")
    return value


def model_name(value: object) -> str:
    if not isinstance(value, str) or not _MODEL_NAME.fullmatch(value):
        raise ValueError("expected a name of letters, digits and . _ / - (256 at most)")
    return value


def adapter_source(value: object) -> AdapterSource:
    name, equals, source = value.partition("=") if isinstance(value, str) else ("", "", "")
    if not equals or not source.strip() or not ADAPTER_NAME.fullmatch(name):
        raise ValueError(
            "expected NAME=SOURCE with a name of letters, digits and . _ - (128 at most)"
        )
    return AdapterSource(name, source)


@dataclass(frozen=True, slots=True)
class BlendTerm:
    """One adapter of a blend in a setting: NAME or NAME=WEIGHT."""

    name: str
    weight: float


AUTO = "auto"


def blend(value: object) -> tuple[BlendTerm, ...] | Literal["auto"]:
    """`tone=0.7,domain=-0.2`, a single name, or `auto`."""
    if value == AUTO:
        return AUTO
    wanted = "expected NAME=WEIGHT with commas between, a name, or auto"
    parts = value.split(",") if isinstance(value, str) else []
    terms = []
    for part in parts:
        name, equals, weight = part.strip().partition("=")
        base_name = name.partition("@")[0]
        if not (ADAPTER_NAME.fullmatch(base_name) or NESTED_NAME.fullmatch(base_name)):
            raise ValueError(wanted)
        try:
            terms.append(BlendTerm(name, float(weight) if equals else 1.0))
        except ValueError:
            raise ValueError(wanted) from None
    if not terms:
        raise ValueError(wanted)
    return tuple(terms)


def hub_glob(value: object) -> str:
    """An organisation or a repository of the Hub, with * and ?."""
    if not isinstance(value, str) or not re.fullmatch(r"[\w.*?-]{1,96}(/[\w.*?-]{1,96})?", value):
        raise ValueError("expected an organisation or org/name of the Hub, * and ? allowed")
    return value


def url_prefix(value: object) -> str:
    """Always ends in a slash, so that a sibling of the last folder is outside."""
    prefix = value if isinstance(value, str) else ""
    prefix = prefix if prefix.endswith("/") else prefix + "/"
    match = URL_PREFIX.fullmatch(prefix)
    if match is None or match[1] in LOCAL_PROTOCOLS:
        raise ValueError("expected a URL prefix like s3://bucket/folder/; folders: --adapter-dir")
    return prefix


def origin(value: object) -> str:
    """As browsers send it: no path, no slash at the end, in lower case."""
    found = value.strip().lower() if isinstance(value, str) else ""
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", found):
        raise ValueError("expected an origin like https://app.example.com:8443, no path, or *")
    return found


def http_url(value: object) -> str:
    """The address of a server: without a slash or /v1 at its end."""
    found = value.strip().rstrip("/").removesuffix("/v1") if isinstance(value, str) else ""
    if not re.fullmatch(r"https?://[A-Za-z0-9.\-_\[\]:]+(/[\w./~%-]*)?", found):
        raise ValueError("expected an address like http://127.0.0.1:8000")
    return found


def otlp_url(value: object) -> str:
    """The whole address that takes spans."""
    found = value.strip() if isinstance(value, str) else ""
    if not re.fullmatch(r"https?://[A-Za-z0-9.\-_\[\]:]+/[\w./~%-]+", found):
        raise ValueError("expected an address like http://127.0.0.1:4318/v1/traces")
    return found


def json_object(value: object) -> dict[str, Any]:
    """From text, or a table of TOML."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise ValueError('expected a JSON object like {"enable_thinking": false}')
    return value


def integer(value: object, *, low: int, high: int | None = None) -> int:
    wanted = f"expected a whole number from {low}" + ("" if high is None else f" to {high}")
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip()):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(wanted)
    if value < low or (high is not None and value > high):
        raise ValueError(wanted)
    return value


def threads(value: object) -> int:
    """CPU threads: far more than there are cores do not start, or only wait for each other."""
    return integer(value, low=1, high=max(MANY_THREADS, 4 * (os.cpu_count() or 1)))


def number(value: object, *, low: float, high: float = sys.float_info.max) -> float:
    wanted = f"expected a number from {low:g}"
    if high < sys.float_info.max:
        wanted += f" to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(wanted)
    try:
        result = float(value)
    except ValueError:
        raise ValueError(wanted) from None
    if not low <= result <= high:
        raise ValueError(wanted)
    return result


def size(value: object) -> int:
    """Bytes from 512MiB, 1.5G, 1GB or a plain number. K, M, G and T are powers of 1024."""
    match = _SIZE.fullmatch(str(value).strip()) if isinstance(value, str | int) else None
    if match is None or isinstance(value, bool):
        raise ValueError("expected a size like 512MiB or 2GiB")
    unit = (match[2] or "").upper()
    scale = 1000 if unit.endswith("B") and len(unit) == 2 else 1024
    result = int(float(match[1]) * scale ** _BINARY[unit[:1]])
    if result < 1:
        raise ValueError("expected a size above zero, like 512MiB")
    return result


def switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _SWITCH:
        return _SWITCH[value.lower()]
    raise ValueError("expected true or false")


@dataclass(frozen=True, slots=True)
class OneOf:
    """Reads one of a few words."""

    choices: tuple[str, ...]

    def __call__(self, value: object) -> str:
        if value not in self.choices:
            raise ValueError(f"expected one of {', '.join(self.choices)}")
        return str(value)


def one_of(*choices: str) -> OneOf:
    return OneOf(choices)


def spelled_size(size: int) -> str:
    """As `size` reads it: 10GiB."""
    units = ("", "KiB", "MiB", "GiB", "TiB")
    power = next(p for p in range(4, -1, -1) if size % 1024**p == 0)
    return f"{size >> 10 * power}{units[power]}"
