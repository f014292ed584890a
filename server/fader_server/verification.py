"""Fader beside PEFT over the same base, adapters and prompts. Knows no terminal."""

import gc
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE, LocalSources
from fader_server import config
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.core import Request, SamplingParams, TokenEvent
from fader_server.errors import EngineFault
from fader_server.launch import World
from fader_server.metrics import Metrics
from fader_server.peft_side import PeftSide, require_peft
from fader_server.world import open_world

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Dear customer, thank you for your message of 12 March. We are sorry to hear that",
    "1, 1, 2, 3, 5, 8, 13, 21,",
)
FLOOR = 1e-4
"""Of the threshold: below it nobody sees a difference of logprobs."""
SLACK = 2.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt under one adapter, with what came after it."""

    tokens: tuple[int, ...]
    prompt_len: int
    logprobs: tuple[float, ...]
    """Of every token but the first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one adapter showed, or the base for None."""

    adapter: str | None
    positions: int
    """Logprobs that were compared."""
    difference: float
    """Largest |Fader − PEFT| of a logprob."""
    effect: float
    """Largest |adapter − base| of PEFT's logprobs: how much there was to get wrong."""
    same_tokens: int
    """Of Fader's greedy tokens those that PEFT would have taken too."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Verified:
    """All findings and the largest difference that rounding explains."""

    findings: tuple[Finding, ...]
    threshold: float
    """SLACK times what the dtype's rounding did to PEFT itself, or what fp32's may do."""
    dtype: str

    @property
    def ok(self) -> bool:
        return all(finding.difference <= self.threshold for finding in self.findings)


def verify(
    source: str,
    adapters: Mapping[str, Path],
    *,
    dtype: torch.dtype,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = 16,
) -> Verified:
    """Answer every prompt under the base and each adapter with Fader's engine, then with PEFT.

    Raises ConfigInvalid (no PEFT, too little memory, an adapter that is refused),
    ModelUnsupported, RequestInvalid.
    """
    require_peft()
    names = [None, *adapters]
    ours = _fader(source, adapters, names, dtype=dtype, prompts=prompts, tokens=tokens)
    gc.collect()  # the server's base goes before PEFT's comes
    with TemporaryDirectory() as scratch:
        return _beside(ours, source, _as_peft_loads(adapters, Path(scratch)), dtype)


def _beside(
    ours: dict[str | None, list[Answer]],
    source: str,
    adapters: Mapping[str, Path],
    dtype: torch.dtype,
) -> Verified:
    """What PEFT says to Fader's answers."""
    names = list(ours)
    theirs = PeftSide(source, dtype, adapters)
    logits = {name: [_logits(theirs, answer, name) for answer in ours[name]] for name in names}
    without = {name: [_logits(theirs, answer, None) for answer in ours[name]] for name in names}
    threshold = _threshold(theirs, [one for found in logits.values() for one in found])
    del theirs
    if dtype != torch.float32:
        exact = PeftSide(source, torch.float32, adapters)
        for name in names:
            for answer, rounded in zip(ours[name], logits[name], strict=True):
                right = _chosen(_logits(exact, answer, name), answer)
                threshold = max(threshold, SLACK * _largest(_chosen(rounded, answer), right))
    findings = [_finding(name, ours[name], logits[name], without[name]) for name in names]
    return Verified(tuple(findings), threshold, str(dtype).removeprefix("torch."))


def _as_peft_loads(adapters: Mapping[str, Path], scratch: Path) -> dict[str, Path]:
    """The folders, those without PEFT's files written anew below `scratch`. Raises AdapterError."""
    found = dict(adapters)
    for name, folder in adapters.items():
        if not (folder / WEIGHTS_FILE).exists():
            raw = LocalSources(()).fetch_trusted(folder)
            found[name] = scratch / name
            found[name].mkdir()
            (found[name] / CONFIG_FILE).write_bytes(raw.config)
            (found[name] / WEIGHTS_FILE).write_bytes(raw.weights)
    return found


def _fader(
    source: str,
    adapters: Mapping[str, Path],
    names: Sequence[str | None],
    *,
    dtype: torch.dtype,
    prompts: Sequence[str],
    tokens: int,
) -> dict[str | None, list[Answer]]:
    flags = {
        "model": source,
        "served_model_name": "base-of-verify",
        "adapter": [f"{name}={path}" for name, path in adapters.items()],
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "arena": str(_arena(adapters.values())),
        "max_batch_rows": "8",
    }
    with open_world(config.load(flags, {}), Metrics()) as world:
        encoded = [tuple(world.tokenizer.encode_prompt(prompt)) for prompt in prompts]
        return _answers(world, names, encoded, tokens)


def _arena(folders: Iterable[Path]) -> int:
    """Bytes that hold all of them in fp32, whatever they are stored in, at both ends of a tied
    base."""
    files = [file for folder in folders for file in Path(folder).glob("*.safetensors")]
    return (8 << 20) + 8 * sum(file.stat().st_size for file in files)


def _answers(
    world: World, names: Sequence[str | None], prompts: Sequence[tuple[int, ...]], tokens: int
) -> dict[str | None, list[Answer]]:
    """All questions at once, so that adapters share their steps as they do in a server."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, prompt_logprobs=0)
    left = threading.Semaphore(0)
    events: dict[str, list[TokenEvent]] = {}

    def sink(event: TokenEvent) -> None:
        events[event.request_id].append(event)
        if event.finish is not None or event.error is not None:
            left.release()

    leases, asked = [], []
    for number, name in enumerate(names):
        terms = [] if name is None else [NamedTerm(AdapterRef(name), 1.0)]
        lease = world.adapters.acquire(terms)
        leases.append(lease)
        invocation = next((d.spec.invocation for d in lease.adapters.values()), ())
        asked.append(invoked(prompts, invocation))
        for index, prompt in enumerate(asked[-1]):
            request = Request(f"{number}.{index}", prompt, params, lease.blend, lease.adapters)
            events[request.id] = []
            world.engine.submit(request, sink)
    for _ in events:
        left.acquire()
    for lease in leases:
        lease.release()
    return {
        name: [_answer(prompt, events[f"{number}.{index}"]) for index, prompt in enumerate(own)]
        for number, (name, own) in enumerate(zip(names, asked, strict=True))
    }


def invoked(
    prompts: Sequence[tuple[int, ...]], invocation: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Of an activated adapter every prompt with its invocation, at the end or amid it in turn, and
    one without."""
    if not invocation:
        return list(prompts)
    asked = [*prompts[:1]]
    for index, prompt in enumerate(prompts):
        at = len(prompt) // 2 if index % 2 else len(prompt)
        asked.append((*prompt[:at], *invocation, *prompt[at:]))
    return asked


def _logits(side: PeftSide, answer: Answer, name: str | None) -> torch.Tensor:
    return side.logits(answer.tokens, name, prompt_len=answer.prompt_len)


def _answer(prompt: tuple[int, ...], events: Sequence[TokenEvent]) -> Answer:
    tokens, logprobs = list(prompt), []
    for event in events:
        if event.error is not None:
            raise EngineFault(f"the engine failed: {event.error}") from event.error
        logprobs += [one.logprob for one in event.prompt_logprobs]
    for event in events:
        if event.token is not None and event.logprob is not None:
            tokens.append(event.token)
            logprobs.append(event.logprob.logprob)
    return Answer(tuple(tokens), len(prompt), tuple(logprobs))


def _finding(
    name: str | None,
    answers: Sequence[Answer],
    logits: Sequence[torch.Tensor],
    without: Sequence[torch.Tensor],
) -> Finding:
    difference = effect = 0.0
    same = positions = total = 0
    for answer, under, base in zip(answers, logits, without, strict=True):
        theirs = _chosen(under, answer)
        difference = max(difference, _largest(torch.tensor(answer.logprobs), theirs))
        effect = max(effect, _largest(_chosen(base, answer), theirs))
        output = answer.tokens[answer.prompt_len :]
        greedy = under[answer.prompt_len - 1 : -1].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(greedy, output, strict=True))
        positions += len(answer.logprobs)
        total += len(output)
    return Finding(name, positions, difference, effect, same, total)


def _chosen(logits: torch.Tensor, answer: Answer) -> torch.Tensor:
    """The logprob of every token of the answer but the first, by these logits."""
    ids = torch.tensor(answer.tokens[1:])
    return logits[:-1].log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    found = float((a - b).abs().max()) if len(a) else 0.0
    return math.inf if math.isnan(found) else found


def _threshold(side: PeftSide, logits: Sequence[torch.Tensor]) -> float:
    """What fp32 may add up to: its epsilon on the largest logit, over a walk through all sums."""
    largest = max(float(one.abs().max()) for one in logits)
    epsilon = torch.finfo(torch.float32).eps
    return max(FLOOR, SLACK * epsilon * math.sqrt(side.sums) * largest)
