"""KV blocks: who holds them, and which can be found again. Integers and hashes only.

Knows block ids and keys; never what a block holds, nor where the device keeps it.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Many
from typing import Protocol

from fader_adapters.spec import Digest
from fader_server.core import Sequence
from fader_server.errors import ConfigInvalid
from fader_server.phases import Phase

NULL_BLOCK = 0
"""Never handed out: padding may point at it."""


def chain_seed(blend: Digest, salt: str, block_size: int) -> bytes:
    """Start of a hash chain: blocks are shared only inside one salt, block size and blend of their
    first tokens."""
    name = salt.encode("utf-8", "surrogatepass")
    frame = struct.pack("<II", block_size, len(name))
    return hashlib.sha256(b"fader-kv-1" + bytes.fromhex(blend) + frame + name).digest()


def lane_seed(seed: bytes, lane: Digest) -> bytes:
    """The start of a chain in a merged lane, whose weights give other keys and values."""
    return hashlib.sha256(b"fader-kv-lane-1" + seed + bytes.fromhex(lane)).digest()


def turn(phase: Phase, at: int) -> bytes:
    """What a block from position `at` adds to its key where a phase begins in it."""
    return struct.pack("<I", phase.start - at) + bytes.fromhex(phase.blend.digest)


class States(Protocol):
    """What sequences have computed beside keys and values, kept at the ends of some blocks, by the
    blocks' keys."""

    def longest(self, keys: Many[bytes]) -> int:
        """How many of a prefix's blocks there are up to the last at whose end a state is kept."""
        ...

    def resume(self, sequence: Sequence, key: bytes, tokens: int) -> None:
        """The sequence goes on from the state of its first `tokens`, which is kept."""
        ...

    def keep(self, sequence: Sequence, key: bytes, blocks: int) -> None:
        """Keep the state of all that the sequence has computed, so many whole blocks."""
        ...

    def forget(self, keys: Iterable[bytes]) -> None:
        """None of these can be found any more."""
        ...


class BlockManager:
    """Blocks 1 .. count-1 of a paged KV cache, by reference count, with a prefix cache.

    A block is used (referenced), cached (unreferenced but findable; the oldest go first) or
    free. Only full blocks of committed tokens become findable. Not thread-safe.
    """

    def __init__(
        self,
        count: int,
        *,
        block_size: int = 16,
        findable: bool = True,
        states: States | None = None,
    ) -> None:
        """findable: False where a block alone does not say what a sequence has computed, and there
        are no `states` that say the rest."""
        if count < 2 or block_size < 1:
            raise ConfigInvalid(
                f"the KV cache needs at least 2 blocks of at least 1 token, "
                f"got {count} of {block_size}: give it more memory"
            )
        self.block_size = block_size
        self.findable = findable
        self.total = count - 1
        self._states = states
        self.queries = 0
        """Blocks that admitted requests looked for."""
        self.hits = 0
        """Blocks of those that were found."""
        self._refs = [0] * count
        self._free = list(range(count - 1, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * count
        self._pack = struct.Struct(f"<{block_size}I").pack

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - len(self._free) - len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def find(self, sequence: Sequence, limit: int) -> list[int]:
        """The longest run of findable blocks from the start, at most `limit`; pins nothing."""
        found: list[int] = []
        for index in range(limit):
            block = self._by_key.get(self._key(sequence, index))
            if block is None:
                break
            found.append(block)
        if self._states is not None:
            del found[self._states.longest(sequence.keys[: len(found)]) :]
        return found

    def room(self, hits: list[int]) -> int:
        """How many blocks `admit` could hand out beside these hits."""
        return len(self._free) + len(self._cached) - sum(not self._refs[b] for b in hits)

    def admit(self, sequence: Sequence, hits: list[int], *, total: int, sought: int) -> None:
        """Give the sequence `total` blocks: the hits of `sought`, pinned first, then fresh ones."""
        assert not sequence.blocks, "a sequence is admitted once"
        for block in hits:
            if not self._refs[block]:
                del self._cached[block]
            self._refs[block] += 1
        sequence.blocks = hits + [self._take() for _ in range(total - len(hits))]
        sequence.published = len(hits)
        if hits and self._states is not None:
            tokens = len(hits) * self.block_size
            self._states.resume(sequence, sequence.keys[len(hits) - 1], tokens)
        self.hits += len(hits)
        self.queries += sought

    def grow(self, sequence: Sequence) -> bool:
        """Add one fresh block; False when there is none."""
        if not self._free and not self._cached:
            return False
        sequence.blocks.append(self._take())
        return True

    def publish(self, sequence: Sequence) -> None:
        """Make the full blocks of the computed tokens findable; call after their step's commit.

        A key that is already known keeps its block.
        """
        if not self.findable:
            return
        full = sequence.computed // self.block_size
        for index in range(sequence.published, full):
            key = self._key(sequence, index)
            if key not in self._by_key:
                block = sequence.blocks[index]
                self._by_key[key] = block
                self._key_of[block] = key
        sequence.published = full
        if self._states is not None and full * self.block_size == sequence.computed:
            self._states.keep(sequence, self._key(sequence, full - 1), full)

    def withdraw(self, sequence: Sequence) -> None:
        """No block that the sequence holds can be found any more."""
        if self._states is not None:
            self._states.forget(sequence.keys)
        for block in sequence.blocks:
            key = self._key_of[block]
            if key is not None:
                del self._by_key[key]
                self._key_of[block] = None

    def release(self, sequence: Sequence) -> None:
        """Give all its blocks back; findable ones stay cached, a prefix longer than its tail."""
        for block in reversed(sequence.blocks):
            refs = self._refs[block] - 1
            assert refs >= 0, f"block {block} released twice"
            self._refs[block] = refs
            if not refs:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        sequence.blocks = []
        sequence.published = 0

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._key_of[block]
            assert key is not None
            del self._by_key[key]
            self._key_of[block] = None
        self._refs[block] = 1
        return block

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Key of the index-th block: every token up to its end, under salt and the blends that
        compute them, whatever comes after."""
        keys, size, request = sequence.keys, self.block_size, sequence.request
        while len(keys) <= index:
            if keys:
                before = keys[-1]
            else:
                before = chain_seed(request.phases[0].blend.digest, request.cache_salt, size)
                if sequence.lane is not None:
                    before = lane_seed(before, sequence.lane.key)
            at = len(keys) * size
            tokens = self._pack(*sequence.tokens[at : at + size])
            turns = (turn(p, at) for p in request.phases[1:] if at <= p.start < at + size)
            keys.append(hashlib.sha256(before + tokens + b"".join(turns)).digest())
        return keys[index]
