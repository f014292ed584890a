"""Opens the world of one server: base, arena, KV cache, engine, adapters. Knows no HTTP."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from fader_adapters.aside import Aside
from fader_adapters.claims import NONE, Claims
from fader_adapters.errors import (
    AdapterError,
    AdapterTooLarge,
    ArenaFull,
    NameReserved,
    SourceUnavailable,
)
from fader_adapters.inspection import Inspector
from fader_adapters.kernels.backend import choose
from fader_adapters.kernels.tables import Tables
from fader_adapters.pool import Pool
from fader_adapters.sources import Sources
from fader_server import demo
from fader_server.api.adapter_ports import Adapters, LoadOrder
from fader_server.api.choosing import Usual, usual_of
from fader_server.api.context import BaseModel
from fader_server.assembly import (
    host_tier,
    max_waiting_of,
    memory_of,
    runner_of,
    scheduler_of,
    shares_of,
    weights_of,
)
from fader_server.config import ServeConfig
from fader_server.engine.loop import Engine
from fader_server.engine.warmup import warm_up
from fader_server.errors import ConfigInvalid
from fader_server.launch import Background, World
from fader_server.mergestart import lane_of, open_merging, policy_of, probe_tokens
from fader_server.merging import Parts
from fader_server.metrics import Metrics
from fader_server.model.checkpoint import check_folder
from fader_server.model.device import (
    choose_device,
    choose_dtype,
    free_bytes,
    set_threads,
    spare_bytes,
)
from fader_server.model.loaded import LoadedBase
from fader_server.model.loader import load_base
from fader_server.ondemand import OnDemand
from fader_server.parking import Parking
from fader_server.registry import Registry
from fader_server.sourcing import check_sources, open_sources
from fader_server.tenants import Tenant
from fader_server.text.files import generation_config
from fader_server.text.tokenizer import Tokenizer
from fader_server.watch import Seen, Watcher, changes_in

log = logging.getLogger(__name__)


@contextmanager
def open_world(
    config: ServeConfig,
    metrics: Metrics,
    claims: Claims = NONE,
    tenants: tuple[Tenant, ...] = (),
) -> Iterator[World]:
    """Load the base, reserve memory, start the engine, load the adapters; undo it at the end.

    Raises ConfigInvalid, ModelUnsupported or AdapterError for what the user can mend.
    """
    started = int(time.time())
    source = config.model or str(demo.base_dir())
    name = config.served_model_name or (Path(source).name if config.model else demo.SERVED_NAME)
    _check_named(config, name)
    sources = open_sources(config)
    _be_quiet()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    backend = choose(device, dtype)
    set_threads(config.threads, backend)
    base = load_base(
        source,
        dtype=dtype,
        device=device,
        backend=backend,
        quantize_experts=config.quantize_experts,
        screen_head=config.screen_head,
    )
    available = free_bytes(device)
    plan = memory_of(config, base, available)
    fields = {
        "base_bytes": plan.base,
        "arena_bytes": plan.arena,
        "kv_cache_bytes": plan.kv_cache,
        "workspace_bytes": plan.workspace,
        "total_bytes": plan.total,
        "max_model_len": plan.max_model_len,
    }
    log.info("memory plan", extra={"fields": fields})
    tokenizer, usual = _speech(config, source, base, plan.max_model_len)
    arena = torch.empty(plan.arena // dtype.itemsize, dtype=dtype, device=device)
    tables = Tables(arena, len(base.installed.spec.linears))
    pool = Pool(tables, in_place=device.type == "cpu")
    runner = runner_of(config, base, plan, tables=tables)
    scheduler = scheduler_of(config, base, plan, pool=pool, tenants=tenants)
    engine = Engine(
        scheduler,
        runner,
        pool.upload,
        max_waiting=config.max_waiting,
        max_waiting_of=max_waiting_of(tenants),
        observer=metrics,
        copies=pool,
    )
    registry = Registry(
        Inspector(
            base.installed.spec,
            dtype=dtype,
            weights=base.installed,
            also_named=(name,) if config.model else (name, demo.SERVED_NAME),
            aside=Aside(base.device),
        ),
        tier=host_tier(arena, config.host_adapters),
        pool=pool,
        sources=sources,
        forget=engine.forget,
        max_terms=config.max_terms,
        max_adapters=config.max_adapters,
        fetch_timeout=config.fetch_timeout,
        require_sha256=config.require_sha256,
        busy=lambda: engine.busy,
    )
    registry.claim(Claims(claims.names | {name}, claims.versions))
    given = frozenset(adapter.name for adapter in config.adapter)
    fixed = given if config.model else given | demo.adapter_dirs().keys()
    parking = Parking(registry, fixed=frozenset(fixed), limit=config.max_adapters)
    model = BaseModel(name, base.installed.spec.identity, plan.max_model_len, started, usual)
    offers = sources.offers if config.resolve_adapters else (lambda name: False)
    adapters = OnDemand(
        parking,
        offers=offers,
        told=metrics.loaded,
        room_seconds=config.first_token_timeout / 2,
        max_waiting=config.max_waiting,
        counted=engine.counted,
    )
    adapters.share(weights_of(tenants))
    parts = Parts(
        base,
        runner,
        scheduler.lanes,
        engine,
        free=partial(spare_bytes, device),
        unreserved=available - plan.arena - plan.kv_cache,
        probe=probe_tokens(config, tokenizer, plan.max_model_len),
    )

    def share(tenants: tuple[Tenant, ...]) -> None:
        engine.limit_waiting(max_waiting_of(tenants))
        engine.call(partial(scheduler.share, shares_of(tenants)))
        adapters.share(weights_of(tenants))

    # the engine first: it lets go of what makes room for the next
    with engine, open_merging(config, parts) as lanes:
        if config.warm_up and runner.learns:
            blocks, limits, vocab = scheduler.blocks, scheduler.limits, base.vocab_size
            seconds = config.warm_up
            engine.call(
                partial(warm_up, runner, blocks, limits, vocab=vocab, seconds=seconds)
            ).result()
        for folder in sources.passed_over():
            _skip(folder.name, folder.reason)
        seen = _load_adapters(config, registry, parking, base_name=name)
        background = _background(config, adapters, sources, seen=seen, base_name=name)
        yield World(
            model,
            engine,
            adapters,
            tokenizer,
            background=(*background, *policy_of(config, lanes, adapters)),
            merging=lanes,
            prepare=lane_of(config, lanes),
            share=share,
        )


def _speech(
    config: ServeConfig, source: str, base: LoadedBase, max_model_len: int
) -> tuple[Tokenizer, Usual]:
    """How the base reads and writes, and how it chooses its words; told in the log."""
    tokenizer = Tokenizer.load(
        source,
        max_model_len=max_model_len,
        model_vocab_size=base.vocab_size,
        template_variables=config.default_chat_template_kwargs or {},
        thoughts_apart=config.reasoning_format == "deepseek",
    )
    usual = usual_of(generation_config(source)) if config.sampling_defaults == "model" else Usual()
    log.info("calls of tools", extra={"fields": tokenizer.calls_told})
    log.info("thoughts", extra={"fields": tokenizer.thoughts_told})
    log.info("sampling by default", extra={"fields": asdict(usual)})
    return tokenizer, usual


def _check_named(config: ServeConfig, base_name: str) -> None:
    """What is named wrongly is told before the base takes its time to load."""
    if config.model:
        check_folder(config.model)
    if not config.model and base_name in demo.adapter_dirs():
        raise ConfigInvalid(f"--served-model-name {base_name}: a demo adapter has this name")
    for given in config.adapter:
        if given.name == base_name:
            raise ConfigInvalid(f"--adapter {given.name}: the base has this name; choose another")
    check_sources(config)


def _be_quiet() -> None:
    """Progress bars are for terminals; in a log they are noise."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _background(
    config: ServeConfig,
    adapters: Adapters,
    sources: Sources,
    *,
    seen: Mapping[str, Seen],
    base_name: str,
) -> tuple[Background, ...]:
    """What runs beside the server on its event loop."""
    if not config.watch_adapters:
        return ()
    reserved = {base_name, *(given.name for given in config.adapter)}
    watcher = Watcher(adapters, sources, seen=seen, reserved=reserved)
    return (partial(watcher.run, changes_in(config.adapter_dir)),)


def _load_adapters(
    config: ServeConfig, registry: Registry, parking: Parking, *, base_name: str
) -> dict[str, Seen]:
    """Those the operator named must load; one found in a folder that cannot is skipped, aloud.

    The folders and what became of them, by name.
    """
    if not config.model:
        for name, path in demo.adapter_dirs().items():
            _load_named(registry, name, str(path), what=f"the demo's adapter {name}")
    for given in config.adapter:
        _load_named(registry, given.name, given.source, what=f"--adapter {given.name}")
    taken = {given.name for given in config.adapter} | {base_name}
    seen: dict[str, Seen] = {}
    for found in registry.discover():
        if found.name in taken:
            continue
        try:
            loaded = parking.load_now(LoadOrder(found.name, found.reference))
            seen[found.name] = Seen(found.stamp, loaded.info.version)
        except AdapterError as error:
            if not isinstance(error, NameReserved | SourceUnavailable):  # may end: folder stays
                seen[found.name] = Seen(found.stamp, "")
            _skip(found.name, str(error))
    return seen


def _load_named(registry: Registry, name: str, source: str, *, what: str) -> None:
    try:
        registry.load_trusted(name, source)
    except (AdapterTooLarge, ArenaFull) as error:
        raise ConfigInvalid(f"{what}: {error} (--arena)") from error
    except AdapterError as error:
        raise ConfigInvalid(f"{what}: {error}") from error


def _skip(name: str, reason: str) -> None:
    log.warning("adapter skipped", extra={"fields": {"adapter": name, "reason": reason}})
