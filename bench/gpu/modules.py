"""Norms, rotary positions and gates beside the model's own code on the device, bit for bit."""

from collections.abc import Callable

import torch
from transformers.models.llama import modeling_llama

from bench.gpu.figures import shape_of
from bench.gpu.parity import demand
from bench.gpu.section import BitsDiffer, ParityFailed, Result, Rig
from bench.gpu.weights import rms
from fader_adapters.kernels.cuda.norm import rms_norm
from fader_adapters.kernels.cuda.pointwise import gated, rotary


def check_modules(rig: Rig, result: Result) -> None:
    """Rows of the 8B shape: how near, how many values of other bits, and a row alone."""
    shape = shape_of(rig)
    rows = 3 if rig.small else 64

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=rig.device).to(rig.dtype)

    x, weight = random(rows, shape.hidden), random(shape.hidden)
    norm = modeling_llama.LlamaRMSNorm(shape.hidden, eps=1e-5).to(rig.device, rig.dtype)
    norm.weight.data.copy_(weight)
    joint = random(rows, 2 * shape.inter)  # as the site leaves them
    gate, up = joint.split(shape.inter, dim=1)
    heads = random(rows, shape.heads + 2 * shape.kv_heads, shape.dim)
    q, k = heads[:, : shape.heads], heads[:, shape.heads : shape.heads + shape.kv_heads]
    cos, sin = random(rows, shape.dim), random(rows, shape.dim)

    def turned(n: slice, own: bool) -> torch.Tensor:
        given = (q[n], k[n], cos[n], sin[n])
        if not own:
            return torch.cat(rotary(*given), dim=1)
        of = [t[None].transpose(1, 2) if t.dim() == 3 else t[None] for t in given]
        pair = modeling_llama.apply_rotary_pos_emb(*of)
        return torch.cat([t[0].transpose(0, 1) for t in pair], dim=1)

    ways: dict[str, tuple[Callable[[slice], torch.Tensor], torch.Tensor]] = {
        "norm": (lambda n: rms_norm(x[n], weight, eps=1e-5, form="scale"), norm(x).detach()),
        "rotary": (lambda n: turned(n, False), turned(slice(None), True)),
        "gate": (lambda n: gated(gate[n], up[n], "silu"), torch.nn.functional.silu(gate) * up),
    }
    alone, told = [], []
    for name, (ours, want) in ways.items():
        got = ours(slice(None))
        demand(rms(got, want), 1e-6 if rig.tight else 4e-3, name)
        if rms(got, 1.02 * want) <= 4e-3:
            raise ParityFailed("the comparison does not notice two percent")
        other = float((got != want).double().mean())
        told.append(f"{name} {other:.2%}")
        result.add(module=name, error=rms(got, want), other_bits=other)
        if not torch.equal(ours(slice(1, 2)), got[1:2]):
            alone.append(name)
    if alone:
        raise BitsDiffer(f"modules: rows have other bits alone in {alone}")
    result.add(f"modules: values of other bits than torch's: {', '.join(told)}")
