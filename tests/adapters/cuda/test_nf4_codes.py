"""The register lookup gives bf16(code) for every nibble, as the PTX text says it, bit for bit."""

import random
import re
from collections.abc import Sequence

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from fader_adapters.kernels.cuda.nf4_codes import (
    CODES,
    LOOKUP,
    LOOKUP_CONSTRAINTS,
    bf16_bits,
    table_words,
)

WORD = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """Four bytes chosen from eight; a selector's top bit spreads the byte's sign."""
    source = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        out |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * i
    return out


def run(ptx: str, operands: Sequence[int]) -> dict[str, int]:
    """Execute straight-line PTX of the four instructions the lookup uses."""
    registers = {f"${4 + i}": value & WORD for i, value in enumerate(operands)}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for statement in ptx.strip().strip("{}").split(";"):
        text = statement.strip()
        if not text or text.startswith(".reg"):
            continue
        opcode, rest = text.split(None, 1)
        target, *names = re.split(r",\s*", rest)
        a, b, *more = [value(n) for n in names]
        if opcode == "and.b32":
            registers[target] = a & b
        elif opcode == "shr.u32":
            registers[target] = a >> b
        elif opcode == "prmt.b32":
            registers[target] = prmt(a, b, more[0])
        elif opcode == "lop3.b32":
            assert more[1] == 0xCA
            registers[target] = a & b | ~a & more[0] & WORD
        else:
            raise AssertionError(f"unknown instruction {opcode}")
    return registers


def lookup(word: int, words: Sequence[int], ptx: str = LOOKUP) -> list[tuple[int, int]]:
    """The bits of (high, low) of each byte of `word`."""
    operands = [word] + [w for w in words for _ in range(4)]
    out = run(ptx, operands)
    pairs = []
    for byte in range(4):
        shift = 16 * (byte % 2)
        high, low = out[f"${byte // 2}"], out[f"${2 + byte // 2}"]
        pairs.append((high >> shift & 0xFFFF, low >> shift & 0xFFFF))
    return pairs


def expected(word: int) -> list[tuple[int, int]]:
    bits = [bf16_bits(code) for code in CODES]
    return [(bits[b >> 4], bits[b & 15]) for b in word.to_bytes(4, "little")]


def test_codes_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(CODES), get_4bit_type("nf4", device="cpu"))
    assert not torch.equal(torch.tensor(CODES), get_4bit_type("fp4", device="cpu"))


def test_bf16_bits_round_as_torch_does() -> None:
    values = torch.cat([torch.tensor(CODES), torch.randn(2000) * 10, -torch.randn(2000)])
    want = values.bfloat16().view(torch.int16).to(torch.int32) & 0xFFFF
    assert [bf16_bits(v) for v in values.tolist()] == want.tolist()
    assert bf16_bits(CODES[1]) != bf16_bits(CODES[1] * 1.01)


def test_every_byte_in_every_place_decodes_to_its_codes() -> None:
    words = table_words()
    for byte in range(256):
        for place in range(4):
            word = byte << 8 * place | (0x5A << 8 * ((place + 1) % 4))
            assert lookup(word, words) == expected(word)


def test_random_words_decode_to_their_codes() -> None:
    draw, words = random.Random(0), table_words()
    for _ in range(1000):
        word = draw.getrandbits(32)
        assert lookup(word, words) == expected(word)


@pytest.mark.parametrize(
    ("old", "new"), [("0x7351", "0x7341"), ("0x77777777", "0x7777777F"), ("$17, q;", "$9, q;")]
)
def test_a_wrong_digit_in_the_text_is_seen(old: str, new: str) -> None:
    assert old in LOOKUP
    draw, words, broken = random.Random(0), table_words(), LOOKUP.replace(old, new, 1)
    drawn = [draw.getrandbits(32) for _ in range(50)]
    assert any(lookup(word, words, broken) != expected(word) for word in drawn)


def test_words_fit_signed_arguments_and_constraints_count_the_operands() -> None:
    words = table_words()
    assert len(words) == 8
    assert all(-(2**31) <= w < 2**31 for w in words)
    inputs = LOOKUP_CONSTRAINTS.split(",")
    assert inputs[:4] == ["=r"] * 4
    assert len(inputs) == 4 + 1 + 4 * len(words)
    used = {int(n) for n in re.findall(r"\$(\d+)", LOOKUP)}
    assert max(used) < len(inputs)
    assert {5 + 4 * i for i in range(8)} < used
