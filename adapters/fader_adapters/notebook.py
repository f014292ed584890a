"""LoRA adapters on any transformers model in memory, for a notebook. Knows no server."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.errors import BlendInvalid
from fader_adapters.invocation import require_everywhere
from fader_adapters.kernels.backend import BackendName, Step, choose
from fader_adapters.kernels.tables import Tables
from fader_adapters.layers import Installed, install
from fader_adapters.leases import AdapterRef
from fader_adapters.parse import read_adapter
from fader_adapters.pool import Pool
from fader_adapters.report import AdapterReport
from fader_adapters.source import LocalSources
from fader_adapters.spec import Digest, RowTerms, StepTerms
from fader_adapters.store import Store
from fader_adapters.tiers import ArenaTier

Row = str | Mapping[str, float] | None
"""One row's adapter: a name, a blend of names and weights γ, or None for the base."""

_IN_PLACE = ("experts", "router")
"""Modules that stay and compute otherwise."""


class Attached:
    """A model whose linears take deltas. Made by `attach`; not thread-safe."""

    def __init__(
        self, model: PreTrainedModel, *, arena_bytes: int, backend: BackendName = "auto"
    ) -> None:
        first = next(model.parameters())
        dtype, device = model.dtype, first.device
        self._model = model
        self._backend = choose(device, dtype, backend)
        arena = torch.empty(arena_bytes // dtype.itemsize, dtype=dtype, device=device)
        before = dict(model.named_modules())
        self._installed: Installed = install(model, self._backend)
        replaced = [i.path for i in self._installed.spec.linears if i.role not in _IN_PLACE]
        self._originals = {path: before[path] for path in replaced}
        self._tables = Tables(arena, len(self._installed.spec.linears))
        self._pool = Pool(self._tables, in_place=True)
        self._store = Store(ArenaTier(arena), on_retired=self._forget)
        self._rows: list[tuple[tuple[int, float], ...]] | None = None
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._forward = vars(model).get("forward")
        vars(model)["forward"] = torch.no_grad()(model.forward)  # the kernels have no gradients

    def load(self, name: str, path: str | Path) -> AdapterReport:
        """Read a PEFT directory; the name may be taken, then it moves. Raises AdapterError, for an
        activated adapter as well: it would need the place in the prompt of every token."""
        raw = LocalSources(()).fetch_trusted(Path(path))
        installed = self._installed
        dtype = self._tables.arena.dtype
        parsed = read_adapter(raw, installed.spec, dtype=dtype, weights=installed)
        require_everywhere([parsed.spec])
        with self._store.reserve(parsed) as reservation:
            reservation.fill()
            return self._store.publish(name, reservation, replace=True).report

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises AdapterNotFound."""
        self._store.unload(name)

    @contextmanager
    def rows(self, rows: Sequence[Row]) -> Iterator[None]:
        """Inside, row i of every batch runs under rows[i]; after it, under those around it, if any.

        Raises AdapterNotFound, BlendInvalid.
        """
        outer, leases = self._rows, []
        try:
            for row in rows:
                lease = self._store.acquire(_refs(row))
                leases.append(lease)
                uploads = self._pool.acquire(lease.adapters)
                assert uploads is not None, "in place, there is always room"
                self._pool.upload(uploads)
            self._rows = [
                tuple((self._pool.slot(t.version), t.gamma) for t in lease.blend.terms)
                for lease in leases
            ]
            yield
        finally:
            self._rows = outer
            state = self._installed.state
            state.step = state.head = state.tokens = None
            for lease in leases:
                self._pool.release(tuple(v for v in lease.adapters if v in self._pool))
                lease.release()

    def detach(self) -> None:
        """Put the model's own linears back; a second call does nothing."""
        self._hook.remove()
        vars(self._model).pop("forward", None)
        if self._forward is not None:
            vars(self._model)["forward"] = self._forward
        for linear in self._installed.spec.linears:
            if linear.role in _IN_PLACE:
                path = linear.path.rpartition(".")[0] if linear.role == "experts" else linear.path
                vars(self._model.get_submodule(path)).pop("forward", None)
            elif linear.path in self._originals:
                self._model.set_submodule(linear.path, self._originals.pop(linear.path))

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self._installed.state
        state.step = state.head = state.tokens = None
        rows = self._rows
        if rows is None:
            return
        given = kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        given = args[0] if given is None else given
        count, length = given.shape[:2]
        if count != len(rows):
            raise BlendInvalid(f"the batch has {count} rows, `rows` named {len(rows)}")

        def step(length: int) -> Step | None:
            terms = StepTerms(tuple(RowTerms(length, row) for row in rows))
            return self._backend.prepare(self._tables, terms)

        state.step = step(length)
        state.tokens = None if state.step is None else count * length
        state.head = lambda shape: step(shape[1])

    def _forget(self, version: Digest) -> None:
        self._pool.forget(version)
        self._store.reclaim(version)


def attach(
    model: PreTrainedModel, *, arena_bytes: int = 256 << 20, backend: BackendName = "auto"
) -> Attached:
    """Let a transformers model run a different adapter, or blend, in every row of a batch.

    Its forward computes without gradients until `detach`, in any mode. So long its own linears are
    kept, to be put back: NF4 weights, which backends lay out anew, are in memory twice.

    model        any causal language model, plain or in bitsandbytes NF4 and not yet run; its
                 linears are replaced in place until `detach`
    arena_bytes  memory for all adapters together, in the model's dtype
    Raises BaseUnsupported.
    """
    return Attached(model, arena_bytes=arena_bytes, backend=backend)


def _refs(row: Row) -> list[AdapterRef]:
    if row is None:
        return []
    weights = {row: 1.0} if isinstance(row, str) else row
    return [AdapterRef(name, None, float(weight)) for name, weight in weights.items()]
