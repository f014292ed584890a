"""The adapters of one server: reads sources, keeps the store's books, tells the engine.

The store is not thread-safe; a lock lets the event loop lease while a loader thread publishes.
Reading, hashing and checking files happen outside it.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fader_adapters.errors import AdapterInvalid, VersionConflict
from fader_adapters.layers import Installed
from fader_adapters.leases import AdapterRef as StoreRef
from fader_adapters.leases import Lease
from fader_adapters.parse import ParsedAdapter, read_adapter
from fader_adapters.pool import Pool
from fader_adapters.records import AdapterStatus
from fader_adapters.source import LocalSources, RawAdapter
from fader_adapters.spec import Digest
from fader_adapters.store import Store
from fader_adapters.tiers import HostTier
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.ports import AdapterInfo, AdapterTotals, Loaded, LoadOrder

Forget = Callable[[Digest, Callable[[], None]], None]
"""Ask the engine to drop a version from the device, then call back, on any thread."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the store does not keep about a name."""

    source: str
    created: int
    relative_norm: float


class Registry:
    """Implements the API's Adapters. Everything but `load_now` and `load_trusted` is immediate."""

    def __init__(
        self,
        installed: Installed,
        *,
        tier: HostTier,
        pool: Pool,
        sources: LocalSources,
        dtype: torch.dtype,
        forget: Forget,
        max_terms: int,
    ) -> None:
        self._base = installed.spec
        self._norms = BaseNorms(installed)
        self._pool = pool
        self._sources = sources
        self._dtype = dtype
        self._forget = forget
        self._lock = threading.RLock()
        self._loader = ThreadPoolExecutor(1, "fader-load")
        self._facts: dict[str, _Facts] = {}
        self._store = Store(tier, on_retired=self._retired, max_terms=max_terms)

    def acquire(self, terms: Sequence[NamedTerm]) -> "LockedLease":
        """Resolve names and take the lease in one step. Raises AdapterNotFound, BlendInvalid."""
        refs = [StoreRef(term.ref.name, term.ref.version, term.weight) for term in terms]
        with self._lock:
            return LockedLease(self._store.acquire(refs), self._lock)

    async def load(self, order: LoadOrder) -> Loaded:
        """Fetch what a client named, check it and let the name mean it. Raises AdapterError.

        One at a time, on a thread of its own; the event loop and the engine go on.
        """
        return await asyncio.get_running_loop().run_in_executor(self._loader, self.load_now, order)

    def load_now(self, order: LoadOrder) -> Loaded:
        """The same on the caller's thread."""
        if order.revision is not None:
            raise AdapterInvalid("a folder has no revision: leave it out, or ask for a sha256")
        return self._publish(self._sources.fetch(order.source), order)

    def load_trusted(self, name: str, path: Path) -> Loaded:
        """The same for a path the operator named. Raises AdapterError."""
        return self._publish(self._sources.fetch_trusted(path), LoadOrder(name, str(path)))

    def discover(self) -> list[tuple[str, str]]:
        """(name, source) of every adapter directly under the roots."""
        return [(found.name, found.reference) for found in self._sources.discover()]

    def unload(self, name: str) -> None:
        """The name is gone at once, its memory with its last lease. Raises AdapterNotFound."""
        with self._lock:
            self._store.unload(name)
            self._facts.pop(name, None)

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo:
        """Raises AdapterNotFound."""
        with self._lock:
            self._store.pin(name, pinned=pinned)
            return self._info(self._store.status(name))

    def get(self, ref: AdapterRef) -> AdapterInfo:
        """Raises AdapterNotFound, also for a version that the name does not mean or hold."""
        with self._lock:
            if ref.version is not None:
                self._store.acquire([StoreRef(ref.name, ref.version)]).release()
            return self._info(self._store.status(ref.name))

    def list(self) -> Sequence[AdapterInfo]:
        with self._lock:
            return [self._info(status) for status in self._store.list()]

    def totals(self) -> AdapterTotals:
        with self._lock:
            return AdapterTotals(
                adapters=len(self._facts),
                leases=self._store.leases,
                host_bytes=self._store.used_bytes,
                device_bytes=self._pool.resident_bytes,
                device_evictions=self._pool.evictions,
                slots=self._pool.resident,
            )

    def _publish(self, raw: RawAdapter, order: LoadOrder) -> Loaded:
        parsed = read_adapter(raw, self._base, dtype=self._dtype)
        if order.sha256 is not None and parsed.spec.version != order.sha256.lower():
            raise VersionConflict(
                f"the source holds version {parsed.spec.version}, not the sha256 that was asked for"
            )
        facts = _Facts(order.source, int(time.time()), self._norms.relative(parsed))
        with self._lock:
            reservation = self._store.reserve(parsed)
        try:
            reservation.fill()
            with self._lock:
                before = self._facts.get(order.name)
                replaced = self._store.status(order.name).version if before else None
                self._store.publish(
                    order.name,
                    reservation,
                    replace=order.replace,
                    if_version=order.if_version,
                    pin=order.pin,
                )
                self._facts[order.name] = facts
                return Loaded(self._info(self._store.status(order.name)), replaced)
        finally:
            with self._lock:
                reservation.cancel()  # nothing, once it is published

    def _retired(self, version: Digest) -> None:
        self._forget(version, lambda: self._reclaim(version))

    def _reclaim(self, version: Digest) -> None:
        with self._lock:
            self._store.reclaim(version)

    def _info(self, status: AdapterStatus) -> AdapterInfo:
        report, facts = status.report, self._facts[status.name]
        return AdapterInfo(
            name=status.name,
            version=status.version,
            rank=max(report.ranks),
            scales=report.scales,
            modules=report.matched,
            targets=report.targets,
            bytes=status.nbytes,
            tier="device" if status.version in self._pool else "host",
            leases=status.leases,
            pinned=status.pinned,
            retired=status.retired,
            delta_norm=report.delta_norm,
            relative_norm=facts.relative_norm,
            source=facts.source,
            created=facts.created,
        )


class LockedLease:
    """A lease whose release takes the registry's lock. Release is idempotent."""

    def __init__(self, lease: Lease, lock: "threading.RLock") -> None:
        self._lease = lease
        self._lock = lock
        self.blend = lease.blend
        self.adapters = lease.adapters
        self.terms = lease.terms

    def release(self) -> None:
        with self._lock:
            self._lease.release()


class BaseNorms:
    """Frobenius norms of the base's linears, computed when first asked for and kept."""

    def __init__(self, installed: Installed) -> None:
        self._installed = installed
        self._norms: dict[int, float] = {}
        self._lock = threading.Lock()

    def relative(self, parsed: ParsedAdapter) -> float:
        """Largest ‖ΔW‖/‖W‖ over the adapter's linears whose W is not zero; else 0."""
        with self._lock:
            pairs = [
                (module.delta_norm, self._norm(delta.linear))
                for module, delta in zip(parsed.report.modules, parsed.spec.deltas, strict=True)
            ]
        return max((delta / norm for delta, norm in pairs if norm), default=0.0)

    def _norm(self, linear: int) -> float:
        if linear not in self._norms:
            site = next(s for s in self._installed.sites if linear in s.spec.linears)
            weight = site.kernel.base.dense(torch.float32)
            parts = torch.split(weight, list(site.spec.out_features))
            for index, part in zip(site.spec.linears, parts, strict=True):
                self._norms[index] = float(torch.linalg.vector_norm(part))
        return self._norms[linear]
