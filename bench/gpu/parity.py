"""Every kernel against float64, rows alone and in company, NaN traps. No figures without these."""

from collections.abc import Sequence

import torch

from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig
from bench.gpu.shapes import LLAMA_8B, SITE_NAMES, SMALL
from bench.gpu.weights import base_of, exact, expected_deltas, nf4_weight, publish_adapters, rms
from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda.attention import PagedAttention, write_cache
from fader_adapters.kernels.cuda.attention_step import AttentionStep
from fader_adapters.kernels.cuda.lora import DeltaKernels, delta
from fader_adapters.spec import RowTerms, StepTerms

PAGE = 16


def limit(rig: Rig) -> float:
    """Relative error: bf16 rounds codes and results once, in fp32 only sums differ."""
    return 1e-5 if rig.tight else 4e-3


def demand(error: float, most: float, what: str) -> None:
    """Raises ParityFailed above `most`, and for NaN."""
    if not error <= most:
        raise ParityFailed(f"{what}: relative error {error:.2e}, at most {most:.0e} is right")


def check_nf4(rig: Rig, result: Result) -> None:
    """x·Wᵀ + b of every path, and a row's bits among any number of decode rows."""
    shape = SMALL if rig.small else LLAMA_8B
    scratch = nf4.Scratch(rig.device)
    sizes = (1, 3, 17) if rig.small else (1, 2, 4, 8, 9, 16, 17, 33, 64, 65, 128, 200, 512)
    worst, other_bits = 0.0, []
    for name, (width, outs) in zip(SITE_NAMES, shape.sites, strict=True):
        rig.check_time()
        out = sum(outs)
        weight = nf4_weight(out, width, rig)
        bias = torch.randn(out, device=rig.device).to(rig.dtype)
        linear = nf4.linear([weight], bias, scratch)
        dense = exact(weight)
        x = torch.randn(max(sizes), width, device=rig.device).to(rig.dtype)
        for rows in sizes:
            want = x[:rows].double() @ dense.T + bias.double()
            error = rms(linear(x[:rows]), want)
            demand(error, limit(rig), f"NF4 {name} at {rows} rows")
            worst = max(worst, error)
        if rms(linear(x[:1]), 1.02 * (x[:1].double() @ dense.T + bias.double())) <= limit(rig):
            raise ParityFailed("the comparison does not notice two percent")
        full = linear(x[: min(64, max(sizes))])
        other_bits += [
            f"{name} among {rows} rows"
            for rows in sizes
            if rows <= 64 and not torch.equal(linear(x[:rows]), full[:rows])
        ]
        del dense
    if other_bits:
        raise BitsDiffer(f"NF4: a row's bits change in {other_bits}")
    result.add(f"NF4 linears: relative error {worst:.1e}, bits alone = in company", nf4_error=worst)


def mixes(slots: int, rows: int) -> dict[str, StepTerms]:
    """Steps every delta path is checked over."""
    blend = tuple((s, 1.5 - 0.4 * s) for s in range(min(3, slots)))
    return {
        "one row": StepTerms((RowTerms(1, ((0, 1.0),)),)),
        "one adapter": StepTerms((RowTerms(1, ((0, 1.0),)),) * rows),
        "distinct": StepTerms(tuple(RowTerms(1, ((i % slots, 1.0),)) for i in range(rows))),
        "blends": StepTerms(tuple(RowTerms(1, blend if i % 2 else ()) for i in range(rows))),
        "prefill": StepTerms(
            (RowTerms(1, ((0, 1.0),)), RowTerms(5 * rows, blend), RowTerms(3), RowTerms(1, blend))
        ),
    }


def check_lora(rig: Rig, result: Result) -> None:
    """Deltas of every mix at every site against float64, scratch and gaps poisoned."""
    shape = SMALL if rig.small else LLAMA_8B
    base, sites = base_of(shape.sites)
    ranks = (1, 8, 20) if rig.small else (1, 8, 16, 20, 64, 5, 32)
    tables = publish_adapters(base, ranks, rig)
    arch = None if rig.on_gpu else 80
    kernels = DeltaKernels(rig.device, rig.dtype, arch=arch, entries=16 if rig.small else 1024)
    bound = [kernels.bind(site) for site in sites]
    worst = 0.0
    for name, terms in mixes(len(ranks), 4 if rig.small else 48).items():
        rig.check_time()
        tokens = sum(row.tokens for row in terms.rows)
        for site, kernel in zip(sites, bound, strict=True):
            x = torch.randn(tokens, site.in_features, device=rig.device).to(rig.dtype)
            y = torch.randn(tokens, sum(site.out_features), device=rig.device).to(rig.dtype)
            got = y.clone()
            step = kernels.prepare(tables, terms)
            assert step is not None
            step.buffers.z.fill_(torch.nan)
            delta(got, x, kernel, step)
            want = expected_deltas(y, x, site, tables, terms)
            error = rms(got, want)
            demand(error, limit(rig), f"deltas of {name}, {site.in_features} in")
            worst = max(worst, error)
            if rms(y, want) <= limit(rig):
                raise ParityFailed("the comparison does not notice missing deltas")
            plain = [not used for used in _adapted(terms)]
            if not torch.equal(got[plain], y[plain]):
                raise ParityFailed(f"deltas of {name} touch rows of the base")
    _check_infinity(rig)
    result.add(
        f"deltas: relative error {worst:.1e}, NaN and Inf stay in their row", lora_error=worst
    )


def _adapted(terms: StepTerms) -> list[bool]:
    return [bool(row.terms) for row in terms.rows for _ in range(row.tokens)]


def _check_infinity(rig: Rig) -> None:
    """What one adapter makes infinite stays with the rows that use it."""
    base, sites = base_of(SMALL.sites[:1])
    tables = publish_adapters(base, (8, 16), rig)
    a = int(tables.a_offset[1, 0])
    tables.arena[a : a + 16 * SMALL.hidden] = 3e38
    kernels = DeltaKernels(rig.device, rig.dtype, arch=None if rig.on_gpu else 80, entries=16)
    bound = kernels.bind(sites[0])
    x = torch.rand(3, SMALL.hidden, device=rig.device).to(rig.dtype) + 1
    got = torch.zeros(3, bound.out_features, dtype=rig.dtype, device=rig.device)
    one = StepTerms((RowTerms(1, ((0, 1.0),)), RowTerms(1, ((1, 1.0),)), RowTerms(1)))
    step = kernels.prepare(tables, one)
    assert step is not None
    delta(got, x, bound, step)
    if not got[[0, 2]].isfinite().all() or got[1].isfinite().all():
        raise ParityFailed("an infinite adapter leaves its row")


def check_attention(rig: Rig, result: Result) -> None:
    """Mixed steps over poisoned blocks against float64, and a row alone against the same row."""
    shape = SMALL if rig.small else LLAMA_8B
    sizes = [(1, 1), (1, 17), (1, 40), (20, 33), (2, 2)]
    if not rig.small:
        sizes += [(1, 2049), (1, 9000), (700, 700), (65, 1500)]
    worst, other_bits = 0.0, []
    sinks = torch.linspace(-2.0, 6.0, shape.heads, device=rig.device).to(rig.dtype)
    for window, softcap, own in ((0, 0.0, None), (24, 20.0, None), (24, 0.0, sinks)):
        rig.check_time()
        world = _Paged(rig, shape.heads, shape.kv_heads, shape.dim, sizes)
        attend = PagedAttention(
            world.k_cache, world.v_cache, heads=shape.heads, scale=shape.dim**-0.5,
            window=window, softcap=softcap, sinks=own, arch=None if rig.on_gpu else 80,
        )  # fmt: skip
        got = attend(world.q, world.step(range(len(sizes))))
        for row, (count, _) in enumerate(sizes):
            span = slice(world.starts[row], world.starts[row] + count)
            error = rms(got[span], world.dense(row, window, softcap, own))
            demand(error, 1e-5 if rig.tight else 1e-2, f"attention of row {sizes[row]}")
            worst = max(worst, error)
            alone = attend(world.q[span].contiguous(), world.step([row]))
            if not torch.equal(alone, got[span]):
                other_bits.append(sizes[row])
    if other_bits:
        raise BitsDiffer(f"attention: rows {other_bits} have other bits alone")
    result.add(
        f"attention: relative error {worst:.1e}, bits alone = in company", attention_error=worst
    )


class _Paged:
    """Rows of random keys in a cache whose other places are NaN."""

    def __init__(
        self, rig: Rig, heads: int, kv_heads: int, dim: int, sizes: Sequence[tuple[int, int]]
    ) -> None:
        self.sizes, self.groups, self.device = sizes, heads // kv_heads, rig.device
        per_row = [-(-context // PAGE) for _, context in sizes]
        blocks = torch.randperm(sum(per_row)) + 1
        self.tables = [t.tolist() for t in blocks.split(per_row)]
        shape = (sum(per_row) + 1, PAGE, kv_heads, dim)
        options = {"dtype": rig.dtype, "device": rig.device}
        self.k_cache, self.v_cache = (torch.full(shape, torch.nan, **options) for _ in range(2))
        self.starts = [sum(n for n, _ in sizes[:i]) for i in range(len(sizes) + 1)]
        self.q = torch.randn(self.starts[-1], heads, dim, device=rig.device).to(rig.dtype)
        self.k, self.v = [], []
        for table, (_, context) in zip(self.tables, sizes, strict=True):
            k, v = (torch.randn(context, kv_heads, dim, device=rig.device) for _ in range(2))
            self.k.append(k.to(rig.dtype))
            self.v.append(v.to(rig.dtype))
            places = [table[p // PAGE] * PAGE + p % PAGE for p in range(context)]
            slots = torch.tensor(places, device=rig.device)
            write_cache(self.k[-1], self.v[-1], self.k_cache, self.v_cache, slots)

    def step(self, rows: Sequence[int]) -> AttentionStep:
        counts = [self.sizes[row][0] for row in rows]
        contexts = [self.sizes[row][1] for row in rows]
        width = max(len(self.tables[row]) for row in rows)
        single = [c for n, c in zip(counts, contexts, strict=True) if n == 1]
        return AttentionStep(
            cu_tokens=self._ints([sum(counts[:i]) for i in range(len(counts) + 1)]),
            contexts=self._ints(contexts),
            block_tables=self._ints(
                [self.tables[row] + [0] * (width - len(self.tables[row])) for row in rows]
            ),
            tokens=sum(counts),
            context=max(single, default=0),
            decodes=bool(single),
            prefills=len(single) < len(counts),
        )

    def _ints(self, values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def dense(
        self, row: int, window: int, softcap: float, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """[count, heads, dim] in float64."""
        count, context = self.sizes[row]
        q = self.q[self.starts[row] : self.starts[row] + count].double()
        k, v = (t[row].double().repeat_interleave(self.groups, 1) for t in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(context - count, context, device=q.device)[:, None]
        distance = at - torch.arange(context, device=q.device)
        hidden = (distance < 0) | (distance >= (window or context + 1))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            last = sinks.double()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, last], dim=-1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :context], v)
