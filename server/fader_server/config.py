"""Every setting of `fader serve`, defined once for flag, FADER_ variable and TOML key.

The only place that reads the environment. Knows nothing about models, engines or HTTP.
"""

import dataclasses
import difflib
import ipaddress
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fader_server import settings as kinds
from fader_server.errors import ConfigInvalid
from fader_server.settings import AdapterSource, BlendTerm

PREFIX = "FADER_"
MIN_CHUNK = 16
"""Tokens of a prompt that every step must have room for beside its running rows."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How one field of ServeConfig is spelled and read."""

    name: str
    help: str
    parse: Callable[[object], Any]
    """One value, text or TOML's; raises ValueError with what it wants."""
    many: bool
    positional: bool
    switch: bool
    metavar: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


def _setting(
    default: object,
    help: str,
    *,
    parse: Callable[[object], Any],
    metavar: str = "",
    positional: bool = False,
    secret: bool = False,
) -> Any:  # noqa: ANN401 - stands for the field's own type
    spelling = {"help": help, "parse": parse, "metavar": metavar, "positional": positional}
    return dataclasses.field(default=default, repr=not secret, metadata=spelling)


_CACHE = ("fader", "adapters")
_COUNT = partial(kinds.integer, low=1)
_SECONDS = partial(kinds.number, low=0.0)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The settings of one server, checked. Bytes and seconds; None: chosen at start."""

    model: str = _setting(
        "", "base: a folder or a Hub id", parse=kinds.text, positional=True, metavar="MODEL"
    )
    served_model_name: str | None = _setting(
        None, "name of the base in the API", parse=kinds.model_name, metavar="NAME"
    )
    host: str = _setting("127.0.0.1", "address to bind", parse=kinds.text, metavar="HOST")
    port: int = _setting(
        8000, "port to bind, 0: any free", parse=partial(kinds.integer, low=0, high=65535)
    )
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", "where the base lives", parse=kinds.one_of("auto", "cpu", "cuda")
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        "auto", "compute type", parse=kinds.one_of("auto", "bfloat16", "float16", "float32")
    )
    adapter: tuple[AdapterSource, ...] = _setting(
        (),
        "adapter to load at start (repeatable)",
        parse=kinds.adapter_source,
        metavar="NAME=SOURCE",
    )
    adapter_dir: tuple[Path, ...] = _setting(
        (), "root for adapters named at run time (repeatable)", parse=kinds.path, metavar="DIR"
    )
    adapter_hub: tuple[str, ...] = _setting(
        (),
        "Hub organisation or repository that may be named at run time (repeatable, globs)",
        parse=kinds.hub_glob,
        metavar="GLOB",
    )
    adapter_url: tuple[str, ...] = _setting(
        (),
        "URL prefix that may be named at run time, as s3://bucket/folder/ (repeatable)",
        parse=kinds.url_prefix,
        metavar="URL",
    )
    cache_dir: Path | None = _setting(  # noqa: RUF009 - a field, as all others
        None, "where fetched adapters are kept", parse=kinds.path, metavar="DIR"
    )
    adapter_cache: int = _setting(
        10 << 30, "disk for fetched adapters", parse=kinds.size, metavar="SIZE"
    )
    fetch_timeout: float = _setting(600.0, "seconds to fetch one adapter", parse=_SECONDS)
    resolve_adapters: bool = _setting(
        False, "load a folder or allowed Hub id when a request names it", parse=kinds.switch
    )
    watch_adapters: bool = _setting(
        False, "load, swap and unload as folders in the roots change", parse=kinds.switch
    )
    require_sha256: bool = _setting(
        False, "refuse loads at run time that do not give a sha256", parse=kinds.switch
    )
    max_adapters: int = _setting(1024, "adapters loaded at one time", parse=_COUNT)
    merge: tuple[BlendTerm, ...] | Literal["auto"] | None = _setting(
        None,
        "blend with weights of its own, or auto: the one that most tokens are for",
        parse=kinds.blend,
        metavar="BLEND",
    )
    merge_dtype: Literal["nf4", "bf16"] = _setting(
        "nf4", "of merged weights: the base's speed, or exact", parse=kinds.one_of("nf4", "bf16")
    )
    merge_force: bool = _setting(
        False, "merge into nf4 also when it loses too much of the blend", parse=kinds.switch
    )
    merge_share: float = _setting(
        0.6, "share of tokens from which auto merges", parse=partial(kinds.number, low=0.0)
    )
    merge_seconds: float = _setting(30.0, "seconds that auto looks back", parse=_SECONDS)
    probe: Path | None = _setting(  # noqa: RUF009 - a field, as all others
        None, "text that tells what merging costs", parse=kinds.path, metavar="FILE"
    )
    arena: int | None = _setting(
        None, "device memory for adapters", parse=kinds.size, metavar="SIZE"
    )
    kv_cache: int | None = _setting(
        None, "device memory for keys and values", parse=kinds.size, metavar="SIZE"
    )
    max_model_len: int | None = _setting(None, "longest prompt + output, tokens", parse=_COUNT)
    max_batch_rows: int = _setting(64, "requests in one step", parse=_COUNT)
    max_step_tokens: int = _setting(512, "tokens in one step", parse=_COUNT)
    threads: int | None = _setting(None, "CPU threads of the engine", parse=_COUNT)
    api_key: tuple[str, ...] = _setting(
        (), "key for user routes (repeatable)", parse=kinds.key, metavar="KEY", secret=True
    )
    admin_key: str | None = _setting(
        None, "key for admin routes", parse=kinds.key, metavar="KEY", secret=True
    )
    state_dir: Path | None = _setting(  # noqa: RUF009 - a field, as all others
        None, "where adapters loaded at run time are remembered", parse=kinds.path, metavar="DIR"
    )
    insecure: bool = _setting(
        False, "allow a bind other than loopback without --api-key", parse=kinds.switch
    )
    protect_metrics: bool = _setting(False, "/metrics needs a key", parse=kinds.switch)
    max_waiting: int = _setting(1024, "queued requests before 503", parse=_COUNT)
    max_connections: int = _setting(2048, "open sockets", parse=_COUNT)
    max_body: int = _setting(1 << 20, "largest request body", parse=kinds.size, metavar="SIZE")
    max_n: int = _setting(16, "largest n of a request", parse=_COUNT)
    max_choices: int = _setting(256, "prompts times n of a request", parse=_COUNT)
    max_call_tokens: int = _setting(1 << 20, "prompts times n times max_tokens", parse=_COUNT)
    max_terms: int = _setting(
        8, "adapters in a blend", parse=partial(kinds.integer, low=1, high=64)
    )
    body_timeout: float = _setting(
        30.0, "seconds to send a request's headers or body", parse=_SECONDS
    )
    first_token_timeout: float = _setting(300.0, "seconds to the first token", parse=_SECONDS)
    request_timeout: float = _setting(1800.0, "seconds to the last token", parse=_SECONDS)
    stall_timeout: float = _setting(
        30.0, "seconds a client may leave its stream unread", parse=_SECONDS
    )
    stuck_timeout: float = _setting(
        120.0, "seconds without an engine step before /health fails", parse=_SECONDS
    )
    ping_interval: float = _setting(
        15.0, "seconds between pings of a silent stream", parse=_SECONDS
    )
    drain_grace: float = _setting(
        5.0, "seconds to keep accepting after SIGTERM, not ready", parse=_SECONDS
    )
    drain_timeout: float = _setting(
        60.0, "seconds for running requests to finish after that", parse=_SECONDS
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "least severe log line", parse=kinds.one_of("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        names = [item.name for item in self.adapter]
        for name in names:
            if names.count(name) > 1:
                raise ConfigInvalid(f"--adapter names {name} twice; give each adapter its own name")
        if self.max_step_tokens < self.max_batch_rows + MIN_CHUNK:
            raise ConfigInvalid(
                f"--max-step-tokens {self.max_step_tokens} must hold a token of each of "
                f"--max-batch-rows {self.max_batch_rows} and {MIN_CHUNK} of a prompt: "
                "raise the first or lower the second"
            )
        if not self.merge_share < 1:
            raise ConfigInvalid("--merge-share is a share of all tokens: give one below 1")
        for name, on in (
            ("--resolve-adapters", self.resolve_adapters),
            ("--watch-adapters", self.watch_adapters),
        ):
            if on and self.require_sha256:
                raise ConfigInvalid(
                    f"{name} loads what nobody gave a sha256 for, --require-sha256 refuses that: "
                    "choose one"
                )
        if not self.loopback and not self.api_key and not self.insecure:
            raise ConfigInvalid(
                f"binding {self.host} needs --api-key (or FADER_API_KEY), "
                "or --insecure to serve without one"
            )

    @property
    def loopback(self) -> bool:
        """True when only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def fetched_dir(self) -> Path:
        """Where fetched adapters are kept: --cache-dir, else with the state, else with the user."""
        if self.cache_dir is not None:
            return self.cache_dir
        if self.state_dir is not None:
            return self.state_dir / "fetched"
        return Path.home().joinpath(".cache", *_CACHE)

    @property
    def user_open(self) -> bool:
        """User routes need no key."""
        return not self.api_key

    @property
    def admin_open(self) -> bool:
        """Admin routes need no key: no key of any kind is set and the bind is loopback."""
        return self.loopback and not self.api_key and self.admin_key is None


def settings() -> Iterator[Setting]:
    """Every setting in the order of ServeConfig."""
    for item in dataclasses.fields(ServeConfig):
        yield Setting(
            name=item.name,
            help=item.metadata["help"],
            parse=item.metadata["parse"],
            many=item.default == (),
            positional=item.metadata["positional"],
            switch=isinstance(item.default, bool),
            metavar=item.metadata["metavar"] or "N",
        )


def load(flags: Mapping[str, object], env: Mapping[str, str]) -> ServeConfig:
    """Join flags, FADER_ variables and the --config file, in this order of precedence.

    `flags` maps field names to given values only, a list for a repeatable one. A repeatable
    variable is comma-separated. Raises ConfigInvalid naming the setting as its source spells it.
    """
    path = flags.get("config") or env.get(PREFIX + "CONFIG")
    table = _read_toml(Path(str(path))) if path else {}
    known = {setting.name: setting for setting in settings()}
    _refuse_unknown(table, known)
    _refuse_misspelt_variables(env, known)
    values: dict[str, Any] = {}
    for name, setting in known.items():
        if flags.get(name) is not None:
            spelled = setting.metavar if setting.positional else setting.flag
            values[name] = _parse(setting, flags[name], spelled)
        elif env.get(setting.variable, "") != "":
            raw = env[setting.variable]
            values[name] = _parse(
                setting, raw.split(",") if setting.many else raw, setting.variable
            )
        elif name in table:
            values[name] = _parse(setting, table[name], f"{path}: {name}")
    cache_home = env.get("XDG_CACHE_HOME", "")
    if "cache_dir" not in values and "state_dir" not in values and cache_home.startswith("/"):
        values["cache_dir"] = Path(cache_home, *_CACHE)
    return ServeConfig(**values)


def _parse(setting: Setting, raw: object, spelled: str) -> object:
    try:
        if setting.many:
            items = raw if isinstance(raw, list) else [raw]
            return tuple(setting.parse(item) for item in items)
        return setting.parse(raw)
    except ValueError as error:
        raise ConfigInvalid(f"{spelled}: {error}") from None


def _read_toml(path: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"--config {path}: {error.strerror or 'cannot be read'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"--config {path}: not TOML: {error}") from None
    return {key.replace("-", "_"): value for key, value in table.items()}


def _refuse_unknown(table: Mapping[str, object], known: Mapping[str, Setting]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigInvalid(f"--config: unknown setting {key}{hint}")


def _refuse_misspelt_variables(env: Mapping[str, str], known: Mapping[str, Setting]) -> None:
    variables = {setting.variable for setting in known.values()} | {PREFIX + "CONFIG"}
    for key in env:
        if not key.startswith(PREFIX) or key in variables:
            continue
        near = difflib.get_close_matches(key, variables, n=1, cutoff=0.9)
        if near:
            raise ConfigInvalid(f"unknown variable {key}; did you mean {near[0]}?")
