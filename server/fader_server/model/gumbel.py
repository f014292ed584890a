"""Draws by the Gumbel-max trick: to each token's logit a number is added that a key and the token
decide, and the largest sum is a sample of the softmax. Knows nothing of requests.

No sum runs over a row, so that what else is in it shows only where it wins.
"""

import torch
from torch import Tensor

_SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def draw_key(seed: int, position: int) -> int:
    """What decides output token `position`: SplitMix64 of both, as a signed 64-bit integer."""
    key = _mix(_mix(seed & _MASK) + position + 1)
    return key - (key >> 63 << 64)


def _mix(value: int) -> int:
    step, first, second = _SPLITMIX
    value = (value * step + step) & _MASK
    value = ((value ^ (value >> 30)) * first) & _MASK
    value = ((value ^ (value >> 27)) * second) & _MASK
    return value ^ (value >> 31)


def winners(shifted: Tensor, heat: Tensor, keys: Tensor) -> Tensor:
    """The token of each row at which shifted / heat + noise is the largest.

    shifted: [R, V] float32, -inf for tokens left out. heat: [R, 1] float32. keys: [R] int64.
    Returns [R] int64, inside the vocabulary whatever the row holds.
    """
    return noise(keys, shifted.shape[1]).add_(shifted.double().div_(heat)).argmax(-1)


def noise(keys: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel numbers -log(-log u), [R, vocab] float64, of keys [R] int64.

    u = (h + 1/2) / 2^52, where h are the upper 52 bits of output number `token` of a SplitMix64
    generator that starts at the key.
    """
    step, first, second = (constant - 2**64 for constant in _SPLITMIX)  # signed, as tensors are
    z = torch.arange(1, vocab + 1, device=keys.device).mul_(step) + keys[:, None]
    z = z.bitwise_xor_(_shifted(z, 30)).mul_(first)
    z = z.bitwise_xor_(_shifted(z, 27)).mul_(second)
    z.bitwise_xor_(_shifted(z, 31))
    u = _shifted(z, 12).double().add_(0.5).mul_(2.0**-52)
    return u.log_().neg_().log_().neg_()


def _shifted(z: Tensor, places: int) -> Tensor:
    """To the right; zeros come in, whatever the sign."""
    return (z >> places).bitwise_and_((1 << (64 - places)) - 1)
