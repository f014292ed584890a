"""What one tenant's running requests may have of the machine at a time. Integers only."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fader_server.core import AdapterPool, Sequence
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's part."""

    weight: float = 1.0
    """Of the tokens that are computed while others wait."""
    most: float = 1.0
    """Of rows, blocks and the adapters' memory, 0 < most ≤ 1."""


class Shares:
    """Every tenant's part; one that is not named has all there is."""

    def __init__(
        self,
        shares: Mapping[str, Share],
        *,
        limits: Limits,
        blocks: BlockManager,
        pool: AdapterPool,
    ) -> None:
        self._most: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.replace(shares)
        self._limits = limits
        self._blocks = blocks
        self._pool = pool

    def replace(self, shares: Mapping[str, Share]) -> None:
        """Other parts from the next admission on; who has more than its own by then, runs on."""
        self._most = {tenant: share.most for tenant, share in shares.items() if share.most < 1}
        self.weights.clear()
        self.weights.update((tenant, share.weight) for tenant, share in shares.items())

    def full(self, tenant: str, running: Collection[Sequence]) -> bool:
        """Whether it has every row that it may have."""
        most = self._most.get(tenant)
        if most is None:
            return False
        rows = sum(sequence.request.tenant == tenant for sequence in running)
        return rows >= max(1, int(most * self._limits.max_rows))

    def admit(self, sequence: Sequence, running: Collection[Sequence]) -> bool:
        """Whether its tenant may run this one, too; one that has none running may, always.

        A sequence counts with the blocks and adapters that it may come to need.
        """
        tenant = sequence.request.tenant
        most = self._most.get(tenant)
        if most is None:
            return True
        if self.full(tenant, running):
            return False
        own = [s for s in running if s.request.tenant == tenant]
        if not own:
            return True
        together = [*own, sequence]
        if sum(map(self._longest, together)) > most * self._blocks.total:
            return False
        adapters = {v: a.spec.numel for s in together for v, a in s.adapters.items()}
        return self._pool.numel is None or sum(adapters.values()) <= most * self._pool.numel

    def _longest(self, sequence: Sequence) -> int:
        """Blocks at its end."""
        request = sequence.request
        tokens = min(len(request.prompt) + request.params.max_tokens, self._limits.max_model_len)
        return self._blocks.blocks_for(tokens)
