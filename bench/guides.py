"""What a guided token costs the processor: its guide, and its row in the sampler beside a free one.

python -m bench.guides [--base MODEL] [--tokens N]
"""

import argparse
import asyncio
import json
import random
import statistics
import time

import numpy as np
import torch

from fader_server import demo
from fader_server.bench.machine import machine_facts
from fader_server.core import Request, SamplingParams, Sequence
from fader_server.model.distribution import NativeDistributions
from fader_server.model.sampler import Sampler
from fader_server.text.shape import Shape
from fader_server.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "kind": {"enum": ["person", "place", "thing"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
SHAPE = Shape("schema", json.dumps(SCHEMA))


async def guided(tokenizer: Tokenizer, count: int) -> list[float]:
    """Seconds of each token, over whole answers that were parsed."""
    rng, found = random.Random(0), []
    while len(found) < count:
        (guide,) = await tokenizer.guides(SHAPE, 1)
        tokens: list[int] = []
        while not guide.ended:
            began = time.thread_time()
            bits = guide.allowed()
            seconds = time.thread_time() - began
            allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").nonzero()[0]
            tokens.append(int(rng.choice(allowed)))
            began = time.thread_time()
            guide.accept(tokens[-1])
            found.append(seconds + time.thread_time() - began)
        assert list(json.loads(tokenizer.decode(tokens))) == list(SCHEMA["properties"])
    return found


async def sampled(tokenizer: Tokenizer, rows: int, *, free: bool) -> list[float]:
    """Seconds a row of sampling steps at temperature 1."""
    guides = await tokenizer.guides(SHAPE, rows)
    logits = torch.randn(rows, tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.0)
    sequences = [
        Sequence(Request(str(i), (1,), params, guide=None if free else guide), [1])
        for i, guide in enumerate(guides)
    ]
    sampler, found = Sampler(NativeDistributions()), []
    for _ in range(30):
        began = time.perf_counter()
        results = sampler.sample(logits, sequences)
        found.append((time.perf_counter() - began) / rows)
        assert all(result.token is not None for result in results)
    return found[5:]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=str(demo.base_dir()))
    parser.add_argument("--tokens", type=int, default=4000)
    given = parser.parse_args()
    tokenizer = Tokenizer.load(given.base, max_model_len=4096)
    began = time.perf_counter()
    await tokenizer.guides(SHAPE, 1)
    first = time.perf_counter() - began
    costs = [seconds * 1e6 for seconds in await guided(tokenizer, given.tokens)]
    spread = np.quantile(costs, [0.5, 0.99, 1.0])
    print(json.dumps(machine_facts()))
    print(f"{tokenizer.vocab_size} tokens; first schema {first:.2f} s")
    print(
        f"guide: mean {statistics.mean(costs):.0f} µs a token, median {spread[0]:.0f}, "
        f"p99 {spread[1]:.0f}, most {spread[2]:.0f} ({len(costs)} tokens)"
    )
    for free in (True, False):
        name = "free" if free else "guided"
        times = [s * 1e6 for s in await sampled(tokenizer, 8, free=free)]
        print(
            f"sampler, 8 {name} rows: {statistics.median(times):.0f} µs a row "
            f"({min(times):.0f} … {max(times):.0f}, 25 steps)"
        )


if __name__ == "__main__":
    asyncio.run(main())
