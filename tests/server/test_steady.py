"""Functions of single elements: the same bits wherever an element stands, for any threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from fader_adapters.kernels import native
from fader_adapters.kernels.native import Call, Map, Tape
from fader_server.model.recording import Recorder
from fader_server.model.state_kernels import _side_by_side
from fader_server.model.steady import Steady

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")

Function = Callable[[torch.Tensor], torch.Tensor]
THREADS = (1, 2, 3, 6)
FUNCTIONS: dict[str, Function] = {
    "sigmoid": lambda x: x.sigmoid(),
    "torch.sigmoid": torch.sigmoid,
    "F.sigmoid": F.sigmoid,
    "exp": lambda x: x.exp(),
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "softplus of 2x": lambda x: F.softplus(x, beta=2.0),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "elu": F.elu,
    "exp2": torch.exp2,
    "half a gate": lambda x: F.glu(torch.cat([x, x], dim=-1)),
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
}
ONE_CODE: dict[str, Function] = {
    "exp": torch.exp,
    "log": lambda x: x.abs().log(),
    "log1p": lambda x: x.abs().log1p(),
    "expm1": torch.expm1,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "cos": torch.cos,
    "sin": torch.sin,
    "logsigmoid": F.logsigmoid,
    "square": lambda x: x.pow(2),
    "cube": lambda x: x.pow(3),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
}
"""Those that nobody keeps steady where a model calls them."""
OFTEN = {"sigmoid", "softplus", "silu", "gelu by tanh", "mish", "elu", "exp2"}
"""Of which torch's own differ in fp32 in more than one element of a thousand at an end."""
VECTORS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Whether torch has such other code here."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def moved(function: Function, dtype: torch.dtype) -> int:
    """Elements whose bits depend on how many others there are, of tokens' numbers up to 500."""
    x = torch.randn(1, 500, 67, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
    torch.set_num_threads(1)
    alone = torch.cat([function(x[:, i : i + 1]) for i in range(x.shape[1])], dim=1)
    found = 0
    for threads in THREADS:
        torch.set_num_threads(threads)
        for first, count in ((0, 500), (3, 497), (11, 7), (100, 57)):
            part = slice(first, first + count)
            found += int((function(x[:, part]) != alone[:, part]).sum())
    return found


@pytest.mark.parametrize("tape", [Tape(), None], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_elements_bits_do_not_depend_on_how_many_there_are(name, dtype, tape):
    function = FUNCTIONS[name]
    with Steady(tape):
        assert not moved(function, dtype)
        x = torch.randn(3, 57)
        steady = function(x.to(dtype))
    exact = function(x.to(dtype).double())
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(steady.double(), exact, rtol=tolerance, atol=1e-6)
    assert steady.dtype == dtype
    if VECTORS and dtype == torch.float32 and name in OFTEN:
        assert moved(function, dtype), "the comparison sees nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ONE_CODE)
def test_torch_has_one_code_for_what_is_left_to_it(name, dtype):
    assert not moved(ONE_CODE[name], dtype)


def test_what_is_no_row_of_tokens_and_what_changes_its_argument_is_torchs():
    x = torch.randn(3, 5)
    with Steady(Tape()):
        for other in (x[0], x.double(), x[:0]):
            assert torch.equal(torch.sigmoid(other), other.clone().sigmoid_())
        changed = x.clone()
        assert F.silu(changed, inplace=True) is changed
        assert not torch.equal(changed, x)


def test_a_record_has_native_calls_where_there_are_such():
    def kinds(function: Function) -> list[int | str]:
        tape, x = Tape(), torch.randn(3, 64)
        with torch.inference_mode(), Steady(tape):
            calls = Recorder(tape).record(lambda: function(x)).calls
        return [call.op.map if isinstance(call, Call) else str(call.function) for call in calls]

    assert kinds(torch.tanh) == [Map.TANH]
    assert kinds(F.gelu) == [Map.GELU]
    assert kinds(FUNCTIONS["gelu by tanh"]) == [Map.GELU_TANH]
    assert kinds(F.mish)[1] == "aten.mish.default"


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
