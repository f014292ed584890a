"""Servers side by side: adapters as each server names them, no figure of one that is wrong."""

import io
import json
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from rich.console import Console

from bench.beside_servers import document, show
from bench.side_by_side import Kept, Settings, Side, compare
from fader_server.errors import ConfigInvalid
from tests.server.bench.bench_fake import FakeServer, over_http


@dataclass
class FakeLlamaCpp(FakeServer):
    """Names only its base, has adapters by number and weight."""

    def answer(self, path: str, body: dict | None) -> tuple[int, list[tuple[float, bytes]]]:
        if path == "/v1/models":
            card = {"id": "base", "meta": {"n_vocab": 900}}
            return 200, [(0, json.dumps({"data": [card]}).encode())]
        if path == "/lora-adapters":
            rows = [{"id": n, "path": f"/models/a{n}.gguf", "scale": 0} for n in range(4)]
            return 200, [(0, json.dumps(rows).encode())]
        if path == "/v1/completions":
            assert body is not None
            on = [row["id"] for row in body["lora"] if row["scale"] == 1.0]
            assert len(body["lora"]) == 4
            assert len(on) <= 1
            body = body | {"model": f"a{on[0]}" if on else "base"}
        return super().answer(path, body)


def settings(**changes) -> Settings:
    given = {
        "adapters": ("a0", "a1"), "concurrencies": (1, 2), "rounds": 2, "requests": 1,
        "prompt_tokens": 8, "output_tokens": 4,
    }  # fmt: skip
    return Settings(**{**given, **changes})


async def run(chosen: Settings, **servers: FakeServer) -> list[Side]:
    with ExitStack() as stack:
        urls = {name: stack.enter_context(over_http(own)) for name, own in servers.items()}
        return await compare(chosen, urls)


def quick(kind=FakeServer, **changes) -> FakeServer:
    return kind(**{"first": 0.002, "gap": 0.001, **changes})


def shown(chosen: Settings, sides: list[Side]) -> str:
    out = io.StringIO()
    show(sides, chosen.loads, Console(file=out, width=110))
    return out.getvalue()


async def test_every_load_is_measured_on_every_server_each_named_its_own_way():
    chosen, llama = settings(), quick(FakeLlamaCpp)
    sides = await run(chosen, one=quick(), llama=llama)
    loads = [str(load) for load in chosen.loads]
    assert loads == [
        "base, 1 at a time", "one adapter, 1 at a time",
        "base, 2 at a time", "one adapter, 2 at a time", "distinct, 2 at a time",
    ]  # fmt: skip
    for side in sides:
        assert {name: len(runs) for name, runs in side.repeats.items()} == dict.fromkeys(loads, 2)
        assert side.kept[loads[4]] == Kept(2, 2)
    assert {body["model"] for body in llama.asked} == {"base", "a0", "a1"}
    told = document(chosen, sides, ["a note"])
    assert told["ok"]
    assert set(told["loads"][loads[0]]) == {"one", "llama"}
    assert "2 of 2" in shown(chosen, sides)


async def test_a_server_that_answers_adapters_like_the_base_gives_no_figures():
    chosen = settings()
    sides = await run(chosen, good=quick(), wrong=quick(defect="same_text"))
    assert [fault.detail for _, fault in sides[1].faults] == ["answers exactly as the base"] * 2
    assert "loads" not in document(chosen, sides, [])
    text = shown(chosen, sides)
    assert "FAILED" in text
    assert "tokens/s" not in text


@pytest.mark.parametrize("defect", ["short", "no_done", "http", "cached"])
async def test_a_request_that_goes_wrong_gives_no_figures(defect):
    chosen = settings(concurrencies=(1,), rounds=1)
    sides = await run(chosen, wrong=quick(defect=defect))
    assert sides[0].faults
    assert "FAILED" in shown(chosen, sides)


async def test_answers_that_change_amid_the_load_are_counted_and_not_refused():
    chosen = settings(concurrencies=(2,), rounds=1)
    sides = await run(chosen, mixing=quick(defect="mixes", first=0.02))
    kept = sides[0].kept["distinct, 2 at a time"]
    assert kept.same < kept.asked == 2
    assert f"{kept.same} of 2" in shown(chosen, sides)


async def test_what_cannot_be_compared_is_said_before_anything_is_asked():
    server = quick()
    with pytest.raises(ConfigInvalid, match="one has no adapter a9"):
        await run(settings(adapters=("a0", "a9")), one=server)
    assert server.asked == []
    with pytest.raises(ConfigInvalid, match="3 different adapters at a time need 3, got 2"):
        settings(concurrencies=(1, 3))
