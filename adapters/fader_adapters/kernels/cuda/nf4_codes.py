"""NF4's sixteen values and the PTX that looks eight up in registers. Knows bits, not tensors."""

import struct

CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The value of each nibble; exact in fp32."""


def bf16_bits(value: float) -> int:
    """The bits of `value` rounded to bf16, ties to even. Finite values only."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def table_words() -> tuple[int, ...]:
    """CODES in bf16 as eight signed 32-bit words for `LOOKUP`.

    Words 0..3 hold the high bytes of codes 0..15, four to a word, lowest first; 4..7 the low bytes.
    """
    words = []
    for shift in (8, 0):
        for first in range(0, 16, 4):
            byte = [(bf16_bits(c) >> shift) & 0xFF for c in CODES[first : first + 4]]
            words.append(int.from_bytes(bytes(byte), "little", signed=True))
    return tuple(words)


def _half(nibbles: str, tops: str, high: str, low: str) -> str:
    """Look up the four nibbles (low three bits, top bit) of the low 16 bits of a word."""
    w = [f"${5 + 4 * i}" for i in range(8)]
    return f"""
    prmt.b32 m, 0xFF00, 0, {tops};
    prmt.b32 a, {w[0]}, {w[1]}, {nibbles};
    prmt.b32 b, {w[2]}, {w[3]}, {nibbles};
    lop3.b32 h, m, b, a, 0xCA;
    prmt.b32 a, {w[4]}, {w[5]}, {nibbles};
    prmt.b32 b, {w[6]}, {w[7]}, {nibbles};
    lop3.b32 l, m, b, a, 0xCA;
    prmt.b32 {high}, l, h, 0x7351;
    prmt.b32 {low}, l, h, 0x6240;"""


LOOKUP = f"""{{
    .reg .b32 q, s, q2, s2, m, a, b, h, l;
    and.b32 q, $4, 0x77777777;
    shr.u32 s, $4, 3;
    and.b32 s, s, 0x11111111;{_half("q", "s", "$0", "$2")}
    shr.u32 q2, q, 16;
    shr.u32 s2, s, 16;{_half("q2", "s2", "$1", "$3")}
}}"""
"""PTX: four packed bytes ($4) to bf16 codes of their high ($0, $1) and low ($2, $3) nibbles.

A byte permute picks from eight bytes by three bits, so each of the two bytes of a code takes two
permutes and a select by the nibble's top bit: 23 integer instructions for eight weights, no memory.
$5, $9, … $33 are the words of `table_words`; an elementwise asm over four elements repeats each
four times.
"""

LOOKUP_CONSTRAINTS = "=r,=r,=r,=r,r" + ",r" * 32
