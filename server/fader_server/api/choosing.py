"""How tokens are chosen, as the client asked: every sampling field, checked.

Knows the size of the vocabulary and the server's limits; nothing about the model's own stop ids.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fader_server.api.fields import Fields, is_finite

INT64 = 1 << 63
_MOST_BANNED = 256
_LONGEST_BANNED = 128
COLDEST = 1e-5
"""Temperatures below are 0, as in vLLM: the likeliest token has all the mass, and float32 ends."""


@dataclass(frozen=True, slots=True)
class Usual:
    """How tokens are chosen where a call does not say; by default as OpenAI does."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def usual_of(config: Mapping[str, object]) -> Usual:
    """From a base's generation_config.json; what no call could say is left out."""
    fields = Fields({name: config[name] for name in Usual.__slots__ if name in config})
    return _read_usual(fields, Usual())


def _read_usual(fields: Fields, usual: Usual) -> Usual:
    temperature = fields.number("temperature", usual.temperature, low=0.0, high=2.0)
    return Usual(
        temperature=temperature if temperature >= COLDEST else 0.0,
        top_p=fields.number("top_p", usual.top_p, low=0.0, high=1.0),
        top_k=max(0, fields.integer("top_k", usual.top_k, low=-1, high=INT64 - 1)),
        min_p=fields.number("min_p", usual.min_p, low=0.0, high=1.0),
        repetition_penalty=fields.number(
            "repetition_penalty", usual.repetition_penalty, low=1e-3, high=10.0
        ),
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may ask for, and what it is taken to mean where it does not say."""

    max_n: int
    max_choices: int
    max_call_tokens: int
    max_terms: int
    vocab_size: int
    max_tokens: int | None = None
    """Of one choice, for this caller; None: what the call and the context hold."""
    usual: Usual = field(default_factory=Usual)

    @property
    def longest(self) -> int:
        """Tokens of one choice."""
        most = self.max_call_tokens
        return most if self.max_tokens is None else min(most, self.max_tokens)


@dataclass(frozen=True, slots=True)
class Choosing:
    """How tokens are chosen, as the client asked; the model's own stop ids are not in it yet."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    permitted: tuple[int, ...] = ()
    """The ids that may come; none: all."""
    banned: tuple[str, ...] = ()
    """Words whose tokens may not come in a row."""


def read_choosing(fields: Fields, limits: Limits, max_tokens: int | None) -> Choosing:
    """Every sampling field of a body; problems are noted in `fields`."""
    usual = _read_usual(fields, limits.usual)
    seed = fields.optional_integer("seed", low=-INT64, high=INT64 - 1)
    shortest = fields.integer("min_tokens", 0, low=0, high=limits.longest)
    if max_tokens is not None and shortest > max_tokens:
        fields.refuse("min_tokens", "must not be above max_tokens")
    return Choosing(
        temperature=usual.temperature,
        top_p=usual.top_p,
        top_k=usual.top_k,
        min_p=usual.min_p,
        repetition_penalty=usual.repetition_penalty,
        presence_penalty=fields.number("presence_penalty", 0.0, low=-2.0, high=2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2.0, high=2.0),
        logit_bias=_logit_bias(fields, limits.vocab_size),
        seed=secrets.randbits(63) if seed is None else seed,
        min_tokens=shortest,
        stop_token_ids=_stop_token_ids(fields, limits.vocab_size),
        ignore_eos=fields.boolean("ignore_eos"),
        permitted=_permitted(fields, limits.vocab_size),
        banned=fields.texts("bad_words", most=_MOST_BANNED, longest=_LONGEST_BANNED),
    )


def is_token_ids(items: list[Any], vocab_size: int) -> bool:
    """True when every item is an id of the vocabulary; bools are not ids."""
    return all(type(item) is int and 0 <= item < vocab_size for item in items)


def _stop_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    value = fields.raw("stop_token_ids")
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or len(value) > 64 or not is_token_ids(value, vocab_size):
        fields.refuse("stop_token_ids", f"must be up to 64 ids from 0 to {vocab_size - 1}")
        return ()
    return tuple(value)


def _permitted(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    value = fields.raw("allowed_token_ids")
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or not is_token_ids(value, vocab_size):
        fields.refuse("allowed_token_ids", f"must be a list of ids from 0 to {vocab_size - 1}")
        return ()
    return tuple(value)


def _logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    value = fields.raw("logit_bias")
    if value is None:
        return ()
    pairs: list[tuple[int, float]] = []
    good = isinstance(value, dict) and len(value) <= 1024
    for key, bias in value.items() if good else ():
        token = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else vocab_size
        if token >= vocab_size or not is_finite(bias) or not -100 <= bias <= 100:
            good = False
            break
        pairs.append((token, float(bias)))
    if not good or len({token for token, _ in pairs}) != len(pairs):
        fields.refuse("logit_bias", "must map up to 1024 token ids to numbers from -100 to 100")
        return ()
    return tuple(pairs)
