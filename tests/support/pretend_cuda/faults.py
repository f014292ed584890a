"""What a program did that a GPU would not forgive."""


class PretendFault(AssertionError):
    """A race, an early read or another thing that a GPU does not report by itself.

    What it does report is raised as torch does: RuntimeError, in CUDA's words.
    """


CAPTURING = (
    "CUDA error: operation not permitted when stream is capturing ({what})\n"
    "Search for `cudaErrorStreamCaptureUnsupported' in the documentation"
)
