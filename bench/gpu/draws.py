"""Drawing tokens from whole vocabularies: by the kernels beside tensors alone, tokens first."""

from functools import partial

import numpy as np
import torch

from bench.gpu.section import ParityFailed, Result, Rig
from bench.gpu.timing import events
from fader_server.model import gumbel
from fader_server.model.cuda_distribution import CudaDistributions
from fader_server.model.distribution import Draws, TorchDistributions
from fader_server.model.mass import Limits

FORMS = {"all tokens": 1.0, "top_p 0.9": 0.9}


def draws_of(rows: int, top_p: float, *, seed: int = 0) -> Draws:
    """At temperature 0.8, a key for each row."""
    limits = Limits(np.zeros(rows, np.int64), np.full(rows, top_p), np.zeros(rows))
    keys = [gumbel.draw_key(seed, row) for row in range(rows)]
    return Draws(np.full(rows, 0.8, np.float32), limits, np.array(keys, np.int64))


def measure_draws(rig: Rig, result: Result) -> None:
    """Of a vocabulary of 128,256: the same tokens, a row alone the same, then times."""
    vocab, sizes = (300, (1, 3)) if rig.small else (128_256, (1, 8, 64))
    ours, plain = CudaDistributions(vocab, rig.device), TorchDistributions()
    logits = 3 * torch.randn(max(sizes), vocab, device=rig.device)
    told = []
    for name, top_p in FORMS.items():
        for rows in sizes:
            rig.check_time()
            index, draws = torch.arange(rows, device=rig.device), draws_of(rows, top_p)
            tokens = ours.draw(logits, index, draws)
            if not torch.equal(tokens, plain.draw(logits, index, draws)):
                raise ParityFailed(f"{rows} rows draw others of {name} than tensors do")
            if not torch.equal(tokens[:1], ours.draw(logits, index[:1], draws_of(1, top_p))):
                raise ParityFailed(f"a row draws another token of {name} alone")
            if rows > 1 and torch.equal(
                tokens, ours.draw(logits, index, draws_of(rows, top_p, seed=1))
            ):
                raise ParityFailed("the comparison does not notice other keys")
            times = {
                way: events(rig, partial(by.draw, logits, index, draws))
                for way, by in (("kernels", ours), ("tensors", plain))
            }
            facts = times["kernels"].facts("kernels") | times["tensors"].facts("tensors")
            result.add(None, draws=name, rows=rows, **facts)
            told.append(f"{name} × {rows}: {times['kernels'].median:.3f}")
    result.add(f"ms to draw, {'; '.join(told)}")
