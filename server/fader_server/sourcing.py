"""The adapter sources that the settings allow, put together."""

from pathlib import Path

from fader_adapters.cache import DiskCache
from fader_adapters.errors import SourceForbidden, SourceUnavailable
from fader_adapters.hub import HubRef, HubSource
from fader_adapters.limits import Patience
from fader_adapters.source import LocalSources
from fader_adapters.sources import Sources
from fader_adapters.urls import UrlSource
from fader_server.config import ServeConfig
from fader_server.errors import ConfigInvalid


def check_sources(config: ServeConfig) -> None:
    """What is named wrongly is told before the base takes its time. Raises ConfigInvalid."""
    for root in config.adapter_dir:
        if not root.is_dir():
            raise ConfigInvalid(f"--adapter-dir {root}: no such folder; create it or leave it out")
    for given in config.adapter:
        if not Path(given.source).is_dir() and not _is_remote(given.source):
            raise ConfigInvalid(f"--adapter {given.name}: no such folder: {given.source}")
    if config.watch_adapters and not config.adapter_dir:
        raise ConfigInvalid("--watch-adapters: there is no folder to watch; give --adapter-dir")
    if config.resolve_adapters and not (config.adapter_dir or config.adapter_hub):
        raise ConfigInvalid(
            "--resolve-adapters: nothing to load from; give --adapter-dir or --adapter-hub"
        )


def open_sources(config: ServeConfig) -> Sources:
    """Raises ConfigInvalid for what the user can mend."""
    local = LocalSources(config.adapter_dir)
    named = [item.source for item in config.adapter if not Path(item.source).is_dir()]
    hub = bool(config.adapter_hub) or any(HubRef.read(source) for source in named)
    if not hub and not config.adapter_url:
        return Sources(local)
    try:
        cache = DiskCache(config.fetched_dir, max_bytes=config.adapter_cache)
    except OSError as error:
        raise ConfigInvalid(
            f"--cache-dir {config.fetched_dir}: {error.strerror}; give a folder that can be written"
        ) from None
    patience = Patience(total=config.fetch_timeout)
    try:
        urls = UrlSource(config.adapter_url, cache=cache, patience=patience)
    except (SourceForbidden, SourceUnavailable) as error:
        raise ConfigInvalid(f"--adapter-url: {error}") from None
    return Sources(
        local,
        hub=HubSource(config.adapter_hub, cache=cache, patience=patience) if hub else None,
        urls=urls if config.adapter_url else None,
    )


def _is_remote(source: str) -> bool:
    return "://" in source or HubRef.read(source) is not None
