"""What a model may ask of a weight it does not hold: dtype and device, and no value."""

import pytest
import torch
from torch.nn import functional as F

from fader_adapters.packed_weight import PackedWeight, WeightRead

WEIGHT = PackedWeight(torch.bfloat16, torch.device("cpu"))
X = torch.ones(2, 3)


def test_its_dtype_and_device_are_told():
    assert X.to(WEIGHT.dtype).dtype == torch.bfloat16
    assert X.to(WEIGHT.device).device == X.device


@pytest.mark.parametrize(
    "read",
    [
        lambda: WEIGHT.shape,
        lambda: WEIGHT.t(),
        lambda: WEIGHT.float(),
        lambda: X * WEIGHT,
        lambda: X @ WEIGHT,
        lambda: F.linear(X, WEIGHT),
        lambda: torch.cat([X, WEIGHT]),
    ],
)
def test_its_values_are_not(read):
    with pytest.raises(WeightRead, match=r"a linear's weight (has no|is no tensor)"):
        read()
