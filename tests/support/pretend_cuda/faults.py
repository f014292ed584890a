"""What a program did that a GPU would not forgive."""


class PretendFault(AssertionError):
    """A race, an early read or another thing that a GPU does not report by itself.

    What it does report is raised as torch does: RuntimeError, in CUDA's words.
    """


class Notices:
    """All that was noticed. A server isolates rows that fail and goes on; the test must not."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def fault(self, message: str) -> PretendFault:
        self.told.append(message)
        return PretendFault(message)

    def error(self, message: str) -> RuntimeError:
        """What a GPU reports by itself and no server should meet."""
        self.told.append(message)
        return RuntimeError(message)


CAPTURING = (
    "CUDA error: operation not permitted when stream is capturing ({what})\n"
    "Search for `cudaErrorStreamCaptureUnsupported' in the documentation"
)
