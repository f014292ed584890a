"""What a start leaves for the first requests: no kernel to compile, nothing that waits in a graph.

Triton compiles a kernel again for other constants, types, alignments and divisibilities of its
arguments; a step on a GPU that asks the host for a value cannot be captured.
"""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the CUDA kernels need triton")
from triton.runtime.interpreter import InterpretedFunction

from fader_server.model import graphs
from tests.adapters.cuda.test_backend import Setting, asks, use_cuda, use_graphs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny engine is on the CPU")

SYNCHRONISES = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "lift_fresh")
"""Operators that wait for the device, or that copy from pageable memory."""


class Compilations:
    """The distinct compilations that launches since the last `clear` would have needed."""

    def __init__(self) -> None:
        self.seen: set[object] = set()
        self.inside = 0
        """Launches under way: what the interpreter does in one is no operator of the step."""

    def note(self, kernel: InterpretedFunction, args: tuple, kwargs: dict) -> None:
        free = kernel.kwargs.get("do_not_specialize") or ()
        bound = inspect.signature(kernel.fn).bind(
            *args, **{k: v for k, v in kwargs.items() if k in kernel.arg_names}
        )
        told = [(name, _kind(name, value, free)) for name, value in bound.arguments.items()]
        options = [(k, v) for k, v in kwargs.items() if k not in kernel.arg_names]
        self.seen.add((kernel.fn.__name__, *told, *options))


def _kind(name: str, value: object, free: tuple[str, ...]) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if name.isupper() or isinstance(value, bool):
        return value
    if isinstance(value, int) and name not in free:
        return value % 16 == 0, value == 1
    return type(value)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    found, run = Compilations(), InterpretedFunction.run

    def noted(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        given = {k: v for k, v in kwargs.items() if k not in ("grid", "warmup")}
        found.note(self, args, given)
        found.inside += 1
        try:
            return run(self, *args, **kwargs)
        finally:
            found.inside -= 1

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    return found


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def start(setting: Setting, patch: pytest.MonkeyPatch, record: graphs.Record | None = None):
    use_cuda(patch)
    use_graphs(patch, *([record] if record else []))
    patch.setattr(graphs, "WARM_TOKENS", (20,))
    return setting.world()


@pytest.mark.slow
def test_no_request_waits_for_a_compiler(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, compilations: Compilations
) -> None:
    world = start(setting, monkeypatch)
    ready = set(compilations.seen)
    compilations.seen.clear()
    world.run(asks())
    assert {key[0] for key in compilations.seen} >= {"resolve", "shrink", "expand", "nf4_gemm"}  # pyright: ignore[reportIndexIssue]
    assert compilations.seen - ready == set()


@pytest.mark.slow
def test_a_kernel_that_a_start_leaves_out_is_noticed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, compilations: Compilations
) -> None:
    use_cuda(monkeypatch)
    use_graphs(monkeypatch)  # warms no prompt
    world = setting.world()
    ready = set(compilations.seen)
    world.run(asks(1))
    assert compilations.seen - ready


def _masks(args: tuple) -> bool:
    """Whether something is indexed by a mask, whose true places the host must know."""
    places = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(at, torch.Tensor) and at.dtype == torch.bool for at in places)


class NoWaiting(TorchDispatchMode):
    """Raises where a step would wait for the device."""

    def __init__(self, compilations: Compilations) -> None:
        super().__init__()
        self._compilations = compilations
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._compilations.inside:
            self.operators += 1
            name = func.overloadpacket.__name__
            if name.startswith(SYNCHRONISES) or (name.startswith("index") and _masks(args)):
                raise AssertionError(f"{name} in a captured step")
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_a_captured_step_never_waits_for_the_device(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, compilations: Compilations
) -> None:
    watch = NoWaiting(compilations)

    def record(run: graphs.Run) -> graphs.Run:
        with watch:
            run()
        return run

    start(setting, monkeypatch, record)
    assert watch.operators > 50
    with pytest.raises(AssertionError, match="in a captured step"), watch:
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError, match="in a captured step"), watch:
        torch.ones(3)[torch.ones(3) > 0]
