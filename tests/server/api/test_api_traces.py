"""Traces: whose a request is, and the spans that tell of it."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Event
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from fader_server import tracing
from fader_server.api.trace import Answered, parent_of
from fader_server.config import load
from fader_server.core import Admission, Request, TokenEvent
from fader_server.errors import ConfigInvalid, EngineFault, NumericFault
from fader_server.tracing import exporting, open_spans
from tests.server.api.api_fakes import World, digest, say
from tests.server.api.conftest import asgi
from tests.support.collector import collector

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
ASK = {"model": "tone", "prompt": "SECRET", "max_tokens": 2}


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ([PARENT], True),
        ([f" {PARENT}"], True),
        ([f"cc-{TRACE}-{SPAN}-01-what-will-be"], True),
        ([f"cc-{TRACE}-{SPAN}-01.what-will-be"], False),
        ([f"{PARENT}-more"], False),
        ([f"ff-{TRACE}-{SPAN}-01"], False),
        ([f"00-{'0' * 32}-{SPAN}-01"], False),
        ([f"00-{TRACE}-{'0' * 16}-01"], False),
        ([f"00-{TRACE.upper()}-{SPAN}-01"], False),
        ([f"00-{TRACE}-{SPAN}"], False),
        ([PARENT, PARENT], False),
        (["", PARENT], False),
        (["\xff"], False),
        ([], False),
    ],
)
def test_a_parent_is_known_where_it_is_told_once_and_rightly(given, known):
    parent = parent_of([(b"traceparent", value.encode("latin-1")) for value in given])
    assert (parent is not None) is known
    if parent is not None:
        assert (parent.trace_id, parent.span_id, parent.flags) == (TRACE, SPAN, 1)


def test_a_state_is_kept_whole_or_not_at_all():
    def state(*values: str) -> str:
        given = [(b"tracestate", value.encode()) for value in values]
        parent = parent_of([(b"traceparent", PARENT.encode()), *given])
        assert parent is not None
        return parent.state

    assert state("a=1,b=2", "c=3") == "a=1,b=2,c=3"
    assert state("a=" + "x" * 600) == ""


class Traced:
    """A world whose spans are kept, to be read once all are there."""

    def __init__(self, world: World, stack: ExitStack, kept: InMemorySpanExporter) -> None:
        self.world = world
        self._stack, self._kept = stack, kept

    def spans(self) -> tuple[ReadableSpan, ...]:
        """All of them. Nothing is told afterwards."""
        self._stack.close()
        return tuple(span for span in self._kept.get_finished_spans())


@pytest.fixture
def traced(worlds: Callable[..., World]) -> Iterator[Callable[..., Traced]]:
    with ExitStack() as all_of_them:

        def make(**changes: Any) -> Traced:
            kept, stack = InMemorySpanExporter(), ExitStack()
            all_of_them.push(stack)
            spans = stack.enter_context(exporting(kept, version="9"))
            return Traced(worlds(spans=spans, **changes), stack, kept)

        yield make


async def test_a_call_is_a_span_under_its_caller(traced, caplog):
    def script(request: Request) -> Iterator[TokenEvent]:
        yield TokenEvent(request.id, 97, admitted=Admission(0.25, "delta"))
        yield TokenEvent(request.id, 97, finish="length")

    it, before = traced(script=script), time.time_ns()
    with caplog.at_level("INFO", "fader.request"):
        async with asgi(it.world) as client:
            headers = {"traceparent": PARENT, "tracestate": "us=1", "x-request-id": "me"}
            await client.post("/v1/completions", json=ASK, headers=headers)
    (span,) = it.spans()
    assert span.name == "text_completion tone"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert (span.context.trace_id, span.parent.span_id) == (int(TRACE, 16), int(SPAN, 16))
    assert span.context.trace_state.to_header() == "us=1"
    assert before <= span.start_time < span.end_time <= time.time_ns()
    said = dict(span.attributes)
    assert said.pop("fader.first_seconds") >= 0
    assert said == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "fader",
        "gen_ai.response.model": "tone",
        "gen_ai.usage.input_tokens": 6,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.request.choice.count": 1,
        "fader.request_id": "me",
        "fader.stream": False,
        "fader.adapter": "tone",
        "fader.lane": "delta",
        "fader.versions": (f"tone@{digest('tone')[:12]}",),
        "fader.weights": ("1",),
        "fader.queue_seconds": 0.25,
        "fader.outcome": "ok",
    }
    (line,) = [record.fields for record in caplog.records if record.name == "fader.request"]
    assert (line["trace_id"], int(line["span_id"], 16)) == (TRACE, span.context.span_id)


async def test_every_request_but_probes_has_a_span_of_its_own_trace(traced):
    it = traced(api_key=("sk-secret",))
    async with asgi(it.world) as client:
        for path in ("/health", "/ready", "/metrics", "/nope/SECRET", "/v1/models"):
            await client.get(path)
        chat = {"model": "nobody", "messages": [{"role": "user", "content": "SECRET"}]}
        key = {"authorization": "Bearer sk-secret"}
        await client.post("/v1/chat/completions", json=chat, headers=key)
    spans = it.spans()
    assert [span.name for span in spans] == ["GET", "GET /v1/models", "chat"]
    assert [span.attributes["http.response.status_code"] for span in spans] == [401, 401, 404]
    assert {span.parent for span in spans} == {None}
    assert len({span.context.trace_id for span in spans}) == 3
    assert {span.status.status_code for span in spans} == {StatusCode.UNSET}  # they asked wrongly
    told = "".join(span.to_json() for span in spans)
    assert "SECRET" not in told
    assert "sk-secret" not in told


async def test_faults_are_told_before_and_after_a_status_was_sent(traced):
    it = traced(script=say(fail_after=0, error=EngineFault("secret 0xdead")))
    async with asgi(it.world) as client:
        await client.post("/v1/completions", json=ASK)
        it.world.engine.script = say(
            fail_after=2, error=NumericFault("row"), fail_when=it.world.told
        )
        await client.post("/v1/completions", json={**ASK, "max_tokens": 9, "stream": True})
        it.world.engine.script = say()
        await client.post("/v1/completions", json=ASK)
    spans = it.spans()
    assert [span.attributes.get("error.type") for span in spans] == ["500", "error", None]
    assert [span.attributes["http.response.status_code"] for span in spans] == [500, 200, 200]
    failed = [span.status.status_code is StatusCode.ERROR for span in spans]
    assert failed == [True, True, False]
    assert "0xdead" not in "".join(span.to_json() for span in spans)


async def test_who_does_not_sample_gets_no_span_but_a_line(traced, caplog):
    it = traced()
    with caplog.at_level("INFO", "fader.request"):
        async with asgi(it.world) as client:
            headers = {"traceparent": PARENT[:-1] + "0"}
            await client.post("/v1/completions", json=ASK, headers=headers)
    assert it.spans() == ()
    (line,) = [record.fields for record in caplog.records if record.name == "fader.request"]
    assert line["trace_id"] == TRACE


async def test_without_an_endpoint_the_line_names_the_callers_trace(worlds, caplog):
    with caplog.at_level("INFO", "fader.request"):
        async with asgi(worlds()) as client:
            await client.post("/v1/completions", json=ASK, headers={"traceparent": PARENT})
            await client.post("/v1/completions", json=ASK, headers={"traceparent": "nonsense"})
    lines = [record.fields for record in caplog.records if record.name == "fader.request"]
    assert [line.get("trace_id") for line in lines] == [TRACE, None]
    assert all("span_id" not in line for line in lines)


def test_it_is_loaded_where_it_is_asked_for_only():
    program = (
        "import sys, fader_server.launch as launch\n"
        "with launch.open_spans(URL, version='9'): pass\n"
        "print('opentelemetry.sdk.trace' in sys.modules)"
    )

    def loaded(url: str | None) -> str:
        source = program.replace("URL", repr(url))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", source],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert loaded(None) == "False"
    assert loaded("http://127.0.0.1:9/v1/traces") == "True"


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with (
        pytest.raises(ConfigInvalid, match=r"pip install 'fader\[tracing\]'"),
        open_spans("http://127.0.0.1:9/v1/traces", version="9"),
    ):
        pass
    with open_spans(None, version="9") as spans:
        assert spans is None


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("http://127.0.0.1:4318/v1/traces", True),
        ("https://collector.example.com/v1/traces", True),
        ("http://127.0.0.1:4318", False),
        ("127.0.0.1:4317", False),
        ("grpc://127.0.0.1:4317/x", False),
        ("http://me:secret@host/v1/traces", False),
    ],
)
def test_an_endpoint_is_a_whole_address(given, right):
    flags = {"otlp_traces_endpoint": given}
    if right:
        assert load(flags, {}).otlp_traces_endpoint == given
    else:
        with pytest.raises(ConfigInvalid, match="v1/traces"):
            load(flags, {})


def answered() -> Answered:
    now = time.time_ns()
    fields = {"route": "/v1/models", "method": "GET", "status": 200, "request_id": "me"}
    return Answered(now - 1000, now, fields)


@pytest.mark.parametrize("name", [None, "mine"])
def test_spans_reach_a_collector_with_the_services_name(name, monkeypatch):
    if name is not None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    with collector() as (url, got):
        with open_spans(url, version="9") as spans:
            assert spans is not None
            ids = spans.add(answered(), None)
        (sent,) = got
    (of_service,) = sent.resource_spans
    told = {a.key: a.value.string_value for a in of_service.resource.attributes}
    assert (told["service.name"], told["service.version"]) == (name or "fader", "9")
    (span,) = of_service.scope_spans[0].spans
    assert (span.trace_id.hex(), span.span_id.hex()) == ids
    assert span.name == "GET /v1/models"


def test_a_collector_that_hangs_holds_up_neither_requests_nor_the_end(monkeypatch):
    monkeypatch.setattr(tracing, "_LAST_SECONDS", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    with collector(Event()) as (url, got):
        began = time.monotonic()
        with open_spans(url, version="9") as spans:
            assert spans is not None
            for _ in range(5000):  # more than the queue holds
                spans.add(answered(), None)
        assert time.monotonic() - began < 5
        assert got == []
