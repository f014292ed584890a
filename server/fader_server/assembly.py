"""The parts of an engine over a loaded base, by the settings: memory, cache, scheduler, runner."""

import logging

import torch

from fader_adapters.errors import first_line
from fader_adapters.kernels.cpu import NativeBackend
from fader_adapters.kernels.native import in_huge_pages
from fader_adapters.kernels.tables import Tables
from fader_adapters.pool import Pool
from fader_adapters.tiers import ArenaTier, HostTier, locked_tier
from fader_server.config import ServeConfig
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.scheduler import Scheduler
from fader_server.engine.shares import Share
from fader_server.errors import ConfigInvalid
from fader_server.mergestart import room_to_keep
from fader_server.model.device import free_bytes
from fader_server.model.kernels import choose_attention, choose_distributions
from fader_server.model.kv_cache import KVCache
from fader_server.model.launching import LaunchingRunner, PreparingRunner
from fader_server.model.loaded import LoadedBase
from fader_server.model.memory import HOST_SHARE, MemoryPlan, plan_memory, workspace_bytes
from fader_server.model.packed_states import KEPT
from fader_server.model.runner import ModelRunner
from fader_server.model.sampler import Sampler
from fader_server.model.state_slots import SPARE
from fader_server.tenants import Tenant

_log = logging.getLogger(__name__)

BLOCK_SIZE = 16
_HOST_ARENAS = 4
"""Beside a GPU the host keeps so many times what its arena holds, unless told otherwise."""
CHUNK_SIZE = 256
LOOKUP_ROWS = 8
"""Rows up to which one more costs native kernels little, and a screened output layer screens."""
_TOUCH_SECONDS = 2.0
"""What a start may take longer so that the first blocks of the cache are there; see KVCache."""


def memory_of(config: ServeConfig, base: LoadedBase, available: int) -> MemoryPlan:
    """What the arena, the cache and the steps get of `available` bytes. Raises ConfigInvalid."""
    if config.max_model_len is not None and config.max_model_len > base.max_positions:
        raise ConfigInvalid(
            f"--max-model-len {config.max_model_len}: the base has {base.max_positions} positions; "
            "ask for at most that many"
        )
    rows = config.max_batch_rows + ((KEPT + SPARE) // 2 if base.packed_states is not None else 0)
    return plan_memory(
        available=available - room_to_keep(config, base) - rows * base.state.fixed,
        on_host=base.device.type == "cpu",
        base=base.nbytes,
        block_bytes=base.block_bytes(BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_rows=config.max_batch_rows,
        max_model_len=config.max_model_len,
        max_positions=base.max_positions,
        arena=config.arena,
        kv_cache=config.kv_cache,
        workspace=_workspace(config, base) if base.device.type == "cuda" else 0,
    )


def _workspace(config: ServeConfig, base: LoadedBase) -> int:
    return workspace_bytes(
        max_rows=config.max_batch_rows,
        step_tokens=config.max_step_tokens,
        chunk=CHUNK_SIZE,
        widest=max(sum(site.spec.out_features) for site in base.installed.sites),
        vocab=base.vocab_size,
        itemsize=base.dtype.itemsize,
    )


def scheduler_of(
    config: ServeConfig,
    base: LoadedBase,
    plan: MemoryPlan,
    *,
    pool: Pool,
    tenants: tuple[Tenant, ...],
) -> Scheduler:
    """The scheduler of a plan of memory."""
    limits = Limits(
        max_rows=config.max_batch_rows,
        max_step_tokens=config.max_step_tokens,
        chunk_size=min(CHUNK_SIZE, config.max_step_tokens - config.max_batch_rows),
        max_model_len=plan.max_model_len,
        solo=base.solo is not None,
        block=BLOCK_SIZE if base.packed_states is not None else 0,
        lookup=_lookup(config, base),
    )
    return Scheduler(
        limits,
        blocks=blocks_of(base, plan.blocks),
        pool=pool,
        shares=shares_of(tenants),
    )


def _lookup(config: ServeConfig, base: LoadedBase) -> int:
    """Rows up to which guesses fill a step: none where a token that did not come would be part of
    what a sequence goes on from."""
    if base.solo is not None or base.packed_states is not None:
        return 0
    if config.prompt_lookup is not None:
        return config.prompt_lookup
    return LOOKUP_ROWS if isinstance(base.backend, NativeBackend) else 0


def blocks_of(base: LoadedBase, count: int) -> BlockManager:
    """The blocks of a base's cache, with the states that layers of its own leave at their ends."""
    return BlockManager(
        count,
        block_size=BLOCK_SIZE,
        findable=base.solo is None,
        states=base.packed_states.slots if base.packed_states is not None else None,
    )


def shares_of(tenants: tuple[Tenant, ...]) -> dict[str, Share]:
    """What the scheduler knows of them."""
    return {tenant.name: Share(tenant.weight, tenant.max_share) for tenant in tenants}


def weights_of(tenants: tuple[Tenant, ...]) -> dict[str, float]:
    """Of the tenants that have another than 1."""
    return {t.name: t.weight for t in tenants if t.weight != 1}


def max_waiting_of(tenants: tuple[Tenant, ...]) -> dict[str, int]:
    """What the engine knows of them."""
    return {t.name: t.max_waiting for t in tenants if t.max_waiting is not None}


def runner_of(
    config: ServeConfig, base: LoadedBase, plan: MemoryPlan, *, tables: Tables
) -> ModelRunner:
    """The runner over a loaded base, with its cache of keys and values."""
    cache = KVCache(
        base.layers,
        blocks=plan.blocks,
        block_size=BLOCK_SIZE,
        dtype=base.dtype,
        device=base.device,
    )
    if base.packed_states is not None:
        base.packed_states.reserve(config.max_batch_rows)
    if isinstance(base.backend, NativeBackend):
        for tensor in (tables.arena, *cache.tensors()):
            in_huge_pages(tensor)
    if base.device.type == "cpu":
        cache.touch(_TOUCH_SECONDS)
    kind = LaunchingRunner if base.device.type == "cuda" else PreparingRunner
    return kind(
        base,
        cache=cache,
        tables=tables,
        attention=choose_attention(
            base,
            block_size=BLOCK_SIZE,
            max_rows=config.max_batch_rows,
            max_context=plan.max_model_len,
            max_tokens=config.max_step_tokens,
        ),
        sampler=Sampler(choose_distributions(base)),
    )


def host_tier(arena: torch.Tensor, wanted: int | None) -> HostTier:
    """Where adapters rest in host memory: on a CPU in the arena, and a size that is wanted in vain
    is told in the log; else in `wanted` bytes, which are taken now. Raises ConfigInvalid where the
    host does not give them; where it does not lock what nobody asked for, copies are slower.
    """
    if arena.device.type != "cuda":
        if wanted is not None:
            fields = {"reason": "on a CPU adapters rest in the arena: --arena is its size"}
            _log.warning("--host-adapters changes nothing", extra={"fields": fields})
        return ArenaTier(arena)
    total = _host_default(arena.nbytes) if wanted is None else wanted
    try:
        return locked_tier(total, arena.dtype, largest=arena.nbytes)
    except RuntimeError as error:
        if wanted is None:
            fields = {"reason": first_line(error)}
            _log.warning("adapters rest in memory that is not locked", extra={"fields": fields})
            flat = torch.empty(total // arena.itemsize, dtype=arena.dtype)
            return ArenaTier(flat, largest=arena.nbytes)
        raise ConfigInvalid(
            f"--host-adapters {total}: the host does not give so much memory to keep adapters in "
            f"({first_line(error)}); ask for less"
        ) from error


def _host_default(arena: int) -> int:
    """Some arenas, but of what is free no more than a CPU's server would reserve."""
    return min(_HOST_ARENAS * arena, int(free_bytes(torch.device("cpu")) * HOST_SHARE))
