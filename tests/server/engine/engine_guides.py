"""A guide in plain integers that notices every token out of turn."""

from dataclasses import dataclass

from fader_server.errors import EngineFault

VOCAB = 50


@dataclass
class Turns:
    """Token and place together are a multiple of three; the output is whole after `length`."""

    length: int
    faulty_mask: int | None = None
    """The place whose tokens cannot be told."""
    faulty_token: int | None = None
    """The place whose token is not taken."""
    taken: int = 0

    @property
    def ended(self) -> bool:
        return self.taken >= self.length

    def allowed(self) -> bytes:
        assert not self.ended, "nothing may follow"
        if self.taken == self.faulty_mask:
            raise EngineFault("injected")
        bits = sum(1 << token for token in range(VOCAB) if self._fits(token))
        return bits.to_bytes(VOCAB // 8 + 1, "little")

    def accept(self, token: int) -> None:
        assert self._fits(token), "a token that was not allowed, or one twice"
        if self.taken == self.faulty_token:
            raise EngineFault("injected")
        self.taken += 1

    def fresh(self) -> "Turns":
        """At the start, and without its faults."""
        return Turns(self.length)

    def _fits(self, token: int) -> bool:
        return (token + self.taken) % 3 == 0


def guided(bits: bytes, token: int) -> int:
    """The allowed token that a draw leads to."""
    allowed = [i for i in range(8 * len(bits)) if bits[i >> 3] >> (i & 7) & 1]
    return allowed[token % len(allowed)]
