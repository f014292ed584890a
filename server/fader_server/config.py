"""Every setting of `fader serve` and of the commands that drive a running server.

The only place that reads the environment. Knows nothing about models, engines or HTTP.
"""

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fader_server import settings as kinds
from fader_server.definitions import Setting, define, read, settings_of
from fader_server.errors import ConfigInvalid
from fader_server.settings import AdapterSource, BlendTerm

MIN_CHUNK = 16
"""Tokens of a prompt that every step must have room for beside its running rows."""

_CACHE = ("fader", "adapters")
_COUNT = partial(kinds.integer, low=1, high=1 << 20)
_SECONDS = partial(kinds.number, low=0.0, high=1e8)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The settings of one server, checked. Bytes and seconds; None: chosen at start."""

    model: str = define(
        "", "base: a folder or a Hub id", parse=kinds.text, positional=True, metavar="MODEL"
    )
    served_model_name: str | None = define(
        None, "name of the base in the API", parse=kinds.model_name, metavar="NAME"
    )
    host: str = define("127.0.0.1", "address to bind", parse=kinds.text, metavar="HOST")
    port: int = define(
        8000, "port to bind, 0: any free", parse=partial(kinds.integer, low=0, high=65535)
    )
    device: Literal["auto", "cpu", "cuda"] = define(
        "auto", "where the base lives", parse=kinds.one_of("auto", "cpu", "cuda")
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = define(
        "auto", "compute type", parse=kinds.one_of("auto", "bfloat16", "float16", "float32")
    )
    quantize_experts: bool = define(False, "hold mixtures' experts in NF4, too", parse=kinds.switch)
    screen_head: bool = define(
        True,
        "hold a CPU's output layer in codes of a byte, too: half the reading for greedy tokens",
        parse=kinds.switch,
    )
    adapter: tuple[AdapterSource, ...] = define(
        (),
        "adapter to load at start (repeatable)",
        parse=kinds.adapter_source,
        metavar="NAME=SOURCE",
    )
    adapter_dir: tuple[Path, ...] = define(
        (), "root for adapters named at run time (repeatable)", parse=kinds.path, metavar="DIR"
    )
    adapter_hub: tuple[str, ...] = define(
        (),
        "Hub organisation or repository that may be named at run time (repeatable, globs)",
        parse=kinds.hub_glob,
        metavar="GLOB",
    )
    adapter_url: tuple[str, ...] = define(
        (),
        "URL prefix that may be named at run time, as s3://bucket/folder/ (repeatable)",
        parse=kinds.url_prefix,
        metavar="URL",
    )
    cache_dir: Path | None = define(  # noqa: RUF009 - a field, as all others
        None, "where fetched adapters are kept", parse=kinds.path, metavar="DIR"
    )
    adapter_cache: int = define(
        10 << 30, "disk for fetched adapters", parse=kinds.size, metavar="SIZE"
    )
    fetch_timeout: float = define(600.0, "seconds to fetch one adapter", parse=_SECONDS)
    resolve_adapters: bool = define(
        False, "load a folder or allowed Hub id when a request names it", parse=kinds.switch
    )
    watch_adapters: bool = define(
        False, "load, swap and unload as folders in the roots change", parse=kinds.switch
    )
    require_sha256: bool = define(
        False, "refuse loads at run time that do not give a sha256", parse=kinds.switch
    )
    max_adapters: int = define(1024, "adapters loaded at one time", parse=_COUNT)
    max_recipes: int = define(1024, "recipes at one time", parse=_COUNT)
    merge: tuple[BlendTerm, ...] | Literal["auto"] | None = define(
        None,
        "blend with weights of its own, or auto: the one that most tokens are for",
        parse=kinds.blend,
        metavar="BLEND",
    )
    merge_dtype: Literal["nf4", "bf16"] = define(
        "nf4", "of merged weights: the base's speed, or exact", parse=kinds.one_of("nf4", "bf16")
    )
    merge_force: bool = define(
        False, "merge into nf4 also when it loses too much of the blend", parse=kinds.switch
    )
    merge_share: float = define(
        0.6,
        "share of tokens from which auto merges",
        parse=partial(kinds.number, low=0.0, high=1.0),
    )
    merge_seconds: float = define(
        30.0, "seconds that auto looks back", parse=partial(kinds.number, low=1.0, high=1e8)
    )
    probe: Path | None = define(  # noqa: RUF009 - a field, as all others
        None, "text that tells what merging costs", parse=kinds.path, metavar="FILE"
    )
    arena: int | None = define(None, "device memory for adapters", parse=kinds.size, metavar="SIZE")
    host_adapters: int | None = define(
        None,
        "host memory for adapters beside a GPU, default four arenas",
        parse=kinds.size,
        metavar="SIZE",
    )
    kv_cache: int | None = define(
        None, "device memory for keys and values", parse=kinds.size, metavar="SIZE"
    )
    max_model_len: int | None = define(None, "longest prompt + output, tokens", parse=_COUNT)
    sampling_defaults: Literal["model", "openai"] = define(
        "model",
        "what requests leave open: as the base's generation_config.json, or as OpenAI",
        parse=kinds.one_of("model", "openai"),
    )
    reasoning_format: Literal["deepseek", "none"] = define(
        "deepseek",
        "what a model thinks: in reasoning_content, or in content as it comes",
        parse=kinds.one_of("deepseek", "none"),
    )
    default_chat_template_kwargs: dict[str, Any] | None = define(  # noqa: RUF009 - as all others
        None,
        'variables for the chat template, as {"enable_thinking": false}',
        parse=kinds.json_object,
        metavar="JSON",
    )
    max_batch_rows: int = define(
        64, "requests in one step", parse=partial(kinds.integer, low=1, high=4096)
    )
    max_step_tokens: int = define(512, "tokens in one step", parse=_COUNT)
    prompt_lookup: int | None = define(
        None,
        "rows up to which guesses fill a decode step, from what texts hold already; "
        "default 8 with native kernels on a CPU, else 0: none",
        parse=partial(kinds.integer, low=0, high=64),
    )
    threads: int | None = define(
        None, "CPU threads of the engine, default all cores", parse=kinds.threads
    )
    warm_up: float = define(
        2.0, "seconds of made-up steps before the first request, 0: none", parse=_SECONDS
    )
    api_key: tuple[str, ...] = define(
        (), "key for user routes (repeatable)", parse=kinds.key, metavar="KEY", secret=True
    )
    admin_key: str | None = define(
        None, "key for admin routes", parse=kinds.key, metavar="KEY", secret=True
    )
    tenants: Path | None = define(  # noqa: RUF009 - a field, as all others
        None, "TOML file of tenants: keys, adapters, shares", parse=kinds.path, metavar="FILE"
    )
    state_dir: Path | None = define(  # noqa: RUF009 - a field, as all others
        None, "where adapters loaded at run time are remembered", parse=kinds.path, metavar="DIR"
    )
    insecure: bool = define(
        False, "allow a bind other than loopback without keys of users", parse=kinds.switch
    )
    allow_origin: tuple[str, ...] = define(
        (),
        "origin whose pages may call the API from a browser, * for all (repeatable)",
        parse=kinds.origin,
        metavar="ORIGIN",
    )
    protect_metrics: bool = define(False, "/metrics needs a key, no tenant's", parse=kinds.switch)
    max_waiting: int = define(1024, "queued requests before 503", parse=_COUNT)
    max_connections: int = define(2048, "open sockets", parse=_COUNT)
    max_body: int | None = define(
        None,
        "largest request body; default: 1MiB, more for contexts of more than 64k tokens",
        parse=kinds.size,
        metavar="SIZE",
    )
    max_n: int = define(
        16, "largest n of a request", parse=partial(kinds.integer, low=1, high=4096)
    )
    max_choices: int = define(256, "prompts times n of a request", parse=_COUNT)
    max_call_tokens: int = define(
        1 << 20,
        "prompts times n times max_tokens",
        parse=partial(kinds.integer, low=1, high=1 << 40),
    )
    max_terms: int = define(8, "adapters in a blend", parse=partial(kinds.integer, low=1, high=64))
    body_timeout: float = define(
        30.0, "seconds to send a request's headers or body", parse=_SECONDS
    )
    first_token_timeout: float = define(300.0, "seconds to the first token", parse=_SECONDS)
    request_timeout: float = define(1800.0, "seconds to the last token", parse=_SECONDS)
    stall_timeout: float = define(
        30.0, "seconds a client may leave its stream unread", parse=_SECONDS
    )
    stuck_timeout: float = define(
        120.0, "seconds without an engine step before /health fails", parse=_SECONDS
    )
    ping_interval: float = define(
        15.0, "seconds between pings of a silent stream, 0: none", parse=_SECONDS
    )
    drain_grace: float = define(
        5.0, "seconds to keep accepting after SIGTERM, not ready", parse=_SECONDS
    )
    drain_timeout: float = define(
        60.0, "seconds for running requests to finish after that", parse=_SECONDS
    )
    log_level: Literal["debug", "info", "warning", "error"] = define(
        "info", "least severe log line", parse=kinds.one_of("debug", "info", "warning", "error")
    )

    otlp_traces_endpoint: str | None = define(
        None,
        "where spans of requests go, OTLP over HTTP, as http://127.0.0.1:4318/v1/traces",
        parse=kinds.otlp_url,
        metavar="URL",
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
        if not self.loopback and self.user_open and not self.insecure:
            raise ConfigInvalid(
                f"binding {self.host} needs --api-key (or FADER_API_KEY) or --tenants, "
                "or --insecure to serve without one"
            )
        if self.protect_metrics and self.user_open and self.admin_key is None:
            raise ConfigInvalid(
                "--protect-metrics needs a key that opens /metrics: give --admin-key or --api-key"
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
        return not self.api_key and self.tenants is None

    @property
    def admin_open(self) -> bool:
        """Admin routes need no key: no key of any kind is set and the bind is loopback."""
        return self.loopback and self.user_open and self.admin_key is None


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Where a running server is and who calls it, checked."""

    url: str = define(
        "http://127.0.0.1:8000", "address of a running server", parse=kinds.http_url, metavar="URL"
    )
    api_key: tuple[str, ...] = define(
        (), "key for user routes", parse=kinds.key, metavar="KEY", secret=True
    )
    admin_key: str | None = define(
        None, "key for admin routes", parse=kinds.key, metavar="KEY", secret=True
    )
    timeout: float = define(900.0, "seconds to wait for an answer", parse=_SECONDS)

    @property
    def key(self) -> str | None:
        """The most able key there is."""
        return self.admin_key or next(iter(self.api_key), None)


_KINDS = (ServeConfig, ClientConfig)


def settings() -> Iterator[Setting]:
    """Every setting in the order of ServeConfig."""
    return settings_of(ServeConfig)


def load(flags: Mapping[str, object], env: Mapping[str, str]) -> ServeConfig:
    """The settings of a server: see `definitions.read`. Raises ConfigInvalid."""
    found = read(ServeConfig, flags, env, kinds=_KINDS)
    cache_home = env.get("XDG_CACHE_HOME", "")
    if found.cache_dir is None and found.state_dir is None and cache_home.startswith("/"):
        return replace(found, cache_dir=Path(cache_home, *_CACHE))
    return found


def load_client(flags: Mapping[str, object], env: Mapping[str, str]) -> ClientConfig:
    """The settings of a client: see `definitions.read`. Raises ConfigInvalid."""
    return read(ClientConfig, flags, env, kinds=_KINDS)
