"""A CUDA device that is not there, for tests: real values, computed on the CPU, and the rules of
the real one. What a GPU would refuse, or answer with garbage now and then, fails here every time.

`pretend()` puts it under torch for as long as its `with` lasts.
"""

from tests.support.pretend_cuda.device import PretendDevice, pretend, unavailable
from tests.support.pretend_cuda.faults import PretendFault

__all__ = ["PretendDevice", "PretendFault", "pretend", "unavailable"]
