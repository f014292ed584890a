"""The pretended device notices what a GPU would not forgive, and lets pass what it would."""

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")
import triton
import triton.language as tl

from tests.support.pretend_cuda import PretendDevice, PretendFault, pretend, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
CUDA = torch.device("cuda", 0)
CAPTURING = "not permitted when stream is capturing"


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with pretend() as found:
        yield found
        found.notices.told.clear()


@pytest.fixture(params=[False, True], ids=["grad", "inference"])
def either(request: pytest.FixtureRequest, device: PretendDevice) -> Iterator[PretendDevice]:
    """In and out of inference mode, in which torch takes other ways to the same operators."""
    with torch.inference_mode(request.param):
        yield device


def test_values_are_computed_and_lie_on_the_device(either: PretendDevice) -> None:
    x = torch.arange(6, device="cuda").view(2, 3)
    y = (x.float() @ torch.ones(3, 1, device=CUDA) + torch.tensor(1.0)).to(torch.int64)
    assert y.device == x.device == CUDA
    assert y.is_cuda
    assert y.cpu().device.type == "cpu"
    assert y.tolist() == [[4], [13]]
    x[0] = 7
    x[:, 1:].add_(1)
    assert x.tolist() == [[7, 8, 8], [3, 5, 6]]
    assert x.T.data_ptr() == x.data_ptr() != y.data_ptr()
    assert torch.tensor([1, 2], device=CUDA).tolist() == [1, 2]
    assert torch.equal(x.to("cpu").to(CUDA), x)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


def test_operands_in_two_places_are_refused(either: PretendDevice) -> None:
    here, there = torch.ones(3), torch.ones(3, device=CUDA)
    for work in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: torch.cat([there, here]),
        lambda: torch.where(there > 0, there, here),
        lambda: there.index_select(0, torch.tensor([1])),
        lambda: there.view(1, 3) @ here.view(3, 1),
        lambda: torch.nn.functional.embedding(torch.tensor([0]), there.view(3, 1)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            work()
    assert (there + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert there[torch.tensor([0, 2])].tolist() == [1, 1]


def test_what_makes_the_host_wait_is_counted(either: PretendDevice) -> None:
    x = torch.ones(3, device=CUDA)
    before = either.waits.total()
    (x + 1).masked_fill_(x > 0, 2.0)
    x[0] = 1.0
    x[x > 5] = 0.0
    torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)
    assert either.waits.total() == before
    for count, work in enumerate(
        (
            lambda: x.sum().item(),
            lambda: bool(x[0] > 0),
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: torch.tensor([1.0], device=CUDA),
            lambda: x.copy_(torch.zeros(3)),
            lambda: x[torch.tensor([0, 1])],
            lambda: torch.equal(x, x),
            lambda: torch.allclose(x, x),
        ),
        start=1,
    ):
        work()
        assert either.waits.total() == before + count


def captured(work, *, stream=None, warm: bool = True):
    if warm:
        work()
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=stream or torch.cuda.Stream()),
    ):
        work()
    return graph


def test_a_capture_that_fails_leaves_the_thread_on_its_stream(device: PretendDevice) -> None:
    x, side = torch.ones(3, device=CUDA), torch.cuda.Stream()
    with pytest.raises(RuntimeError, match="previous error"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
            x.cpu()
    assert torch.cuda.current_stream() is side


def test_waits_of_operators_can_be_refused(device: PretendDevice) -> None:
    x = torch.ones(3, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.cpu()
    torch.cuda.set_sync_debug_mode(0)
    assert x.cpu().tolist() == [1, 1, 1]


def test_a_wait_inside_a_capture_is_refused(either: PretendDevice) -> None:
    x, pinned = torch.ones(3, device=CUDA), torch.ones(3).pin_memory()
    event = torch.cuda.Event()
    event.record()
    for work in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.copy_(torch.zeros(3)),
        lambda: torch.tensor([1], device=CUDA),
        lambda: x.copy_(pinned),
        lambda: event.synchronize(),
        lambda: event.query(),
        lambda: torch.cuda.synchronize(),
    ):
        with pytest.raises(RuntimeError, match="previous error during capture") as raised:
            captured(work, warm=False)
        assert CAPTURING in str(raised.value.__context__)
    captured(lambda: x.copy_(pinned, non_blocking=True))


def test_a_replay_does_the_same_on_what_the_buffers_hold_by_then(either: PretendDevice) -> None:
    x, out = torch.ones(3, device=CUDA), torch.zeros(3, device=CUDA)

    def work() -> None:
        out.copy_(x * 2 + torch.arange(3, device=CUDA))

    graph = captured(work, warm=False)
    assert out.tolist() == [0, 0, 0], "a capture computes nothing"
    graph.replay()
    assert out.tolist() == [2, 3, 4]
    x.fill_(5)
    graph.replay()
    assert out.tolist() == [10, 11, 12]


def test_a_python_value_that_changes_between_replays_shows(either: PretendDevice) -> None:
    x, scale = torch.ones(3, device=CUDA), [1.0]
    out = torch.zeros(3, device=CUDA)
    graph = captured(lambda: out.copy_(x * scale[0]))
    scale[0] = 3.0
    graph.replay()
    assert out.tolist() == [1, 1, 1]


def test_a_graph_over_memory_that_was_given_back_is_noticed(device: PretendDevice) -> None:
    x, out = [torch.ones(3, device=CUDA)], torch.zeros(3, device=CUDA)
    graph = captured(lambda: out.copy_(x[0] + 1))
    graph.replay()
    x[0] = torch.ones(3, device=CUDA)
    with pytest.raises(PretendFault, match="uses memory that was given back"):
        graph.replay()


def test_forks_in_a_capture_must_be_joined_and_depend_on_nothing_outside(
    device: PretendDevice,
) -> None:
    x, side = torch.ones(3, device=CUDA), torch.cuda.Stream()
    out = torch.zeros(3, device=CUDA)

    def fork(*, join: bool) -> None:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            made = x + 1
        if join:
            current.wait_stream(side)
            out.copy_(made)

    captured(lambda: fork(join=True), warm=False).replay()
    assert out.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="unjoined work"):
        captured(lambda: fork(join=False), warm=False)
    outside = torch.cuda.Stream()
    event = outside.record_event()
    with pytest.raises(RuntimeError, match="uncaptured work"):
        captured(lambda: torch.cuda.current_stream().wait_event(event), warm=False)


@pytest.mark.parametrize("waits", [True, False])
def test_forks_of_a_graph_that_share_memory_unordered_are_noticed(
    device: PretendDevice, waits: bool
) -> None:
    x, out, side = torch.ones(3, device=CUDA), torch.zeros(3, device=CUDA), torch.cuda.Stream()

    def work() -> None:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            x.add_(1)
        if waits:
            current.wait_stream(side)
        out.copy_(x)
        current.wait_stream(side)

    graph = captured(work, warm=False)
    for _ in range(2 if waits else 0):
        graph.replay()
    if waits:
        assert out.tolist() == [3, 3, 3]
        return
    with pytest.raises(PretendFault, match="copy_ on stream 0 reads"):
        graph.replay()
    torch.cuda.synchronize()


def test_pinned_memory_that_is_read_too_early_is_noticed_and_rubbish(
    device: PretendDevice,
) -> None:
    host = torch.empty(3, pin_memory=True)
    view = host.numpy()
    host.copy_(torch.ones(3, device=CUDA), non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    for work in (host.sum, host.tolist):
        with pytest.raises(PretendFault, match="before the copy from the device"):
            work()
    assert view.tolist() != [1, 1, 1]
    assert not done.query()
    assert done.query()
    assert view.tolist() == host.tolist() == [1, 1, 1]


def test_an_event_before_the_copy_is_not_enough(device: PretendDevice) -> None:
    host, done = torch.empty(3, pin_memory=True), torch.cuda.Event()
    done.record()
    host.copy_(torch.ones(3, device=CUDA), non_blocking=True)
    done.synchronize()
    with pytest.raises(PretendFault, match="before the copy from the device"):
        host.tolist()


@pytest.mark.parametrize("through_numpy", [False, True])
def test_a_pinned_source_that_is_written_too_early_is_noticed(
    device: PretendDevice, through_numpy: bool
) -> None:
    host, there = torch.zeros(3, pin_memory=True), torch.zeros(3, device=CUDA)
    there.copy_(host, non_blocking=True)
    if through_numpy:
        host.numpy()[1] = 1
    else:
        host[1] = 1
    with pytest.raises(PretendFault, match="written before the copy"):
        torch.cuda.synchronize()
    there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    host[1] = 2
    torch.cuda.synchronize()


def test_pinned_memory_that_nobody_holds_is_the_allocators(device: PretendDevice) -> None:
    torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)
    torch.zeros(3, pin_memory=True).fill_(1)
    torch.cuda.synchronize()


def test_what_is_still_under_way_at_the_end_is_checked() -> None:
    device = pretend()
    device.__enter__()
    host = torch.zeros(3, pin_memory=True)
    host.to(CUDA, non_blocking=True)
    host[0] = 1
    with pytest.raises(PretendFault, match="written before the copy"):
        device.__exit__(None, None, None)
    assert not torch.cuda.is_available()


def test_streams_that_share_memory_without_an_event_are_noticed(device: PretendDevice) -> None:
    x, side = torch.zeros(8, device=CUDA), torch.cuda.Stream()
    with torch.cuda.stream(side), pytest.raises(PretendFault, match="reads 32 bytes that zeros"):
        x + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x[:4].fill_(1)
    assert (x[4:] + 1).tolist() == [1, 1, 1, 1], "other bytes of it"
    with pytest.raises(PretendFault, match="writes 32 bytes that fill_ on stream 1 wrote"):
        x.zero_()
    event = side.record_event()
    torch.cuda.current_stream().wait_event(event)
    x + 1


def test_two_reads_and_what_the_host_waited_for_are_in_order(device: PretendDevice) -> None:
    x, side = torch.zeros(8, device=CUDA), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        y = x + 1
    x + 1
    with pytest.raises(PretendFault, match="reads"):
        y + 1
    side.synchronize()
    y + 1
    torch.cuda.synchronize()


def test_memory_given_back_under_another_streams_work_is_noticed(device: PretendDevice) -> None:
    x, side = torch.zeros(8, device=CUDA), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1
    del x
    with pytest.raises(PretendFault, match="given back while add"):
        torch.cuda.synchronize()


def test_memory_that_nobody_wrote_is_poisoned(either: PretendDevice) -> None:
    assert torch.empty(3, device=CUDA).isnan().all()
    assert (torch.empty(3, dtype=torch.int64, device=CUDA).abs() > 1 << 40).all()


@triton.jit
def doubled(x, out, size, AT: tl.constexpr):
    at = tl.arange(0, AT)
    tl.store(out + at, tl.load(x + at) * 2, mask=at < size)


def test_a_launch_computes_and_is_replayed(either: PretendDevice) -> None:
    x, out = torch.ones(4, device=CUDA), torch.zeros(4, device=CUDA)
    doubled[(1,)](x, out, 4, AT=4)
    assert out.tolist() == [2, 2, 2, 2]
    graph = captured(lambda: doubled[(1,)](x, out, 3, AT=4), warm=False)
    x.fill_(3)
    graph.replay()
    assert out.tolist() == [6, 6, 6, 2]
    assert either.kernels == {"doubled"}


def test_a_launch_over_host_memory_or_past_its_tensors_is_refused(device: PretendDevice) -> None:
    x, out = torch.ones(4, device=CUDA), torch.zeros(4, device=CUDA)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        doubled[(1,)](x.cpu(), out, 4, AT=4)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        doubled[(1,)](x, out, 4, AT=8)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        doubled[(1,)](torch.ones(8, device=CUDA), out, 8, AT=8)


def test_a_launch_touches_the_bytes_it_loads_and_stores(device: PretendDevice) -> None:
    whole, out = torch.ones(8, device=CUDA), torch.zeros(4, device=CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        whole[4:].fill_(2)
        doubled[(1,)](whole[4:], out, 4, AT=4)
    doubled[(1,)](whole, torch.zeros(4, device=CUDA), 4, AT=4)
    with pytest.raises(PretendFault, match="doubled on stream 0 reads"):
        doubled[(1,)](whole[4:], torch.zeros(4, device=CUDA), 4, AT=4)
    with pytest.raises(PretendFault, match="reads 16 bytes that doubled on stream 1 wrote"):
        out + 1
    side.synchronize()


def test_what_somebody_caught_is_told_at_the_end() -> None:
    device = pretend()
    with contextlib.suppress(RuntimeError):
        device.__enter__() and torch.ones(2, device=CUDA) + torch.ones(2)
    with pytest.raises(PretendFault, match="noticed on the way: Expected all tensors"):
        device.__exit__(None, None, None)


def test_other_threads_see_it_and_share_its_default_stream(device: PretendDevice) -> None:
    x, found = torch.ones(3, device=CUDA), []

    def work() -> None:
        found.append((x + torch.tensor([1.0, 2.0, 3.0], device="cuda")).tolist())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[2, 3, 4]]


def test_the_device_is_gone_afterwards() -> None:
    with pretend():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
