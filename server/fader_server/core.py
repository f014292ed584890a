"""The nouns, read first: requests, sequences, plans, events. Integers only, no torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from fader_adapters.spec import BASE, AdapterData, Blend, Digest, RowTerms, StepTerms, Upload
from fader_server.phases import Phase, phases_of

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Validated by the API layer; the engine trusts it."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as in transformers."""
    presence_penalty: float = 0.0
    """Over output only, as OpenAI defines it."""
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """Always set: the API layer draws one when the client gives none."""
    logprobs: int | None = None
    """None: off; n ≥ 0: the chosen token's logprob and the n most likely."""
    prompt_logprobs: int | None = None
    """The same for every prompt position but the first."""
    max_tokens: int = 16
    min_tokens: int = 0
    """No stop token id before this many output tokens."""
    stop_token_ids: frozenset[int] = frozenset()
    """EOS and the client's own; empty under ignore_eos."""

    @property
    def penalises(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )


class Guide(Protocol):
    """What one output may be, and how far it is. Used on the engine's thread only.

    What `allowed` and `accept` raise is an EngineFault: it ends this request and no other.
    """

    @property
    def ended(self) -> bool:
        """The output is whole: nothing may follow."""
        ...

    def allowed(self) -> bytes:
        """A bit for each token id, lowest first, set where it may come next; no id beyond may.

        The model's own stop tokens may where the output may end. Changes nothing: a step may run
        again.
        """
        ...

    def accept(self, token: int) -> None:
        """The token was put out."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. A call with n choices and p prompts is n·p requests."""

    id: str
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    params: SamplingParams
    blend: Blend = BASE
    adapters: Mapping[Digest, AdapterData] = field(default_factory=dict)
    """Data of every version in the blend, kept alive by the caller's lease to the last event."""
    cache_salt: str = ""
    """Namespace of the prefix cache beside the blend: requests of one salt may share blocks."""
    tenant: str = ""
    """Whose it is; the queue is fair between tenants."""
    guide: Guide | None = None
    """Of its output, at the start; no other request has it. It moves when a token is committed."""
    phases: tuple[Phase, ...] = ()
    """Which blend computes which of its tokens: that of its prompt, found where nobody gave it."""
    prediction: tuple[int, ...] = ()
    """What its output may be like. It changes no token, only how soon they come."""

    def __post_init__(self) -> None:
        if not self.phases:
            phases = phases_of(self.prompt, self.blend, self.adapters)
            object.__setattr__(self, "phases", phases)


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """A merged lane that is ready: weights of its own for one blend. Told apart by identity."""

    blend: Digest
    """Whose requests it runs."""
    key: Digest
    """sha256 of what its weights are made of: seeds its prefix cache."""


TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, logprob) pairs, most likely first."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Logprob of one token under the raw distribution (before temperature and truncation)."""

    token: int
    logprob: float
    top: TopLogprobs = ()


LaneName = Literal["delta", "merged"]
"""The base with its deltas, or weights that a blend was merged into."""


@dataclass(frozen=True, slots=True)
class Admission:
    """How a request came to run; later preemptions change nothing of it."""

    queued: float
    """Seconds from its submission."""
    lane: LaneName


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step did for one request. Exactly one event of a request has `finish` or `error`."""

    request_id: str
    token: int | None = None
    """None when the event only carries prompt logprobs or the end."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For the next prompt positions in order; all of them arrive before or with the first token."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; set on the first event with a token or `finish`."""
    finish: FinishReason | None = None
    error: Exception | None = None
    admitted: Admission | None = None
    """Set on a request's first event after its admission."""
    guessed: bool = False
    """The token before this one had been guessed: they came in one step."""


Sink = Callable[[TokenEvent], None]
"""Called on the engine thread; must return at once and never raise."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """A request inside the engine. Owned by the engine thread; changed by the scheduler only."""

    request: Request
    tokens: list[int]
    """Prompt, then output."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    """KV block ids; position p lives in blocks[p // block_size]. Empty when it is not running."""
    cached_tokens: int = 0
    prompt_logprobs_sent: int = 0
    arrival: int = 0
    """Its place in the order of arrival: larger is newer."""
    decoding: bool = False
    """Only the newest token's keys and values are missing."""
    terms: tuple[RowTerms, ...] = (RowTerms(1),)
    """The delta work of a token in each of its phases, fixed from admission on: its versions stay
    pinned."""
    keys: list[bytes] = field(default_factory=list)
    """Prefix-cache keys of its first full blocks, extended when asked for."""
    published: int = 0
    """Leading blocks that others may already find."""
    lane: Lane | None = None
    """The merged lane it was admitted to, for good; None: the base with its deltas."""
    settled: bool = False
    """It was admitted once: its lane does not change any more."""
    overtaken: int = 0
    """Requests admitted before it while its adapters had no room."""

    @property
    def adapters(self) -> Mapping[Digest, AdapterData]:
        """What it needs on the device while it runs: a merged lane has it in its weights."""
        return {} if self.lane is not None else self.request.adapters

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def output_len(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def phase_at(self, position: int) -> int:
        """Index of the phase that the token there is in."""
        phases = self.request.phases
        return next(i for i in reversed(range(len(phases))) if phases[i].start <= position)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One sequence's share of a step: tokens[start:start+count] are computed."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """True when the row reaches the sequence's last token and a new one is wanted."""
    guesses: tuple[int, ...] = ()
    """Tokens that may come after the sequence's own, of which this row computes the last; what it
    samples counts if all of them came. Its sequence's rows for the tokens before stand in the same
    step, before it."""

    @property
    def tokens(self) -> list[int]:
        """The ids that it computes."""
        if self.guesses:
            return [self.guesses[-1]]
        return self.sequence.tokens[self.start : self.start + self.count]

    @property
    def unseen(self) -> int:
        """Tokens, up to those it computes, that its sequence does not hold yet: guesses, or what a
        step under way draws."""
        return self.start + self.count - len(self.sequence.tokens)

    @property
    def lane(self) -> Lane | None:
        """Whose weights compute it."""
        return self.sequence.lane

    @property
    def wants_prompt_logprobs(self) -> bool:
        return (
            self.sequence.request.params.prompt_logprobs is not None
            and self.start < self.sequence.prompt_len
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """One step, decided in integers."""

    rows: tuple[PlanRow, ...]
    """Decode rows first, then prefill chunks."""
    terms: StepTerms
    """One RowTerms per row, same order."""
    uploads: tuple[Upload, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What the device returns for one row of a plan."""

    token: int | None = None
    """The sampled token; None when the row does not sample."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For prompt positions start + 1 .. min(start + count, prompt_len - 1), when wanted."""
    finite: bool = True
    """False when the row's logits hold NaN or +Inf, or nothing finite: the request fails, its
    neighbours do not."""
    fault: Exception | None = None
    """What the row's guide raised: the request fails with it, its neighbours do not."""


class Runner(Protocol):
    """The device side of a step. Running a plan again before it is committed changes nothing.

    Block 0 belongs to nobody: rows may write it, and nothing that it holds reaches a result.
    """

    def run(self, plan: Plan) -> list[RowResult]:
        """Compute every row of the plan; one result per row, same order."""
        ...


class Launched(Protocol):
    """A step under way on a device that computes by itself."""

    @property
    def ahead(self) -> "Callable[[Plan], Launched] | None":
        """Begins the step after this one, before anybody has seen its tokens, once, and returns
        soon; None where the device cannot.

        Its plan: the same rows in the same order, each by the one token that it samples now. What
        they compute may be thrown away; nothing that this step wrote is changed.
        """
        ...

    def results(self) -> list[RowResult]:
        """Wait for it, once: what `run` gives, or raises."""
        ...


@runtime_checkable
class LaunchRunner(Runner, Protocol):
    """A runner whose device computes while the caller goes on."""

    def launch(self, plan: Plan) -> Launched:
        """Begin a step and return soon: nothing here waits for the device."""
        ...


class AdapterPool(Protocol):
    """The device tier as the scheduler sees it: integers only. Owned by the engine thread."""

    @property
    def numel(self) -> int | None:
        """Elements that versions in use compete for; None where all that are loaded are there."""
        ...

    def check(self, data: Mapping[Digest, AdapterData]) -> None:
        """Raise AdapterTooLarge when these versions can never be there together. Any thread."""
        ...

    def displaces(self, data: Mapping[Digest, AdapterData]) -> bool:
        """Whether `acquire` would have to evict something for these, or find no room."""
        ...

    def prefetch(self, line: Iterable[Mapping[Digest, AdapterData]]) -> tuple[Upload, ...]:
        """Bring in, unpinned, what the first of a waiting line miss, as far as there is room.

        Evicts nothing that is pinned or that anybody in the line needs. Call it once a step.
        """
        ...

    def acquire(self, data: Mapping[Digest, AdapterData]) -> tuple[Upload, ...] | None:
        """Pin every version on the device, evicting unpinned ones; None: not now, nothing changed.

        Versions already there need no upload. Raises AdapterTooLarge when they can never fit.
        """
        ...

    def release(self, versions: tuple[Digest, ...]) -> None:
        """Undo one acquire."""
        ...

    def slot(self, version: Digest) -> int:
        """The slot of a pinned version."""
        ...

    def forget(self, version: Digest) -> None:
        """The version left the host: drop it once unpinned."""
        ...
