"""Layers that keep states: a convolution and a recurrence from slot to slot, numbers first."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from bench.gpu.parity import demand, limit
from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig
from bench.gpu.timing import captured, events
from bench.gpu.weights import rms
from fader_adapters.kernels.cuda.states import CudaConvolution, CudaScan
from fader_adapters.kernels.native import ScanForm, StateRows

TAPS = 4
LAYERS = {
    "gated delta rule": ScanForm(16, 32, 128, 128, delta=True, unit=True),
    "decay by key": ScanForm(32, 32, 128, 128, delta=True, unit=True, by_key=True),
    "state space": ScanForm(8, 128, 128, 64, delta=False, unit=False),
}
"""As Qwen3-Next, Kimi-Linear and Nemotron-H have them."""
TINY = {
    "gated delta rule": ScanForm(1, 2, 16, 16, delta=True, unit=True),
    "decay by key": ScanForm(2, 2, 16, 16, delta=True, unit=True, by_key=True),
    "state space": ScanForm(1, 2, 16, 16, delta=False, unit=False),
}
SLOTS = 128


def rows_at(
    counts: Sequence[int], came_from: Sequence[int], to: Sequence[int], device: torch.device
) -> StateRows:
    """Rows of so many tokens; a slot of -1: none."""
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    given = (starts, list(came_from), list(to))
    return StateRows(*(torch.tensor(x, dtype=torch.int32, device=device) for x in given))


@dataclass
class Tokens:
    """What a layer is given: x [T, q, k and v side by side], gates fp32 [T, decays + heads]."""

    x: torch.Tensor
    gates: torch.Tensor

    def cut(self, begin: int, end: int) -> "Tokens":
        return Tokens(self.x[begin:end], self.gates[begin:end])


class StateLayer:
    """A convolution with SiLU over q, k and v, then the recurrence, both over slots."""

    def __init__(self, form: ScanForm, device: torch.device, dtype: torch.dtype) -> None:
        self.form, self.device, self.dtype = form, device, dtype
        width = form.groups * form.keys
        self.places = (0, width, 2 * width)
        self.channels = 2 * width + form.heads * form.values
        self.weight = torch.randn(self.channels, TAPS, device=device).to(dtype) / 2
        self.convolution = CudaConvolution(self.weight, None, slots=SLOTS, silu=True)
        self.scan = CudaScan(form, slots=SLOTS, device=device)
        for kernel in (self.convolution, self.scan):
            kernel.states.fill_(torch.nan)

    @property
    def state_bytes(self) -> int:
        return self.convolution.states[0].nbytes + self.scan.states[0].nbytes

    def made_up(self, tokens: int) -> Tokens:
        form = self.form
        x = torch.randn(tokens, self.channels, device=self.device).to(self.dtype)
        decay = -torch.rand(tokens, form.decays, device=self.device)
        strength = torch.rand(tokens, form.heads, device=self.device)
        return Tokens(x, torch.cat([decay, strength], dim=1))

    def __call__(self, given: Tokens, rows: StateRows) -> torch.Tensor:
        """[T, heads, values] fp32."""
        mixed = self.convolution(given.x, rows)
        return self.scan(mixed, given.gates, rows, places=self.places, dtype=torch.float32)

    def plainly(self, given: Tokens) -> torch.Tensor:
        """The same of one whole sequence by tensors in fp64; roundings in between are theirs."""
        form, tokens = self.form, len(given.x)
        padded = F.pad(given.x.double().t(), (TAPS - 1, 0))[None]
        mixed = F.conv1d(padded, self.weight.double()[:, None], groups=self.channels)[0].t()
        mixed = F.silu(mixed.to(self.dtype).double()).to(self.dtype).double()
        width = form.groups * form.keys
        q, k, v = mixed.split([width, width, form.heads * form.values], dim=1)
        share = form.heads // form.groups
        q, k = (x.view(tokens, form.groups, -1).repeat_interleave(share, 1) for x in (q, k))
        if form.unit:
            q, k = (F.normalize(x, dim=-1, eps=1e-9) for x in (q, k))
            q = q * form.keys**-0.5
        v = v.view(tokens, form.heads, 1, form.values)
        g, beta = given.gates.double().split([form.decays, form.heads], dim=1)
        kept = g.exp().view(tokens, form.heads, -1, 1)
        state = v.new_zeros(form.heads, form.keys, form.values)
        found = []
        for t in range(tokens):
            state = state * kept[t]
            known = k[t][:, None] @ state if form.delta else 0.0
            state = state + k[t][..., None] * ((v[t] - known) * beta[t].view(-1, 1, 1))
            found.append((q[t][:, None] @ state)[:, 0])
        return torch.stack(found)


def check_layer(layer: StateLayer, rig: Rig) -> float:
    """The largest relative error. Raises ParityFailed, and BitsDiffer where a row's bits depend on
    its company or on how it was cut."""
    lengths = (1, 7, 12) if rig.small else (1, 7, 133)
    given, ends = layer.made_up(sum(lengths)), [0, *torch.tensor(lengths).cumsum(0).tolist()]
    parts = [given.cut(ends[i], ends[i + 1]) for i in range(len(lengths))]
    found = layer(given, rows_at(lengths, (-1, -1, -1), (3, 4, 5), rig.device))
    want = torch.cat([layer.plainly(part) for part in parts])
    error = rms(found, want)
    demand(error, limit(rig), "a step of three rows")
    joined = layer(given, rows_at([sum(lengths)], [-1], [6], rig.device))
    if rms(joined, want) <= limit(rig):
        raise ParityFailed("the comparison does not notice another row's state")
    longest, cut = parts[-1], lengths[-1] - 3
    pieces = [layer(longest.cut(0, cut), rows_at([cut], [-1], [7], rig.device))]
    for at in range(cut, lengths[-1]):
        rows = rows_at((1, 1), (-1, 7 + at - cut), (6, 8 + at - cut), rig.device)
        both = Tokens(*(torch.cat([a[:1], b[at : at + 1]]) for a, b in _pairs(given, longest)))
        pieces.append(layer(both, rows)[1:])
    if not torch.equal(torch.cat(pieces), found[ends[-2] :]):
        raise BitsDiffer("a row's bits depend on how it was cut, or on another row")
    for kernel in (layer.convolution, layer.scan):
        if not torch.equal(kernel.states[5], kernel.states[10]):
            raise BitsDiffer("a row's state depends on how it was cut")
    return error


def _pairs(a: Tokens, b: Tokens) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return (a.x, b.x), (a.gates, b.gates)


def measure_states(rig: Rig, result: Result) -> None:
    """One layer of each kind: against fp64, then ms of a decode step and of a prompt's chunk."""
    decoded, chunks = ((1, 3), (12,)) if rig.small else ((1, 8, 64), (256, 2048))
    for name, form in (TINY if rig.small else LAYERS).items():
        rig.check_time()
        layer = StateLayer(form, rig.device, rig.dtype)
        error, told = check_layer(layer, rig), []
        for rows in decoded:
            rig.check_time()
            given, half = layer.made_up(rows), SLOTS // 2
            works = []
            for begin in range(0, half, rows)[: 2 if rig.small else 8]:
                slots = range(begin, begin + rows)
                to = [slot + half for slot in slots]
                where = rows_at([1] * rows, list(slots), to, rig.device)
                works.append(partial(layer, given, where))
            times = captured(rig, works)
            moved = 2 * rows * layer.state_bytes / (times.median * 1e6)
            result.add(
                None, states=name, rows=rows, gb_per_s=round(moved, 1), **times.facts("decode")
            )
            told.append(f"× {rows}: {times.median:.3f}")
        for tokens in chunks:
            rig.check_time()
            given = layer.made_up(tokens)
            where = rows_at([tokens], [-1], [0], rig.device)
            times = events(rig, partial(layer, given, where))
            result.add(None, states=name, tokens=tokens, **times.facts("prompt"))
            told.append(f"{tokens} tokens: {times.median:.3f}")
        result.add(f"{name}, error {error:.1e}; ms a layer {', '.join(told)}")
