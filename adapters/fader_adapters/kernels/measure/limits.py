"""What the machine can do at best, timed in turn with what is measured."""

from dataclasses import dataclass
from itertools import cycle

from fader_adapters.kernels import native
from fader_adapters.kernels.measure.timing import Call, Timing
from fader_adapters.kernels.native.library import library

READ, DOT = "limit: DRAM read", "limit: bf16 dot"
CHUNK = 32 << 20
ROUNDS = 400_000
"""About a millisecond of dot products: far above what it takes to wake the threads."""


@dataclass(frozen=True, slots=True)
class Reached:
    """DRAM read in GB/s and bf16 (else fp32) dot products in GFLOP/s; medians of one case."""

    read_gb_s: float
    dot_gflop_s: float


class Limits:
    """Streaming reads of `streamed` bytes and dot products out of registers, on some threads."""

    def __init__(self, streamed: int, threads: int) -> None:
        lib = library()
        self._data = native.PanelStore().take(streamed).fill_(1)
        self.read_bytes = min(CHUNK, streamed)
        self.dot_flop = float(lib.fader_probe_dot(ROUNDS, threads))
        last = streamed - self.read_bytes
        turn = cycle(self._data.data_ptr() + at for at in range(0, last + 1, self.read_bytes))
        self.methods: dict[str, Call] = {
            READ: lambda: lib.fader_probe_read(next(turn), self.read_bytes, threads),
            DOT: lambda: lib.fader_probe_dot(ROUNDS, threads),
        }

    def reached(self, timings: list[Timing]) -> Reached:
        """Of the timings of one case that held `methods`."""
        ms = {timing.method: timing.median_ms for timing in timings}
        return Reached(self.read_bytes / ms[READ] / 1e6, self.dot_flop / ms[DOT] / 1e6)
