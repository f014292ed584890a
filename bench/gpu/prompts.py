"""Steps of prompts: captured ones right to the bit, and their time beside the model's own code."""

import time
from collections.abc import Sequence

import torch

from bench.gpu.model import Machine, Terms
from bench.gpu.parity import demand
from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig, Unavailable, gate
from bench.gpu.steps import machine, refuse
from bench.gpu.timing import Times
from bench.gpu.weights import rms
from fader_adapters.spec import StepTerms
from fader_server.core import Plan
from fader_server.model.batch import Batch

STEPS = ((100,), (256,), (300, 40), (2, 7, 31, 200), (512,))
SMALL_STEPS = ((5, 2, 9),)


def check_prompts(rig: Rig, result: Result) -> None:
    """A replay gives the bits of the model's own code, alone and among others, with deltas too."""
    m = machine(rig)
    if m.graphs is None or m.graphs.prompts is None:
        raise Unavailable(f"steps of prompts were not captured: {m.told}")
    m.drop_adapters()
    slots = m.add_adapters(2, 4 if rig.small else 16)
    other_bits, checked = [], 0
    for sizes in SMALL_STEPS if rig.small else STEPS:
        for adapted in (False, True):
            rig.check_time()
            mixed = [((slot, 1.0),) if adapted else () for slot in slots * 2]
            terms = [() if i == 1 else own for i, own in enumerate(mixed[: len(sizes)])]
            replayed, eager = both_ways(m, sizes, terms)
            demand(rms(replayed, eager), 1e-2, f"a replay of prompts of {sizes}")
            if not torch.equal(replayed, eager):
                other_bits.append(f"{sizes}{' with adapters' if adapted else ''}")
            checked += 1
    own = ((slots[0], 1.0),)
    alone = both_ways(m, (7,), [()])[0]
    if torch.equal(alone, both_ways(m, (7,), [own])[0]):
        raise ParityFailed("the comparison does not notice an adapter")
    if not torch.equal(alone[0], both_ways(m, (7, 9), [(), own])[0][0]):
        other_bits.append("a prompt of 7 beside another")
    m.drop_adapters()
    if other_bits:
        raise BitsDiffer(f"replays of prompts with other bits: {other_bits}")
    told = f"{checked} replays of prompts = the model's own code, bit for bit"
    result.add(told, prompt_replays_checked=checked)


def plan_of(m: Machine, sizes: Sequence[int], terms: Sequence[Terms]) -> Plan:
    """Whole prompts of these sizes, one a row."""
    plans = [m.prompt(i, n, own) for i, (n, own) in enumerate(zip(sizes, terms, strict=True))]
    rows = tuple(row for plan in plans for row in plan.rows)
    return Plan(rows, StepTerms(tuple(t for plan in plans for t in plan.terms.rows)))


def both_ways(
    m: Machine, sizes: Sequence[int], terms: Sequence[Terms]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by the captured graph and operator by operator."""
    assert m.graphs is not None
    plan = plan_of(m, sizes, terms)
    with torch.inference_mode():
        step = m.base.backend.prepare(m.tables, plan.terms)
        replayed = m.graphs.run(plan, step, refuse).clone()
        batch = Batch.from_plan(plan, block_size=m.cache.block_size, device=m.rig.device)
        eager = m.runner._forward(batch, step, lambda _: None)
    if not replayed.isfinite().all():
        raise ParityFailed("logits are not finite")
    return replayed, eager


def measure_prefill(rig: Rig, result: Result) -> None:
    """A prompt in one step, on the base and with an adapter."""
    m = machine(rig)
    if m.graphs is not None and m.graphs.prompts is not None:
        gate(check_prompts, rig, result)
    (slot,) = m.add_adapters(1, 4 if rig.small else 16)
    for tokens in (20,) if rig.small else (128, 256, 512, 1024):
        for own in ((), ((slot, 1.0),)):
            rig.check_time()
            plan = m.prompt(0, tokens, own)
            times = _times(m, plan)
            replays, m.runner._replays = m.runner._replays, None
            plain = _times(m, plan)
            m.runner._replays = replays
            flops = (
                2
                * tokens
                * sum(s.spec.in_features * sum(s.spec.out_features) for s in m.base.installed.sites)
            )
            result.add(
                f"prompt of {tokens}{' with an adapter' if own else ''}: {times.median:.1f} ms, "
                f"{flops / times.median / 1e9:.0f} TFLOP/s in its linears, "
                f"{times.median / plain.median:.2f}× operator by operator",
                tokens=tokens,
                adapter=bool(own),
                linear_tflops=round(flops / times.median / 1e9, 2),
                **times.facts("prompt"),
                **plain.facts("operators"),
            )
    m.drop_adapters()


def _times(m: Machine, plan: Plan) -> Times:
    """Wall time of the runner's step, its one synchronisation included."""
    if m.rig.on_gpu:
        m.runner.run(plan)
    found = []
    for _ in range(10 if m.rig.on_gpu else 1):
        started = time.perf_counter()
        m.runner.run(plan)
        found.append((time.perf_counter() - started) * 1e3)
    return Times.of(found)
