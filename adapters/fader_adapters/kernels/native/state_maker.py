"""Makes the native kernels that keep states; see kernels/states.py."""

from torch import Tensor

from fader_adapters.kernels.native.ops import Tape
from fader_adapters.kernels.native.selective import SelectiveScan
from fader_adapters.kernels.native.states import Convolution, Scan, ScanForm


class NativeStates:
    """Those of one tape; None: none is recorded."""

    def __init__(self, tape: Tape | None) -> None:
        self._tape = tape

    def convolution(
        self, weight: Tensor, bias: Tensor | None, *, slots: int, silu: bool
    ) -> Convolution:
        return Convolution(weight, bias, slots=slots, silu=silu, tape=self._tape)

    def scan(self, form: ScanForm, *, slots: int, skip: Tensor | None = None) -> Scan:
        return Scan(form, slots=slots, skip=skip, tape=self._tape)

    def selective(
        self,
        decay: Tensor,
        bias: Tensor | None,
        skip: Tensor | None,
        *,
        slots: int,
        softplus: bool,
    ) -> SelectiveScan:
        return SelectiveScan(decay, bias, skip, slots=slots, softplus=softplus, tape=self._tape)
