"""Spans of a server as it is started, at a collector."""

import httpx
import pytest

from tests.server.e2e.conftest import start
from tests.support.collector import collector

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
QUESTION = {
    "model": "fader-demo",
    "messages": [{"role": "user", "content": "Hello!"}],
    "adapters": [{"name": "shout", "weight": 0.5}, {"name": "json", "weight": 0.5}],
    "max_tokens": 4,
}


@pytest.mark.slow
def test_the_last_calls_reach_the_collector_before_the_end(tmp_path):
    with collector() as (url, got):
        with start(tmp_path, "--otlp-traces-endpoint", url) as server:
            answer = httpx.post(
                f"{server.url}/v1/chat/completions",
                json=QUESTION,
                headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"},
                timeout=60,
            )
            assert answer.status_code == 200
            assert server.terminate() == 0
        (span,) = [s for b in got for r in b.resource_spans for c in r.scope_spans for s in c.spans]
    assert span.trace_id.hex() == TRACE
    told = {a.key: a.value for a in span.attributes}
    assert [v.string_value for v in told["fader.weights"].array_value.values] == ["0.5", "0.5"]
    assert told["gen_ai.usage.output_tokens"].int_value == 4
    assert told["fader.first_seconds"].double_value > 0
