"""Tokens a second with and without prompt lookup, by what outputs repeat of what was said.

A small random model repeats itself where it is greedy, and says nothing twice where tokens are
drawn at temperature 1: the first shows what guesses that come are worth, the second what it costs
to look for some. Foretold: drawn again, by who sends what comes as its `prediction`, with every
16th token changed. Two engines in this process, in turn, without HTTP. No figure unless the tokens
are the same.

    python -m bench.make_model 57m OUT --adapters 8
    python -m bench.prompt_lookup OUT [--tokens 96] [--rounds 9] [--json FILE]
"""

import argparse
import json
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fader_server import config
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.bench.machine import machine_facts
from fader_server.bench.stats import spread
from fader_server.core import Request, SamplingParams, TokenEvent
from fader_server.launch import World
from fader_server.metrics import Metrics
from fader_server.world import open_world

KINDS = {"greedy": 0.0, "drawn": 1.0, "foretold": 1.0}
"""The temperature of each."""
ROWS = (1, 2, 4, 8)
PROMPT = 64
EDITED = 16


def answers(
    world: World,
    prompts: list[list[int]],
    params: SamplingParams,
    predictions: list[list[int]] | None = None,
) -> list[list[int]]:
    """Tokens of requests that run together, each with an adapter of its own but for the first."""
    names = [None, *sorted(info.name for info in world.adapters.list())]
    leases = []
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    for i, prompt in enumerate(prompts):
        name = names[i % len(names)]
        lease = world.adapters.acquire([] if name is None else [NamedTerm(AdapterRef(name), 1.0)])
        leases.append(lease)
        request = Request(
            *(str(i), tuple(prompt), params, lease.blend, lease.adapters, str(prompt)),
            prediction=() if predictions is None else tuple(predictions[i]),
        )
        world.engine.submit(request, events.put)
    found: list[list[int]] = [[] for _ in prompts]
    ended = 0
    while ended < len(prompts):
        event = events.get()
        if event.error is not None:
            raise event.error
        if event.token is not None:
            found[int(event.request_id)].append(event.token)
        ended += event.finish is not None
    for lease in leases:
        lease.release()
    return found


def edited(tokens: list[int]) -> list[int]:
    """With some of them changed."""
    return [token ^ 1 if at % EDITED == EDITED - 1 else token for at, token in enumerate(tokens)]


def measured(worlds: list[World], kind: str, rows: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Of worlds without and with it: tokens a second, their ratio, how many came as guesses."""
    rng = random.Random(rows)
    vocab = worlds[0].tokenizer.vocab_size
    rates: list[list[float]] = [[] for _ in worlds]
    accepted = worlds[1].engine.stats().accepted
    for number in range(rounds + 1):  # the first is for caches
        prompts = [[rng.randrange(20, vocab) for _ in range(PROMPT)] for _ in range(rows)]
        params = SamplingParams(temperature=KINDS[kind], seed=number, max_tokens=tokens)
        told: dict[int, list[list[int]]] = {}
        foretold = kind == "foretold"
        for i in (0, 1) if number % 2 or foretold else (1, 0):
            predictions = [edited(tokens) for tokens in told[0]] if i and foretold else None
            began = time.perf_counter()
            told[i] = answers(worlds[i], prompts, params, predictions)
            rates[i].append(rows * tokens / (time.perf_counter() - began))
        if told[0] != told[1]:
            sys.exit("a guess changed an answer")
    ratios = [b / a for a, b in zip(*rates, strict=True)][1:]
    came = worlds[1].engine.stats().accepted - accepted
    return {
        "kind": kind,
        "rows": rows,
        "without": asdict(spread(rates[0][1:])),
        "with": asdict(spread(rates[1][1:])),
        "ratio": asdict(spread(ratios)),
        "came_as_guesses": came / (rows * tokens * (rounds + 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    adapters = sorted((args.model / "adapters").iterdir())[:8]
    flags = {
        "model": str(args.model / "base"),
        "served_model_name": "base",
        "adapter": [f"{path.name}={path}" for path in adapters],
        "device": "cpu",
    }
    with ExitStack() as stack:
        worlds = [
            stack.enter_context(open_world(config.load(flags | own, {}), Metrics()))
            for own in ({"prompt_lookup": 0}, {})
        ]
        found = [
            measured(worlds, kind, rows, args.rounds, args.tokens)
            for kind in KINDS
            for rows in ROWS
        ]
    document = {
        "command": [Path(sys.executable).name, "-m", "bench.prompt_lookup", *sys.argv[1:]],
        "machine": machine_facts(),
        "prompt": PROMPT,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "results": found,
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    for one in found:
        ratio = one["ratio"]
        print(
            f"{one['kind']:8} {one['rows']} at a time: {one['without']['median']:7.1f} → "
            f"{one['with']['median']:7.1f} tokens/s, {ratio['median']:.2f} times "
            f"({ratio['low']:.2f} … {ratio['high']:.2f}), {one['came_as_guesses']:.0%} as guesses"
        )


if __name__ == "__main__":
    main()
