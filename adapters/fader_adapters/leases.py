"""What callers hold of the store: references by name, leases on versions, reservations of room."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from fader_adapters.parse import ParsedAdapter
from fader_adapters.pauses import Pause, never
from fader_adapters.report import AdapterReport
from fader_adapters.spec import AdapterSpec, Blend, Digest


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One term of a blend as a request names it; checked when it is resolved."""

    name: str
    version: str | None = None
    """12 or more hex digits of a live version; None: the current one."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LeasedTerm:
    """One term of a blend, resolved; for people and headers."""

    name: str
    version: Digest
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """One adapter version in host memory. Satisfies AdapterData."""

    spec: AdapterSpec
    flat: torch.Tensor
    """1-D, spec.numel elements of the arena's dtype; inside the arena itself on a CPU."""
    report: AdapterReport

    @property
    def version(self) -> Digest:
        return self.spec.version

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes


class Lease:
    """A request's hold on every version of its blend, until `release`."""

    def __init__(
        self,
        blend: Blend,
        adapters: Mapping[Digest, HostAdapter],
        terms: tuple[LeasedTerm, ...],
        give_back: Callable[[], None],
    ) -> None:
        self.blend = blend
        self.adapters = adapters
        self.terms = terms
        """In the order of the request, without terms of weight 0."""
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        """Let go of the versions; a second call does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Reservation:
    """Room for one version, before it has a name. As a context manager: cancelled if not published.

    Made and closed as the store is asked, one thread at a time; `fill` may run beside that.
    """

    def __init__(
        self,
        parsed: ParsedAdapter,
        flat: torch.Tensor,
        *,
        shared: bool,
        give_back: Callable[["Reservation"], None],
    ) -> None:
        self.parsed = parsed
        self.flat = flat
        self.shared = shared
        """The version is in the store already and `flat` is its memory, never written again."""
        self.filled = shared
        self._give_back: Callable[[Reservation], None] | None = give_back

    @property
    def version(self) -> Digest:
        return self.parsed.spec.version

    @property
    def open(self) -> bool:
        """Neither published nor cancelled."""
        return self._give_back is not None

    def fill(self, pause: Pause = never) -> None:
        """Write the weights into the reserved room; no-op when the version is there already."""
        if not self.filled:
            self.parsed.write(self.flat, pause)
            self.filled = True

    def close(self) -> None:
        """Published: the room belongs to the store's version now."""
        assert self.open
        self._give_back = None

    def cancel(self) -> None:
        """Give the room back; does nothing when published or cancelled."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
