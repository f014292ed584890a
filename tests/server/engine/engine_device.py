"""A device in plain integers, on the caller's thread or computing by itself.

It keeps keys and values as hash chains: a position's content depends on every token before it and
on the versions that stood in the row's slots. A token depends on all contents read through the
row's blocks. So a stale, foreign, unwritten or shared block, a wrong slot or a wrong weight changes
the tokens.
"""

from collections import deque
from dataclasses import dataclass

from fader_adapters.spec import Digest, Upload
from fader_server.core import Launched, Plan, PlanRow, RowResult, Sequence, TokenLogprob
from fader_server.errors import EngineFault
from fader_server.model.state_slots import NOBODY, StateSlots
from tests.server.engine.engine_guides import guided

VOCAB = 50
LOOPS = 100


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


class Device:
    """The runner: see the module's docstring."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.size = block_size
        self.kv = [[-1 - b * block_size - o for o in range(block_size)] for b in range(blocks)]
        self.arena: dict[int, int] = {}
        self.culprits: set[str] = set()
        self.nan: set[str] = set()
        self.bad_uploads: set[Digest] = set()
        self.out_of_memory_above = 10**9
        """Tokens a step may have."""
        self.broken = False
        self.plans: list[Plan] = []
        self.runs = 0

    def upload(self, uploads: tuple[Upload, ...]) -> None:
        for one in uploads:
            if one.data.spec.version in self.bad_uploads:
                raise RuntimeError("injected")
            self.arena[one.slot] = int(one.data.spec.version[:12], 16)

    def content(self, slot: int) -> int:
        """What stands in a slot: the first digits of a version."""
        return self.arena[slot]

    def run(self, plan: Plan) -> list[RowResult]:
        self.runs += 1
        if self.broken:
            raise RuntimeError("device lost")
        if plan.tokens > self.out_of_memory_above:
            raise OutOfMemoryError("injected")
        if any(row.sequence.request.id in self.culprits for row in plan.rows):
            raise RuntimeError("injected")
        self.plans.append(plan)
        after = []
        before = self._before(plan)
        for row, terms, content in zip(plan.rows, plan.terms.rows, before, strict=True):
            assert terms.tokens == row.count
            if row.guesses:  # after those that stand before it
                content = self._read(row.sequence, row.start - 1)
            key = tuple((self.content(slot), gamma) for slot, gamma in terms.terms)
            for at, token in enumerate(row.tokens, row.start):
                content = hash((content, token, key))
                block = row.sequence.blocks[at // self.size]
                self.kv[block][at % self.size] = content
            after.append(content)
        self._computed(plan, after)
        return [self._result(row) for row in plan.rows]

    def _before(self, plan: Plan) -> list[int]:
        """What the rows go on from."""
        return [self._read(row.sequence, row.start - 1) for row in plan.rows]

    def _computed(self, plan: Plan, contents: list[int]) -> None: ...

    def _read(self, sequence: Sequence, at: int) -> int:
        return self.kv[sequence.blocks[at // self.size]][at % self.size] if at >= 0 else 0

    def _result(self, row: PlanRow) -> RowResult:
        sequence, end = row.sequence, row.start + row.count
        scored = ()
        if row.wants_prompt_logprobs:
            last = min(end, sequence.prompt_len - 1)
            scored = tuple(
                TokenLogprob(sequence.tokens[p + 1], float(self._read(sequence, p)))
                for p in range(row.start, last)
            )
        if not row.samples:
            return RowResult(prompt_logprobs=scored)
        contents = tuple(self._read(sequence, p) for p in range(end))
        token = draw(sequence.request.params.seed, contents)
        if sequence.request.guide is not None:
            try:
                token = guided(sequence.request.guide.allowed(), token)
            except EngineFault as fault:
                return RowResult(fault=fault)
        finite = sequence.request.id not in self.nan
        return RowResult(token, TokenLogprob(token, 0.0), scored, finite)


class Stateful(Device):
    """Rows go on from states, whatever their blocks hold."""

    def __init__(self, blocks: int, block_size: int) -> None:
        super().__init__(blocks, block_size)
        self.slots = StateSlots()
        self.states = {NOBODY: 0}

    def _before(self, plan: Plan) -> list[int]:
        came_from, self._to = self.slots.places(plan.rows)
        assert not set(self._to) & set(came_from), "a state is written over that is read"
        assert len(set(self._to)) == len(self._to)
        return [self.states[slot] for slot in came_from]

    def _computed(self, plan: Plan, contents: list[int]) -> None:
        self.states.update(zip(self._to, contents, strict=True))
        self.slots.computed(plan.rows)


class Ahead(Device):
    """A device that computes by itself, from what it was told when a step began: in that order and
    as late as it may, when results are asked for. Copies of adapters wait for what began before.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        super().__init__(blocks, block_size)
        self.queue: deque[UnderWay] = deque()
        self.led = 0
        """Steps that began before the tokens of the step in front were known."""

    def launch(self, plan: Plan) -> Launched:
        return self.queued(UnderWay(self, _copy(plan)))

    def queued(self, step: "UnderWay") -> "UnderWay":
        self.queue.append(step)
        return step

    def upload(self, uploads: tuple[Upload, ...]) -> None:
        self.compute(None)
        super().upload(uploads)

    def run(self, plan: Plan) -> list[RowResult]:
        self.compute(None)
        return super().run(plan)

    def execute(self, plan: Plan) -> list[RowResult]:
        """What the device does of a step."""
        return Device.run(self, plan)

    def compute(self, last: "UnderWay | None") -> None:
        """Everything up to this step; all there is for None."""
        while self.queue and (last is None or last.found is None):
            self.queue.popleft().compute()


@dataclass(eq=False)
class UnderWay:
    device: Ahead
    plan: Plan
    before: "UnderWay | None" = None
    found: list[RowResult] | Exception | None = None

    def ahead(self, plan: Plan) -> "UnderWay":
        assert [row.sequence.request.id for row in plan.rows] == [
            row.sequence.request.id for row in self.plan.rows
        ]
        assert self.found is None, "its tokens are known"
        assert not any(row.sequence.request.guide for row in plan.rows), "a guide is behind"
        self.device.led += 1
        copy = _copy(plan)
        for row in copy.rows:
            assert row.start == len(row.sequence.tokens)
        return self.device.queued(UnderWay(self.device, copy, self))

    def compute(self) -> None:
        before = self.before
        if before is not None:
            drawn = before.found if isinstance(before.found, list) else [RowResult(0)] * 99
            for row, result in zip(self.plan.rows, drawn, strict=False):
                row.sequence.tokens.append(result.token or 0)
        try:
            self.found = self.device.execute(self.plan)
        except Exception as error:  # noqa: BLE001 - kept for whoever waits
            self.found = error

    def results(self) -> list[RowResult]:
        self.device.compute(self)
        if isinstance(self.found, Exception):
            raise self.found
        assert self.found is not None
        return self.found


def _copy(plan: Plan) -> Plan:
    """What the device is told of a plan: whatever the sequences become, it knows this."""
    rows = []
    for row in plan.rows:
        own = row.sequence
        told = Sequence(own.request, list(own.tokens), row.start, list(own.blocks))
        rows.append(PlanRow(told, row.start, row.count, row.samples, row.guesses))
    return Plan(tuple(rows), plan.terms)


def draw(seed: int, contents: tuple[int, ...]) -> int:
    """From LOOPS on a seed is one of outputs that mostly say the same again."""
    number = hash((seed, contents))
    return len(contents) % 4 if seed >= LOOPS and number % 8 else number % VOCAB
