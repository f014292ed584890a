"""Functions of single elements: the same bits wherever an element stands, or refused."""

import pytest
import torch
from torch.nn import functional as F

from fader_adapters.kernels import native
from fader_adapters.kernels.native import Tape
from fader_server.errors import ModelUnsupported
from fader_server.model.state_kernels import _side_by_side
from fader_server.model.steady import Steady

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")

FUNCTIONS = {
    "sigmoid": lambda x: x.sigmoid(),
    "torch.sigmoid": torch.sigmoid,
    "exp": lambda x: x.exp(),
    "softplus": F.softplus,
    "silu": F.silu,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_elements_bits_do_not_depend_on_how_many_there_are(name: str, dtype: torch.dtype):
    function = FUNCTIONS[name]
    x = torch.randn(1, 57, 5, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
    with Steady(Tape()):
        whole = function(x)
        parts = [function(x[:, at : at + n]) for at, n in ((0, 1), (1, 7), (8, 49))]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(whole, function(x), rtol=tolerance, atol=1e-6)
    if dtype == torch.float32 and name == "softplus":  # torch's own are others at a tensor's end
        own = torch.cat([function(x[:, i : i + 1]) for i in range(57)], dim=1)
        assert not torch.equal(own, function(x))


def test_what_the_kernels_do_not_know_is_torchs_unless_it_is_asked_strictly():
    steady, x = Steady(Tape()), torch.randn(3, 5)
    with steady:
        assert torch.equal(torch.tanh(x), torch.tanh(x.clone()))
        assert torch.equal(F.softplus(x, beta=2.0), F.softplus(x.clone(), beta=2.0))
    steady.strict = True
    with steady:
        x[0].exp()
        torch.tanh(x[0])  # of one dimension: a parameter's, not tokens'
        with pytest.raises(ModelUnsupported, match="tanh"):
            torch.tanh(x)
        with pytest.raises(ModelUnsupported, match="softplus"):
            F.softplus(x, beta=2.0)
        with pytest.raises(ModelUnsupported, match="exp"):
            x.double().exp()


def test_slices_of_one_tensor_stay_where_they_are_and_others_are_joined():
    whole = torch.randn(6, 40)
    k, q, v = whole[:, 2:10], whole[:, 10:18], whole[:, 20:36]
    parts = (q.unflatten(1, (2, 4)), k.unflatten(1, (2, 4)), v.unflatten(1, (4, 4)))
    for tokens in (6, 1):
        x, places = _side_by_side(*(part[:tokens] for part in parts))
        assert x.data_ptr() == k.data_ptr()
        assert places == (8, 0, 18)
    apart = (parts[0].clone(), *parts[1:])
    for tokens in (6, 1):
        given = [part[:tokens] for part in apart]
        x, places = _side_by_side(*given)
        for at, part in zip(places, given, strict=True):
            assert torch.equal(x[:, at : at + part[0].numel()], part.flatten(1))
