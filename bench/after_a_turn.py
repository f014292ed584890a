"""The first token of a call after a turn of the base, over the same history: base, LoRA, aLoRA.

The same weights, once as an ordinary adapter and once activated by tokens at the history's end. The
engine in this process, without HTTP; a new history a round, its calls in turn. No figure unless the
activated call's answer is bit for bit what it is where nothing can be found.

    python -m bench.make_model 57m OUT --adapters 1
    python -m bench.after_a_turn OUT [--history 1000] [--rounds 15] [--json FILE]
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from fader_adapters.invocation import KEY
from fader_server import config
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.bench.machine import machine_facts
from fader_server.bench.stats import spread
from fader_server.core import Request, SamplingParams, TokenEvent
from fader_server.launch import World
from fader_server.metrics import Metrics
from fader_server.world import open_world

INVOCATION = (7, 8, 9, 10)
QUESTION, ANSWER = 12, 32
"""Tokens of a call after its invocation, and of the base's turn."""
CALLS = ("base", "ordinary", "activated")


@dataclass(frozen=True, slots=True)
class Answered:
    """One request."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int
    """Of the prompt's tokens, those that were found."""
    first: float
    """Seconds from its submission to its first token."""


def activated(adapter: Path, folder: Path) -> Path:
    """The same weights, activated by INVOCATION."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: INVOCATION}))
    return folder


def answer(world: World, name: str, prompt: Sequence[int], count: int, *, salt: str) -> Answered:
    """Alone in the engine. Raises what the engine says."""
    terms = [] if name == "base" else [NamedTerm(AdapterRef(name), 1.0)]
    lease = world.adapters.acquire(terms)
    params = SamplingParams(temperature=0.0, max_tokens=count, logprobs=0)
    request = Request(name, tuple(prompt), params, lease.blend, lease.adapters, salt)
    events: SimpleQueue[tuple[float, TokenEvent]] = SimpleQueue()
    began = time.perf_counter()
    world.engine.submit(request, lambda event: events.put((time.perf_counter(), event)))
    tokens: list[int] = []
    logprobs: list[float] = []
    first, cached = 0.0, 0
    while True:
        at, event = events.get()
        if event.error is not None:
            raise event.error
        if event.token is not None and event.logprob is not None:
            first = first or at - began
            cached = max(cached, event.cached_tokens)
            tokens.append(event.token)
            logprobs.append(event.logprob.logprob)
        if event.finish is not None:
            lease.release()
            return Answered(tuple(tokens), tuple(logprobs), cached, first)


def round_of(world: World, number: int, history: int) -> dict[str, Answered]:
    """A turn of the base, then every call over it, each time another first."""
    rng, salt = random.Random(number), str(number)
    said = [rng.randrange(20, world.tokenizer.vocab_size) for _ in range(history)]
    said += answer(world, "base", said, ANSWER, salt=salt).tokens
    asked = [*said, *INVOCATION, *(rng.randrange(20, 500) for _ in range(QUESTION))]
    names = [CALLS[(number + i) % len(CALLS)] for i in range(len(CALLS))]
    found = {name: answer(world, name, asked, 8, salt=salt) for name in names}
    alone = answer(world, "activated", asked, 8, salt=f"{number}, alone")
    called = found["activated"]
    if alone.cached or (alone.tokens, alone.logprobs) != (called.tokens, called.logprobs):
        sys.exit("the answer over a history that was found is another than alone")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--history", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plain = min((args.model / "adapters").iterdir())
    with tempfile.TemporaryDirectory() as folder:
        own = activated(plain, Path(folder) / "activated")
        flags = {
            "model": str(args.model / "base"),
            "served_model_name": "base",
            "adapter": [f"ordinary={plain}", f"activated={own}"],
            "device": "cpu",
        }
        with open_world(config.load(flags, {}), Metrics()) as world:
            rounds = [round_of(world, number, args.history) for number in range(args.rounds + 1)]
    timed = {name: [own[name] for own in rounds[1:]] for name in CALLS}  # the first is for caches
    document = {
        "command": [Path(sys.executable).name, "-m", "bench.after_a_turn", *sys.argv[1:]],
        "machine": machine_facts(),
        "rounds": args.rounds,
        "history": args.history + ANSWER,
        "prompt": args.history + ANSWER + len(INVOCATION) + QUESTION,
        "cached": {name: sorted({one.cached for one in own}) for name, own in timed.items()},
        "first_token_ms": {
            name: asdict(spread([one.first * 1000 for one in own])) for name, own in timed.items()
        },
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    for name, told in document["first_token_ms"].items():
        print(
            f"{name:10} {told['median']:7.1f} ms ({told['low']:.1f} … {told['high']:.1f}), "
            f"{document['cached'][name]} of {document['prompt']} tokens found"
        )


if __name__ == "__main__":
    main()
