"""Which model each request asks for. Pure and seeded: one seed gives one sequence of names."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from fader_server.errors import ConfigInvalid

KINDS = ("base", "identical", "distinct", "uniform", "zipf")


@dataclass(frozen=True, slots=True)
class Popularity:
    """How requests spread over the adapters; written `kind` or `zipf:s`."""

    kind: str
    exponent: float = 1.0
    """s of P(rank k) ∝ 1/kˢ; zipf only."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigInvalid(f"popularity must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 <= self.exponent <= 16:
            raise ConfigInvalid(f"the zipf exponent must be 0 to 16, got {self.exponent}")

    def __str__(self) -> str:
        return f"zipf:{self.exponent:g}" if self.kind == "zipf" else self.kind


def parse_popularity(text: str) -> Popularity:
    """`base`, `identical`, `distinct`, `uniform`, `zipf` or `zipf:1.2`. ConfigInvalid otherwise."""
    kind, colon, exponent = text.strip().partition(":")
    if not colon:
        return Popularity(kind)
    if kind != "zipf":
        raise ConfigInvalid(f"only zipf takes an exponent, got {text!r}")
    try:
        return Popularity(kind, float(exponent))
    except ValueError:
        raise ConfigInvalid(f"the zipf exponent must be a number, got {exponent!r}") from None


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Probability of rank 1 … count; sums to 1."""
    raw = [rank**-exponent for rank in range(1, count + 1)]
    total = sum(raw)
    return [weight / total for weight in raw]


class Draw:
    """The models of one scenario's requests.

    `base` and `identical` ask for one model; `distinct` gives lane i (a worker of a closed loop, a
    position in an open one) adapter i for the whole run, so that no two requests in flight share
    one; `uniform` and `zipf` draw by request number, the adapters ranked as listed.
    """

    def __init__(
        self,
        popularity: Popularity,
        *,
        base: str,
        adapters: Sequence[str],
        requests: int,
        concurrency: int | None,
        seed: int,
    ) -> None:
        if popularity.kind != "base" and not adapters:
            raise ConfigInvalid(f"popularity {popularity} needs --adapters, none were chosen")
        if (
            popularity.kind == "distinct"
            and concurrency is not None
            and len(adapters) < concurrency
        ):
            raise ConfigInvalid(
                f"popularity distinct needs an adapter per request in flight: "
                f"concurrency {concurrency}, adapters {len(adapters)}"
            )
        self._by_lane = popularity.kind == "distinct"
        in_use = tuple(adapters)[: concurrency if self._by_lane else None]
        self._names = _names(popularity, base, in_use, requests, seed)

    def model(self, number: int, lane: int) -> str:
        """The model request `number` asks for when it is sent by `lane`."""
        return self._names[(lane if self._by_lane else number) % len(self._names)]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that can be drawn, each once, in order of first use."""
        return tuple(dict.fromkeys(self._names))


def _names(
    popularity: Popularity, base: str, adapters: tuple[str, ...], requests: int, seed: int
) -> tuple[str, ...]:
    if popularity.kind == "base":
        return (base,)
    if popularity.kind == "identical":
        return adapters[:1]
    if popularity.kind == "distinct":
        return adapters
    exponent = popularity.exponent if popularity.kind == "zipf" else 0.0
    cumulative = list(accumulate(zipf_weights(len(adapters), exponent)))
    # Seeded choice is the point: the same seed must replay the same load.
    rng = random.Random(f"popularity:{popularity}:{seed}")  # noqa: S311
    return tuple(rng.choices(adapters, cum_weights=cumulative, k=requests))
