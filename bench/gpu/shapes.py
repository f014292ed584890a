"""The shapes sections measure, and their bytes. Integers only."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    inter: int
    vocab: int

    @property
    def sites(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(in, (out of each member)) of q/k/v, o, gate/up and down."""
        q, kv = self.heads * self.dim, self.kv_heads * self.dim
        return (
            (self.hidden, (q, kv, kv)),
            (q, (self.hidden,)),
            (self.hidden, (self.inter, self.inter)),
            (self.inter, (self.hidden,)),
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token in bf16, all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.dim


LLAMA_8B = Shape(4096, 32, 32, 8, 128, 14336, 128256)
SMALL = Shape(128, 1, 4, 2, 32, 192, 512)
SPLIT = replace(SMALL, inter=1024)
"""Wide enough that a product comes in planes; slow in Triton's interpreter."""

SITE_NAMES = ("q/k/v", "o", "gate/up", "down")
