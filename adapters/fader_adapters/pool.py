"""The device tier: which versions are in the arena, in which slot, pinned by how many requests.

Owned by the engine thread. Decides in integers; `upload` alone touches tensors.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

import torch

from fader_adapters.errors import AdapterTooLarge
from fader_adapters.extents import ExtentAllocator
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import AdapterData, Digest, Upload
from fader_adapters.transfers import ARRIVED, Ticket, Transfers, transfers_to


@dataclass(slots=True, eq=False)
class _Resident:
    slot: int
    offset: int
    numel: int
    pins: int = 0
    uploaded: bool = False
    doomed: bool = False
    """Forgotten while pinned: it goes with its last pin."""
    ticket: Ticket = ARRIVED
    """Its copy to the device."""


class Pool:
    """Versions on the device, least recently used first. Implements the engine's AdapterPool."""

    def __init__(
        self, tables: Tables, *, in_place: bool = False, transfers: Transfers | None = None
    ) -> None:
        """`in_place`: adapters already lie in the arena (CPU), placed by the store's ArenaTier.

        Nothing is copied or evicted then: a version stays until it is forgotten. `transfers`: by
        default those for the arena's device.
        """
        self._tables = tables
        self._transfers = transfers or transfers_to(tables.arena.device)
        self._under_way: dict[int, _Resident] = {}
        """Versions whose copy was not seen to end, by slot."""
        self._in_place = in_place
        self._extents = ExtentAllocator(tables.arena.numel())
        self._residents: OrderedDict[Digest, _Resident] = OrderedDict()
        self._resident_numel = 0
        self._free_slots: list[int] = []
        self._slots = 0
        self.evictions = 0
        self.uploads = 0

    @property
    def resident(self) -> int:
        """Versions on the device."""
        return len(self._residents)

    @property
    def numel(self) -> int | None:
        """Elements that versions in use compete for; None where all that are loaded are there."""
        return None if self._in_place else self._extents.capacity

    @property
    def total_bytes(self) -> int:
        """Of the arena."""
        return self._tables.arena.numel() * self._tables.arena.itemsize

    @property
    def resident_bytes(self) -> int:
        """Of the versions on the device. Any thread."""
        return self._resident_numel * self._tables.arena.itemsize

    @property
    def pins(self) -> int:
        """Acquires not yet released, one for each version."""
        return sum(resident.pins for resident in self._residents.values())

    def __contains__(self, version: Digest) -> bool:
        return version in self._residents

    def acquire(self, data: Mapping[Digest, AdapterData]) -> tuple[Upload, ...] | None:
        """Pin every version, evicting unpinned ones; None: not now, nothing changed.

        Returns the uploads nobody has planned yet. Raises AdapterTooLarge when the versions cannot
        fit together even alone.
        """
        missing = [version for version in data if version not in self._residents]
        offsets = self._place(data, missing)
        if offsets is None:
            return None
        uploads = [*self._settle(data, offsets)]
        for version in data:
            resident = self._residents[version]
            # prefetched by a plan that was dropped: nobody else will bring it in
            if version not in offsets and not resident.pins and not resident.uploaded:
                uploads.append(Upload(data[version], resident.slot, resident.offset))
            resident.pins += 1
            self._residents.move_to_end(version)
        return tuple(uploads)

    def check(self, data: Mapping[Digest, AdapterData]) -> None:
        """Raise AdapterTooLarge when these versions can never be there together. Any thread."""
        sizes = [version.spec.numel for version in data.values()]
        if not self._in_place and not self._extents.fits_empty(*sizes):
            itemsize = self._tables.arena.itemsize
            raise AdapterTooLarge(
                f"the adapters of this request need {sum(sizes) * itemsize} bytes, "
                f"the arena has {self._extents.capacity * itemsize}"
            )

    def displaces(self, data: Mapping[Digest, AdapterData]) -> bool:
        """Whether `acquire` would have to evict something for these, or find no room."""
        if self._in_place:
            return False
        missing = {v: d.spec.numel for v, d in data.items() if v not in self._residents}
        return bool(missing) and _allocate_all(self._extents.copy(), missing) is None

    def prefetch(self, line: Iterable[Mapping[Digest, AdapterData]]) -> tuple[Upload, ...]:
        """Bring in, unpinned, what the first in `line` that misses something misses.

        Evicts nothing that is pinned or that anybody in the line needs; nothing when it does not
        fit then. What the line needs counts as used just now, the first of it latest. If the
        uploads are never run, `acquire` returns them once more.
        """
        if self._in_place:
            return ()
        waiting = list(line)
        wanted = {version: data for one in waiting for version, data in one.items()}
        for version in reversed(wanted):
            if version in self._residents:
                self._residents.move_to_end(version)
        one = next((one for one in waiting if any(v not in self._residents for v in one)), {})
        missing = {v: d.spec.numel for v, d in one.items() if v not in self._residents}
        evictable = [v for v, r in self._residents.items() if not r.pins and v not in wanted]
        offsets = self._evict_and_place(missing, evictable) if missing else None
        return self._settle(one, offsets) if offsets else ()

    def release(self, versions: tuple[Digest, ...]) -> None:
        """Undo one acquire of these versions."""
        for version in versions:
            resident = self._residents[version]
            assert resident.pins > 0
            resident.pins -= 1
            # Never uploaded: its plan was dropped, so nothing of it may be found here later.
            if resident.pins == 0 and (resident.doomed or not resident.uploaded):
                self._drop(version)

    def slot(self, version: Digest) -> int:
        """The slot of a version on the device. Raises KeyError when it is not there."""
        return self._residents[version].slot

    def forget(self, version: Digest) -> None:
        """The version leaves the host: drop it now, or with its last pin."""
        resident = self._residents.get(version)
        if resident is None:
            return
        if resident.pins:
            resident.doomed = True
        else:
            self._drop(version)

    def upload(self, uploads: Iterable[Upload]) -> None:
        """Begin to copy the weights in and publish their slots; repeats do nothing.

        Kernels already queued on the current stream read the old bytes. Rows of a slot must not
        run before its copy has arrived: see `late` and `join`.
        """
        for upload in uploads:
            resident = self._residents[upload.data.spec.version]
            if resident.uploaded:
                continue
            assert (resident.slot, resident.offset) == (upload.slot, upload.offset)
            if not self._in_place:
                extent = self._tables.arena.narrow(0, upload.offset, resident.numel)
                resident.ticket = self._transfers.copy(extent, upload.data.flat)
                self._under_way[resident.slot] = resident
            self._tables.publish(upload.slot, upload.data.spec, upload.offset)
            resident.uploaded = True
            self.uploads += 1

    def late(self) -> Collection[int]:
        """Slots whose weights are still on their way; never waits."""
        for slot in [slot for slot, r in self._under_way.items() if r.ticket.done()]:
            del self._under_way[slot]
        return self._under_way.keys()

    def join(self) -> None:
        """Let the current stream wait for every copy under way; the caller goes on."""
        for resident in self._under_way.values():
            resident.ticket.join()

    def _place(
        self, data: Mapping[Digest, AdapterData], missing: list[Digest]
    ) -> dict[Digest, int] | None:
        """Offsets for the missing versions, with room made for them; None: not now."""
        if self._in_place:
            return {version: self._offset_in_arena(data[version].flat) for version in missing}
        self.check(data)
        sizes = {version: data[version].spec.numel for version in missing}
        evictable = [v for v, r in self._residents.items() if not r.pins and v not in data]
        room = sum(self._residents[v].numel for v in evictable) + self._extents.free
        if room < sum(sizes.values()):
            return None
        offsets = self._evict_and_place(sizes, evictable)
        if offsets is not None:
            return offsets
        # What is here of them already may lie in the way of the rest: copy it in anew as well.
        own = [v for v in data if v in self._residents and not self._residents[v].pins]
        sizes |= {version: data[version].spec.numel for version in own}
        return self._evict_and_place(sizes, own + evictable, least=len(own)) if own else None

    def _settle(
        self, data: Mapping[Digest, AdapterData], offsets: dict[Digest, int]
    ) -> tuple[Upload, ...]:
        """Slots for the versions that got an offset; the uploads that bring them in."""
        uploads = []
        for version, offset in offsets.items():
            slot = heappop(self._free_slots) if self._free_slots else self._new_slot()
            uploads.append(Upload(data[version], slot, offset))
            resident = _Resident(slot, offset, data[version].spec.numel)
            self._residents[version] = resident
            self._resident_numel += resident.numel
        return tuple(uploads)

    def _evict_and_place(
        self, sizes: dict[Digest, int], evictable: list[Digest], *, least: int = 0
    ) -> dict[Digest, int] | None:
        """Try with more and more of `evictable` gone, in order and at least so many of them;
        change nothing until it works."""
        emptied = self._extents.copy()
        for count in range(len(evictable) + 1):
            if count:
                emptied.release(self._residents[evictable[count - 1]].offset)
            if count < least:
                continue
            offsets = _allocate_all(emptied.copy(), sizes)
            if offsets is None:
                continue
            for version in evictable[:count]:
                self._drop(version)
            self.evictions += count
            return _allocate_all(self._extents, sizes)
        return None

    def _drop(self, version: Digest) -> None:
        resident = self._residents.pop(version)
        assert resident.pins == 0
        self._resident_numel -= resident.numel
        # the version's host memory may go as soon as this returns
        resident.ticket.wait()
        self._under_way.pop(resident.slot, None)
        if resident.uploaded:
            self._tables.retract(resident.slot)
        heappush(self._free_slots, resident.slot)
        if not self._in_place:
            self._extents.release(resident.offset)

    def _new_slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _offset_in_arena(self, flat: torch.Tensor) -> int:
        arena = self._tables.arena
        assert flat.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr()
        return int(flat.storage_offset()) - int(arena.storage_offset())


def _allocate_all(extents: ExtentAllocator, sizes: dict[Digest, int]) -> dict[Digest, int] | None:
    """An extent for each size, largest first; None when one does not fit (`extents` is spoilt)."""
    offsets: dict[Digest, int] = {}
    for version in sorted(sizes, key=lambda v: (-sizes[v], v)):
        offset = extents.allocate(sizes[version])
        if offset is None:
            return None
        offsets[version] = offset
    return offsets
