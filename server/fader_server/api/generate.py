"""A generation call from names and text to deltas: leases, submits, follows, releases.

The only place that holds leases and engine requests for HTTP. Knows no wire format.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fader_server.api.activated import activated, not_invoked
from fader_server.api.adapter_ports import Lease
from fader_server.api.calling import CallingChoice
from fader_server.api.choice import Choice, Delta
from fader_server.api.errors import FirstTokenTimeout
from fader_server.api.mailbox import Bell, Mailbox
from fader_server.api.observe import CallRecord
from fader_server.api.ports import Echo, Engine, Tokenizer
from fader_server.api.prepare import Preparer
from fader_server.api.quotas import Counted, Quotas
from fader_server.api.resolve import Target, label_of, lease_target, resolve
from fader_server.api.schemas import Call
from fader_server.api.visible import Visible
from fader_server.core import Guide, Request, TokenEvent
from fader_server.errors import Overloaded, RequestTimeout


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole call; a prompt counts once however many choices it has."""

    prompt: int
    completion: int
    cached: int
    thought: int
    """Of the completion."""
    guessed: int
    """Of the completion, those that came sooner because they had been guessed."""
    foretold: int
    """Tokens of what each answer was said to be like."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds a call may take."""

    first_token: float
    total: float


class Generator:
    """Starts calls, and knows those under way so that a drain can end them."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        quotas: Quotas,
        *,
        base_name: str,
        max_model_len: int,
        patience: Patience,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self.quotas = quotas
        self._base_name = base_name
        self._preparer = Preparer(tokenizer, max_model_len=max_model_len)
        self._patience = patience
        self._live: set[Generation] = set()
        self._bell: Bell | None = None
        self._closed: Overloaded | None = None

    def end_all(self) -> None:
        """Fail every call under way and every new one: the server goes down."""
        self._closed = Overloaded("The server is shutting down.", retry_after=5)
        for generation in self._live:
            generation.fail(self._closed)

    async def start(
        self, call: Call, visible: Visible, *, id: str, tenant: str, record: CallRecord
    ) -> "Generation":
        """Lease, tokenise and submit, all or nothing. The caller closes the generation.

        Raises ModelNotFound, RecipeIncomplete, BlendInvalid, ContextTooLong, Overloaded,
        TenantBusy, RequestInvalid; for an adapter loaded on demand also FirstTokenTimeout and
        AdapterError.
        """
        if self._closed is not None:
            raise self._closed
        target = resolve(call.model, call.terms, base=self._base_name, recipes=visible.find)
        lease = await self._lease(target, visible)
        try:
            label, merges = label_of(target, lease), not activated(lease)
            record.leased(label, lease.terms, recipe=target.recipe, merges=merges)
            reading = await asyncio.to_thread(self._preparer.read, call)
            requests = self._preparer.requests(call, reading, lease, id=id, tenant=tenant)
            record.not_invoked = not_invoked(requests, lease)
            counted = self.quotas.admit(tenant, _most(requests, call.n))
            requests = await self._guided(call, requests, counted)
            if reading.restriction is not None:
                guide = reading.restriction.guide
                requests = [replace(one, guide=guide(one.guide)) for one in requests]
            choices = [
                self._choice(call, index, item, reading.prompts[index // call.n].echo)
                for index, item in enumerate(requests)
            ]
        except BaseException:
            lease.release()
            raise
        if self._bell is None:
            self._bell = Bell(asyncio.get_running_loop())
        generation = Generation(
            self._engine, call, choices, lease, counted, record=record, patience=self._patience,
            bell=self._bell, on_close=self._live.discard,
        )  # fmt: skip
        self._live.add(generation)
        generation.submit()
        return generation

    async def _lease(self, target: Target, visible: Visible) -> Lease:
        try:
            async with asyncio.timeout(self._patience.first_token):
                return await lease_target(target, visible.within(target.recipe))
        except TimeoutError:
            raise FirstTokenTimeout("The adapter did not load in time.") from None

    async def _guided(self, call: Call, requests: list[Request], counted: Counted) -> list[Request]:
        """With the guides that the call's shape and tools ask for. Reading them is work: it counts
        as a call whatever comes of it."""
        if call.shape is None and call.tools is None:
            return requests
        try:
            async with asyncio.timeout(self._patience.first_token):
                guides = await self._guides(call, len(requests), requests[0].tenant)
        except BaseException as error:
            counted.end(0)
            if isinstance(error, TimeoutError):
                raise FirstTokenTimeout("The grammar was not made in time.") from None
            raise
        if guides is None:
            return requests
        after = self._tokenizer.after_thought
        return [
            self._preparer.guided(request, after(guide, request.prompt) if call.chat else guide)
            for request, guide in zip(requests, guides, strict=True)
        ]

    async def _guides(self, call: Call, count: int, tenant: str) -> Sequence[Guide] | None:
        if call.tools is not None:
            return await self._tokenizer.tool_guides(call.tools, call.shape, count, tenant=tenant)
        if call.shape is None:
            return None
        return await self._tokenizer.guides(call.shape, count, tenant=tenant, chat=call.chat)

    def _choice(self, call: Call, index: int, request: Request, echo: Echo | None) -> Choice:
        thought = self._tokenizer.thought(request.prompt) if call.chat else None
        if call.tools is not None:
            stream = self._tokenizer.tool_stream(
                call.tools, stops=call.stop, include_stop=call.include_stop, thought=thought
            )
            return CallingChoice(index, request, stream, ids=call.return_ids, thought=thought)
        if echo is not None:
            text = echo.stream(stops=call.stop, include_stop=call.include_stop)
            return Choice(index, request, text, ids=call.return_ids, echo=echo)
        text = self._tokenizer.stream(
            after=() if call.chat and not call.continues else request.prompt,
            stops=call.stop,
            include_stop=call.include_stop,
            thought=thought,
        )
        return Choice(index, request, text, ids=call.return_ids, thought=thought)


class Generation:
    """One call under way. Whoever has it closes it, however it ends; closing twice is nothing."""

    def __init__(
        self,
        engine: Engine,
        call: Call,
        choices: list[Choice],
        lease: Lease,
        counted: Counted,
        *,
        record: CallRecord,
        patience: Patience,
        bell: Bell,
        on_close: Callable[["Generation"], None],
    ) -> None:
        self.call = call
        self.lease = lease
        self._engine = engine
        self._choices = {choice.request.id: choice for choice in choices}
        self._in_engine: set[str] = set()
        self._counted = counted
        self._record = record
        self._mailbox = Mailbox(bell)
        self._loop = asyncio.get_running_loop()
        self._last_by = self._loop.time() + patience.total
        first = min(patience.first_token, patience.total)
        self._alarm = self._loop.call_later(first, self._expire)
        self._on_close = on_close
        self._closed = False

    def submit(self) -> None:
        """Queue every choice; closes itself when the engine refuses one."""
        try:
            for id, choice in self._choices.items():
                further = bool(self._in_engine)
                self._engine.submit(choice.request, self._mailbox.post, further=further)
                self._in_engine.add(id)
        except BaseException:
            self._counted.refused()
            self.close()
            raise

    def fail(self, error: Exception) -> None:
        """Make the reader of `deltas` see this error next."""
        self._mailbox.fail(error)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What the choices gain, as it comes, first when a token has been drawn, though it may
        have nothing to show yet; ends when every choice has ended.

        Raises the engine's error of any choice, FirstTokenTimeout, RequestTimeout.
        """
        told = False
        while self._in_engine:
            gained: dict[int, list[Delta]] = {}
            events = await self._mailbox.take()
            failure = next((event.error for event in events if event.error is not None), None)
            for event in events:
                delta = self._follow(event)
                gained.setdefault(delta.index, []).append(delta)
                if failure is None and not delta.empty:
                    for piece in self._choices[event.request_id].echoed():
                        yield [piece]
                        told = True
                        await asyncio.sleep(0)  # a long prompt's logprobs are work
            if failure is not None and not told:
                raise failure  # nothing has been told yet: the error can have a status of its own
            batch = [delta for delta in self._batch(gained.values()) if not delta.empty]
            if batch or (self._record.started and not told):
                yield batch
                told = True
            if failure is not None:
                raise failure
        self.close()

    def _batch(self, gained: Iterable[list[Delta]]) -> list[Delta]:
        """One delta a choice, or a token where items are made of them: their order counts."""
        if self.call.asked is not None:
            return [delta for parts in gained for delta in parts]
        return [Delta.joined(parts) for parts in gained]

    def _expire(self) -> None:
        """The first token or the end is due."""
        if self._loop.time() >= self._last_by:
            self._mailbox.fail(RequestTimeout("The request did not finish in time."))
        elif self._record.started:
            self._alarm = self._loop.call_at(self._last_by, self._expire)
        else:
            self._mailbox.fail(FirstTokenTimeout("The first token did not come in time."))

    def _follow(self, event: TokenEvent) -> Delta:
        choice = self._choices[event.request_id]
        if event.request_id not in self._in_engine:
            return Delta(choice.index)
        if event.admitted is not None:
            self._record.admitted(event.admitted)
        if event.error is not None:
            self._in_engine.discard(event.request_id)
            return Delta(choice.index)
        if event.token is not None:
            self._record.token(choice.index)
        delta = choice.take(event)
        if choice.finish is not None:
            self._in_engine.discard(event.request_id)
            if event.finish is None:  # a stop string: the engine does not know
                self._engine.abort(event.request_id)
        return delta

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The tokens that each choice goes on from."""
        return tuple(choice.request.prompt for choice in self._choices.values())

    @property
    def usage(self) -> Usage:
        choices = list(self._choices.values())
        firsts = choices[:: self.call.n]
        return Usage(
            prompt=sum(len(choice.request.prompt) for choice in firsts),
            completion=sum(choice.generated for choice in choices),
            cached=sum(choice.cached for choice in firsts),
            thought=sum(choice.thought_tokens for choice in choices),
            guessed=sum(choice.guessed for choice in choices),
            foretold=sum(len(choice.request.prediction) for choice in choices),
        )

    def close(self) -> None:
        """Abort what still runs, release the lease, account for the call."""
        if self._closed:
            return
        self._closed = True
        self._alarm.cancel()
        for id in self._in_engine:
            self._engine.abort(id)
        self._in_engine.clear()
        self.lease.release()
        usage = self.usage
        self._record.used(usage.prompt, usage.completion, usage.cached)
        self._counted.end(usage.prompt + usage.completion)
        self._on_close(self)


def _most(requests: list[Request], n: int) -> int:
    """Tokens that they may come to; the n choices of one prompt have it together."""
    prompts = sum(len(request.prompt) for request in requests[::n])
    return prompts + sum(request.params.max_tokens for request in requests)
