"""Who may call and what is theirs: keys, the adapters they see, and their part of the machine.

Keeps the sha256 of keys, never the keys, and repeats none in an error.
"""

import difflib
import hashlib
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from fader_adapters.spec import ADAPTER_NAME
from fader_server import settings as kinds
from fader_server.config import ServeConfig
from fader_server.errors import ConfigInvalid

MAX_BYTES = 1 << 20
"""Of the file."""

MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3

Item = TypeVar("Item")

_HASHED = "sha256:"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_GLOB = re.compile(r"[A-Za-z0-9._/*?!\[\]-]{1,256}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer of the server, by one key or several."""

    name: str
    """In logs and metrics."""
    keys: tuple[bytes, ...] = field(repr=False)
    """sha256 digests."""
    adapters: tuple[str, ...] = ("*",)
    """Globs of the names of adapters and recipes that exist for it. The base does for everybody."""
    weight: float = 1.0
    """Of the tokens that are computed, and of the turns for adapters' room, while others wait."""
    max_share: float = 1.0
    """Of the rows, of the blocks for keys and values and of the adapters' memory that its running
    requests may have at a time; one request may always run."""
    max_waiting: int | None = None
    """Queued requests before 429, with those that wait for room for their adapters; None: as many
    as the server's own queue holds."""
    requests_per_minute: int | None = None
    """Calls that generate."""
    tokens_per_minute: int | None = None
    """Prompts' and drawn ones, cached ones too; a call counts with all that it may come to until
    it ends."""
    max_tokens: int | None = None
    """Of one answer."""

    def sees(self, name: str) -> bool:
        """An adapter or a recipe of this name exists for it, when there is one."""
        return any(fnmatchcase(name, glob) for glob in self.adapters)


def digest_of(key: str) -> bytes:
    """What is kept of a key: its sha256."""
    return hashlib.sha256(key.encode()).digest()


def tenants_of(config: ServeConfig) -> tuple[Tenant, ...]:
    """Those of the --tenants file; none without one. Raises ConfigInvalid."""
    if config.tenants is None:
        return ()
    admin = () if config.admin_key is None else (config.admin_key,)
    return read_tenants(config.tenants, taken=(*config.api_key, *admin))


def read_tenants(path: Path, *, taken: Iterable[str] = ()) -> tuple[Tenant, ...]:
    """The tenants of a TOML file, one table each; its keys are the fields of Tenant.

    `taken`: keys that are somebody else's. A key is plain or `sha256:` and 64 hexadecimal digits.
    Raises ConfigInvalid in one line: the file, the tenant, the field and what is expected of it.
    """
    try:
        return _read(_read_toml(path), [digest_of(key) for key in taken])
    except ValueError as error:
        raise ConfigInvalid(f"--tenants {path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("is not a regular file; give a file to read")
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{error.strerror or 'cannot be read'}; give a file to read") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"expected a file of at most {MAX_BYTES} bytes")
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError:
        raise ValueError("not TOML: expected UTF-8") from None
    except RecursionError:
        raise ValueError("not TOML: nested too deep") from None
    except ValueError as error:  # its own words may quote the file
        place = re.search(r"\(at ([a-z0-9, ]+)\)$", str(error))
        where = place[1] if place else "a number with too many digits"
        raise ValueError(f"not TOML: look at {where}") from None


def _open_at_once(path: str, flags: int) -> int:
    """A FIFO has nobody to wait for."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _read(tables: Mapping[str, Any], taken: Iterable[bytes]) -> tuple[Tenant, ...]:
    if not tables:
        raise ValueError("names no tenant; write one as [name] and its keys below")
    owners = dict.fromkeys(taken, "--api-key or --admin-key has")
    found: list[Tenant] = []
    for number, (name, table) in enumerate(tables.items(), 1):
        if not isinstance(table, dict):  # a mistake here may have put a key in the name's place
            raise ValueError(f"entry {number} is no table; write a tenant as [name]")
        if not ADAPTER_NAME.fullmatch(name):
            raise ValueError(
                f"tenant {number}: expected a name of letters, digits and . _ - (128 at most)"
            )
        try:
            tenant = _tenant(name, table)
            _check_own(tenant, owners)
        except ValueError as error:
            raise ValueError(f"tenant {name}: {error}") from None
        owners |= dict.fromkeys(tenant.keys, f"tenant {name} has")
        found.append(tenant)
    return tuple(found)


def _tenant(name: str, table: Mapping[str, Any]) -> Tenant:
    for stranger in table.keys() - _READERS.keys():
        _refuse(stranger, table[stranger])
    if "keys" not in table:
        raise ValueError("keys: expected a list of keys; a tenant needs one at least")
    values: dict[str, Any] = {}
    for known, read in _READERS.items():
        if known in table:
            try:
                values[known] = read(table[known])
            except ValueError as error:
                raise ValueError(f"{known}: {error}") from None
    return Tenant(name, **values)


def _refuse(stranger: str, value: object) -> None:
    """A field that is none is not named unless it looks like one: it may be a key."""
    near = difflib.get_close_matches(stranger, _READERS, n=1, cutoff=0.75)
    if near:
        raise ValueError(f"unknown field {stranger}; did you mean {near[0]}?")
    if isinstance(value, dict):
        raise ValueError('has a table within; quote a name with dots in it: ["a.b"]')
    raise ValueError(f"has an unknown field; it takes {', '.join(_READERS)}")


def _check_own(tenant: Tenant, owners: Mapping[bytes, str]) -> None:
    for number, key in enumerate(tenant.keys, 1):
        if key in owners:
            raise ValueError(f"keys: {owners[key]} item {number} too; a key has one owner")
        if key in tenant.keys[: number - 1]:
            raise ValueError(f"keys: item {number} stands there twice; leave one out")


def _keys(value: object) -> tuple[bytes, ...]:
    return _items(value, _key)


def _key(value: object) -> bytes:
    key = kinds.key(value)
    if not key.startswith(_HASHED):
        return digest_of(key)
    digits = key.removeprefix(_HASHED)
    if not _DIGEST.fullmatch(digits):
        raise ValueError("expected sha256: and 64 hexadecimal digits")
    return bytes.fromhex(digits)


def _globs(value: object) -> tuple[str, ...]:
    return _items(value, _glob)


def _glob(value: object) -> str:
    if not isinstance(value, str) or not _GLOB.fullmatch(value):
        raise ValueError(
            "expected a name of adapters or recipes, with * ? and [a-z], without a version"
        )
    return value


def _items(value: object, read: Callable[[object], Item]) -> tuple[Item, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list that is not empty")
    found = []
    for number, item in enumerate(value, 1):
        try:
            found.append(read(item))
        except ValueError as error:
            raise ValueError(f"item {number}: {error}") from None
    return tuple(found)


def _weight(value: object) -> float:
    weight = _number(value)
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise ValueError(f"expected a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight


def _share(value: object) -> float:
    share = _number(value)
    if not 0 < share <= 1:
        raise ValueError("expected a number above 0, 1 at most")
    return share


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("expected a whole number from 1")
    return value


_READERS = {
    "keys": _keys,
    "adapters": _globs,
    "weight": _weight,
    "max_share": _share,
    "max_waiting": _count,
    "requests_per_minute": _count,
    "tokens_per_minute": _count,
    "max_tokens": _count,
}
