"""One step's blends, grouped once, read by every site of the step. Integers and γ; no weights."""

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import check, library


class StepPlan:
    """Which token wears which adapters with which weight, in the kernels' own form.

    Rows are requests. A row's terms keep their order: it is the order of its sums.
    """

    def __init__(
        self,
        term_ptr: Tensor,
        term_slot: Tensor,
        term_gamma: Tensor,
        row_of_token: Tensor,
        *,
        slots: int,
    ) -> None:
        """term_ptr int32 [R+1]; term_slot int32, term_gamma fp32 [terms]; row_of_token int32 [T];
        slots = table rows.

        Terms with γ = 0 are dropped.
        Raises: TypeError, ValueError (shapes, a slot or row out of range, γ not finite).
        """
        ints = (torch.int32,)
        checks.tensor("term_ptr", term_ptr, ints, shape=(None,))
        checks.tensor("term_slot", term_slot, ints, shape=(None,))
        checks.tensor("term_gamma", term_gamma, (torch.float32,), shape=(term_slot.numel(),))
        checks.tensor("row_of_token", row_of_token, ints, shape=(None,))
        rows, terms, self.tokens = term_ptr.numel() - 1, term_slot.numel(), row_of_token.numel()
        if rows < 0 or int(term_ptr[-1]) != terms:
            raise ValueError(
                f"term_ptr must hold R+1 values that end at {terms}, got {term_ptr.tolist()[-3:]}"
            )
        if not bool(torch.isfinite(term_gamma).all()):
            raise ValueError("term_gamma must be finite")
        self.blends: list[list[tuple[int, float]]] = []
        self.row_of_token: list[int] = []
        lib = library()
        words = lib.fader_plan_words(self.tokens, rows, terms)
        self._blob = torch.empty(words, dtype=torch.int32)
        code = lib.fader_plan_build(
            self.tokens,
            rows,
            term_ptr.data_ptr(),
            term_slot.data_ptr(),
            term_gamma.data_ptr(),
            row_of_token.data_ptr(),
            slots,
            self._blob.data_ptr(),
            words,
        )
        check(code, "StepPlan")
        # a plan without any term costs the sites nothing
        self.active = int(self._blob[3]) > 0
        self.pointer: int | None = self._blob.data_ptr() if self.active else None

    @staticmethod
    def of(
        blends: list[list[tuple[int, float]]], row_of_token: list[int], *, slots: int
    ) -> "StepPlan":
        """The same from Python lists: blends[row] = [(slot, γ), …] in the row's order."""
        ends = [0]
        for blend in blends:
            ends.append(ends[-1] + len(blend))
        flat = [term for blend in blends for term in blend]
        plan = StepPlan(
            torch.tensor(ends, dtype=torch.int32),
            torch.tensor([slot for slot, _ in flat], dtype=torch.int32),
            torch.tensor([gamma for _, gamma in flat], dtype=torch.float32),
            torch.tensor(row_of_token, dtype=torch.int32),
            slots=slots,
        )
        plan.blends, plan.row_of_token = blends, row_of_token
        return plan
