"""Reads adapters for one base and tells what each would do to it. Knows no store and no device."""

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from fader_adapters.errors import AdapterError
from fader_adapters.parse import ParsedAdapter, read_adapter
from fader_adapters.pauses import Pause, never
from fader_adapters.refusals import Refusals
from fader_adapters.report import BaseMatch, Health, kinds_of, verdict
from fader_adapters.source import RawAdapter
from fader_adapters.spec import BaseSpec, BaseWeights


class Inspector:
    """One base's eye on adapters. Safe to use from any thread."""

    def __init__(
        self,
        base: BaseSpec,
        *,
        dtype: torch.dtype,
        weights: BaseWeights | None = None,
        also_named: tuple[str, ...] = (),
        trust_copies: bool = False,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Without `weights` there are no relative norms, DoRA is refused, and so are copies of the
        base's weights unless `trust_copies`.

        `also_named`: what the base is called beside the name it was loaded by. `aside`: around
        what is computed of the base's own weights, once each (see Aside).
        """
        self._base = base
        self._names = (base.name, *also_named)
        self._dtype = dtype
        self._weights = weights
        self._trust_copies = trust_copies
        self._aside = aside
        self._norms: dict[int, float] = {}
        self._refusals = Refusals()
        self._lock = threading.Lock()

    def read(self, raw: RawAdapter, pause: Pause = never) -> ParsedAdapter:
        """Check an adapter against the base. Raises as `read_adapter` does, for bytes that were
        refused lately without reading them again."""
        self._refusals.check(raw, pause)
        try:
            return read_adapter(
                raw,
                self._base,
                dtype=self._dtype,
                weights=self._weights,
                trust_copies=self._trust_copies,
                pause=pause,
            )
        except AdapterError as error:
            self._refusals.note(raw, error, pause)
            raise

    def health(self, parsed: ParsedAdapter) -> Health:
        """The report of an adapter that was read."""
        linears = [delta.linear for delta in parsed.spec.deltas]
        with self._lock:
            known = all(linear in self._norms for linear in linears)
            with nullcontext() if known else self._aside():
                norms = [self._norm(linear) for linear in linears]
        modules, claimed = parsed.report.modules, parsed.report.base_name
        pairs = zip(modules, norms, strict=True)
        return Health(
            report=parsed.report,
            dtype=str(parsed.dtype).removeprefix("torch."),
            nbytes=parsed.nbytes,
            kinds=tuple(kinds_of(modules, norms)),
            largest=max((m.delta_norm / norm for m, norm in pairs if norm), default=0.0),
            match=BaseMatch(
                self._base.fingerprint,
                _public(claimed),
                verdict(claimed, *self._names),
                self._base.weights,
            ),
        )

    def _norm(self, linear: int) -> float:
        """‖W‖ of one linear, computed when first asked for and kept."""
        if self._weights is None:
            return 0.0
        if linear not in self._norms:
            parts = torch.stack([*map(torch.linalg.vector_norm, self._weights.panels(linear))])
            self._norms[linear] = float(torch.linalg.vector_norm(parts.double()))  # the one wait
        return self._norms[linear]


def _public(claimed: str | None) -> str | None:
    """A Hub id as it is; of a path only the last part, for it tells of a machine."""
    if claimed and (claimed[0] in "/.~" or "\\" in claimed):
        return re.split(r"[/\\]", claimed.rstrip("/\\"))[-1]
    return claimed
