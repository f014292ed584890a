"""What a server says about itself: base, adapters, vocabulary. Knows no load."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from fader_server.bench.client import BenchClient
from fader_server.errors import ConfigInvalid

_LETTERS = "".join(chr(code) for code in range(32, 127))


@dataclass(frozen=True, slots=True)
class Served:
    """The part of a server that a run will use."""

    base: str
    adapters: tuple[str, ...]
    vocabulary: Sequence[int]
    vocabulary_source: str
    facts: dict[str, Any]
    """The server's own words: header, model card, health."""


async def discover(
    client: BenchClient,
    *,
    model: str | None,
    adapters: tuple[str, ...] | None,
    vocab: int | None,
) -> Served:
    """Ask the server. `adapters` None means all it has; `vocab` overrides what it says.

    ConfigInvalid when it cannot be reached, or a chosen name is not listed.
    """
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ConfigInvalid(
            f"no server answers at {client.url} ({error or type(error).__name__}); "
            "is one running there? --url names another"
        ) from None
    if response.status_code != 200:
        raise ConfigInvalid(
            f"GET /v1/models answered {response.status_code}: {response.text[:200]}"
        )
    cards = _cards(response)
    roots = [card["id"] for card in cards if card.get("parent") is None]
    parents = [card["parent"] for card in cards if card.get("parent") is not None]
    base = model or next(iter([*roots, *parents]), None)
    if base is None:
        raise ConfigInvalid("GET /v1/models lists no base model: name one with --model")
    if adapters is None:
        adapters = await _all_adapters(client, cards, base)
    card = next((c for c in cards if c["id"] == base), {})
    vocabulary, source = await _vocabulary(client, card, base, vocab)
    return Served(
        base=base,
        adapters=adapters,
        vocabulary=vocabulary,
        vocabulary_source=source,
        facts={
            "header": response.headers.get("server"),
            "card": card,
            "health": await _optional(client, "/health"),
            "version": await _optional(client, "/version"),
        },
    )


def _cards(response: httpx.Response) -> list[dict[str, Any]]:
    try:
        cards = response.json()["data"]
        return [card for card in cards if isinstance(card["id"], str)]
    except (ValueError, KeyError, TypeError):
        raise ConfigInvalid(
            f"GET /v1/models must answer OpenAI's list, came {response.text[:200]!r}"
        ) from None


async def _all_adapters(
    client: BenchClient, cards: list[dict[str, Any]], base: str
) -> tuple[str, ...]:
    """From /v1/adapters, which leaves recipes out, or from the model list where there is none."""
    listed = await _optional(client, "/v1/adapters")
    rows = listed.get("data") if isinstance(listed, dict) else listed
    if isinstance(rows, list):
        names = [r.get("name") or r.get("id") for r in rows if isinstance(r, dict)]
    else:
        names = [card["id"] for card in cards if card.get("parent") == base]
    names = [name for name in names if name]
    if not names:
        raise ConfigInvalid("--adapters all: the server lists no adapter")
    return tuple(names)


async def _vocabulary(
    client: BenchClient, card: dict[str, Any], base: str, vocab: int | None
) -> tuple[Sequence[int], str]:
    if vocab is not None:
        return range(vocab), "--vocab"
    meta = card.get("meta") or {}
    size = card.get("vocab_size") or meta.get("vocab_size") or meta.get("n_vocab")
    if isinstance(size, int) and size > 1:
        return range(size), "/v1/models"
    seen = await _seen_ids(client, base)
    if len(seen) > 1:
        return seen, "/tokenize"
    raise ConfigInvalid(
        "the vocabulary size is neither in /v1/models nor can /tokenize be used: give --vocab"
    )


async def _seen_ids(client: BenchClient, base: str) -> list[int]:
    """Ids the tokenizer gives for short ASCII texts: few, but every one of them is valid."""
    text = " ".join([*_LETTERS, *(a + b for a in "abcdefghijklmnop" for b in "aeiourstn")])
    body = {"model": base, "prompt": text, "add_special_tokens": False}
    try:
        response = await client.post("/tokenize", body)
        tokens = response.json()["tokens"]
        return sorted({token for token in tokens if isinstance(token, int)})
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return []


async def _optional(client: BenchClient, path: str) -> Any:  # noqa: ANN401 (any JSON)
    """The JSON at a path, None when the server has none."""
    try:
        response = await client.get(path)
        return response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, json.JSONDecodeError, UnicodeDecodeError):
        return None
