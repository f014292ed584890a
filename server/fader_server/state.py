"""Keeps what administrators asked for at run time over restarts: adapters, pins and recipes.

Knows names, sources and versions; what an adapter is, and how a file is written, is not its
business.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath

from fader_adapters.claims import Claims
from fader_adapters.errors import AdapterError, AdapterNotFound
from fader_server.api.adapter_ports import (
    AdapterInfo,
    Adapters,
    AdapterTotals,
    Lease,
    Loaded,
    LoadOrder,
    stands,
)
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.named_blends import Recipe
from fader_server.errors import Overloaded
from fader_server.metrics import Metric, gauge
from fader_server.state_entries import Origin, State, Wanted, WantedRecipe
from fader_server.state_file import StateFile

_log = logging.getLogger(__name__)


def recipes_in(state: State) -> list[Recipe]:
    """The recipes of a state, as they were written."""
    return [
        Recipe(name, tuple(_term(ref, weight) for ref, weight in wanted.terms), wanted.created)
        for name, wanted in state.recipes.items()
    ]


class RememberedAdapters:
    """Adapters whose run-time changes are written down, and the recipes' memory beside them."""

    def __init__(self, inner: Adapters, file: StateFile, state: State, *, base: str = "") -> None:
        """`base`: the identity of the one that is served; another than the list's is told."""
        if state.base and base and state.base != base:
            _log.warning("the list in --state-dir was made beside another base")
        self._inner = inner
        self._file = file
        self._state = replace(state, base=base or state.base)
        self._offered = {info.name for info in inner.list()}  # by flags and folders, at every start
        self._writer = ThreadPoolExecutor(1, "fader-state")  # one: writes keep their order
        self._last: Future[None] | None = None
        self._written: State | None = None
        self._refused = False  # the newest write: a restart would bring an older list back

    async def restore(self) -> None:
        """Bring back what was asked for before; what cannot be is reported and skipped."""
        for name, wanted in self._state.adapters.items():
            try:
                if wanted is None:
                    self._inner.unload(name)
                else:
                    await self._inner.load(_order(name, wanted))
            except AdapterNotFound:
                continue  # unloaded, and nothing offers it any more
            except AdapterError as error:
                _tell("adapter not restored", adapter=name, reason=str(error))
        for name in sorted(self._state.pins):
            try:
                self._inner.pin(name, pinned=True)
            except AdapterNotFound:
                _tell("pin not restored", adapter=name, reason="the adapter is not loaded")
        for recipe in recipes_in(self._state):
            for term in recipe.terms:
                await self._restore_term(recipe.name, term.ref)

    async def _restore_term(self, recipe: str, ref: AdapterRef) -> None:
        """An earlier version that a recipe names is fetched beside the one its name is at."""
        try:
            self._inner.get(ref)
            return
        except AdapterNotFound as error:
            reason = str(error)
        origin = self._state.versions.get(str(ref))
        if origin is not None and ref.version is not None:
            order = LoadOrder(ref.name, origin.source, origin.revision, sha256=ref.version)
            try:
                await self._revive_beside(order)
                return
            except (AdapterError, Overloaded) as error:
                reason = str(error)
        _tell("recipe not complete", recipe=recipe, adapter=str(ref), reason=reason)

    async def _revive_beside(self, order: LoadOrder) -> None:
        """What the name means now is held in memory meanwhile. Raises AdapterError, Overloaded."""
        lease = await self._inner.lease([NamedTerm(AdapterRef(order.name), 1.0)])
        try:
            await self._inner.revive(order)
        finally:
            lease.release()

    async def load(self, order: LoadOrder) -> Loaded:
        """Answers once it is on disk, unless the name was unloaded or moved on meanwhile."""
        loaded = await self._inner.load(order)
        if stands(loaded, self._inner):
            revision = loaded.info.revision or order.revision  # a branch moves, a commit does not
            wanted = Wanted(order.source, revision, loaded.info.version, loaded.info.pinned)
            self._remember(order.name, wanted)
        await self.saved()
        return loaded

    def unload(self, name: str) -> None:
        source = self._inner.get(AdapterRef(name)).source
        self._inner.unload(name)
        if name in self._offered or name in (source, PurePosixPath(source).name):
            self._remember(name, None)  # or the next start would bring it back
            return
        kept = dict(self._state.adapters)
        kept.pop(name, None)
        self._save(replace(self._state, adapters=kept, pins=self._state.pins - {name}))

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo:
        info = self._inner.pin(name, pinned=pinned)
        wanted = self._state.adapters.get(name)
        if wanted is not None:
            self._remember(name, replace(wanted, pin=pinned))
        elif name in self._offered:
            pins = self._state.pins | {name} if pinned else self._state.pins - {name}
            self._save(replace(self._state, pins=pins))
        elif pinned:  # it came on demand, and shall be there from now on
            self._remember(name, Wanted(info.source, info.revision, info.version, pinned))
        return info

    async def remember_recipes(self, recipes: Mapping[str, Recipe]) -> None:
        """Write the recipes down, and where the versions that they name come from."""
        fixed = {term.ref for recipe in recipes.values() for term in recipe.terms}
        origins = {str(ref): self._origin(ref) for ref in fixed if ref.version is not None}
        wanted = {
            name: WantedRecipe(
                tuple((str(term.ref), term.weight) for term in recipe.terms), recipe.created
            )
            for name, recipe in recipes.items()
        }
        versions = {ref: origin for ref, origin in origins.items() if origin is not None}
        self._save(replace(self._state, recipes=wanted, versions=versions))
        await self.saved()

    def _origin(self, ref: AdapterRef) -> Origin | None:
        known = self._state.versions.get(str(ref))
        if known is not None:
            return known
        try:
            info = self._inner.get(ref)
        except AdapterNotFound:
            return None
        return Origin(info.source, info.revision)

    async def saved(self) -> None:
        """Return when the changes so far are on disk, or the disk has refused them aloud."""
        if self._last is not None:
            await asyncio.wrap_future(self._last)

    async def revive(self, order: LoadOrder) -> None:
        await self._inner.revive(order)

    def claim(self, claims: Claims) -> None:
        self._inner.claim(claims)

    def acquire(self, terms: Sequence[NamedTerm]) -> Lease:
        return self._inner.acquire(terms)

    async def lease(self, terms: Sequence[NamedTerm], *, tenant: str = "") -> Lease:
        return await self._inner.lease(terms, tenant=tenant)

    def get(self, ref: AdapterRef) -> AdapterInfo:
        return self._inner.get(ref)

    def list(self) -> Sequence[AdapterInfo]:
        return self._inner.list()

    def totals(self) -> AdapterTotals:
        return self._inner.totals()

    def gauges(self) -> Iterator[Metric]:
        """For a scrape."""
        text = "1 while the disk refuses what --state-dir should hold."
        yield gauge("fader_state_unsaved", text, float(self._refused))

    def close(self) -> None:
        """Wait for the last write."""
        self._writer.shutdown()

    def _remember(self, name: str, wanted: Wanted | None) -> None:
        adapters = {**self._state.adapters, name: wanted}
        self._save(replace(self._state, adapters=adapters, pins=self._state.pins - {name}))

    def _save(self, state: State) -> None:
        self._state = state
        self._last = self._writer.submit(self._write)

    def _write(self) -> None:
        """The newest list: changes that came while the last one was written share a write."""
        state = self._state
        if state is self._written:
            return
        try:
            self._file.write(state)
            self._written = state
            self._refused = False
        except OSError as error:
            # The adapter serves; only a restart would not know of it.
            self._refused = True
            fields = {"reason": error.strerror}
            _log.error("the state cannot be written", extra={"fields": fields})


def _term(ref: str, weight: float) -> NamedTerm:
    name, _, version = ref.partition("@")
    return NamedTerm(AdapterRef(name, version or None), weight)


def _order(name: str, wanted: Wanted) -> LoadOrder:
    return LoadOrder(name, wanted.source, wanted.revision, sha256=wanted.version, pin=wanted.pin)


def _tell(event: str, **fields: str) -> None:
    _log.warning(event, extra={"fields": fields})
