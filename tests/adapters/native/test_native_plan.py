"""A step's plan: what each term costs, and the order in which adapters are met."""

import time

import torch

from fader_adapters.kernels.native import StepPlan

USES, GROUP_OF_USE, TERM_OF_USE, SLOTS = 5, 11, 12, 10
"""Words of the plan's header: see csrc/common.h."""


def blends(rows: int, *, slots: int, terms: int = 8) -> tuple[torch.Tensor, ...]:
    """Rows of one token and so many terms each, no slot twice in a row, all over the slots."""
    g = torch.Generator().manual_seed(1)
    slot = torch.stack([torch.randperm(slots, generator=g)[:terms] for _ in range(rows)])
    return (
        torch.arange(0, rows * terms + 1, terms, dtype=torch.int32),
        slot.view(-1).to(torch.int32),
        torch.ones(rows * terms),
        torch.arange(rows, dtype=torch.int32),
    )


def test_uses_lie_slot_by_slot_and_within_a_slot_in_the_order_of_terms(built: None) -> None:
    for slots in (8, 256, 257, 70_000):
        blob = StepPlan(*blends(200, slots=slots), slots=slots)._blob
        count, groups, uses, slot = (int(blob[i]) for i in (USES, GROUP_OF_USE, TERM_OF_USE, SLOTS))
        terms = blob[uses : uses + count]
        met = blob[slot : slot + count][terms.long()]
        order = torch.stack([met, terms]).T.tolist()
        assert order == sorted(order)
        assert len(set(terms.tolist())) == count
        assert torch.equal(blob[groups : groups + count], terms // 8)


def test_a_step_of_many_terms_costs_no_more_a_term_than_one_of_few(built: None) -> None:
    def cost(rows: int) -> float:
        given, taken = blends(rows, slots=8192), []
        for _ in range(5):
            began = time.thread_time()
            StepPlan(*given, slots=8192)
            taken.append(time.thread_time() - began)
        return min(taken)

    assert cost(4000) < 10 * cost(1000)
