"""NF4 weights made of random bits, and their values in float64."""

import torch

from fader_adapters.kernels.cuda.nf4_codes import CODES, bf16_bits
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight


def random_weight(rows: int, width: int, *, device: str = "cpu") -> Nf4Weight:
    """Every nibble equally likely, every absmax between 0.01 and 0.02."""
    packed = torch.randint(0, 256, (rows * width // 2,), dtype=torch.uint8)
    absmax = 0.01 + 0.01 * torch.rand(rows * width // BLOCK)
    return Nf4Weight(packed.to(device), absmax.to(device), rows, width)


def values(weight: Nf4Weight, *, bf16_codes: bool = False) -> torch.Tensor:
    """W [out, in] in float64, of the exact codes or of those rounded to bf16."""
    codes = torch.tensor(CODES, dtype=torch.float32)
    if bf16_codes:
        bits = torch.tensor([bf16_bits(c) << 16 for c in CODES], dtype=torch.int64)
        codes = bits.to(torch.int32).view(torch.float32)
    packed, absmax = weight.packed.cpu(), weight.absmax.cpu()
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()
    scaled = codes[nibbles].double().view(-1, BLOCK) * absmax.double()[:, None]
    return scaled.view(weight.out_features, weight.in_features)


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm())
