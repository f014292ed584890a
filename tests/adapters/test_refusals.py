"""What was refused is known by its bytes, whatever it is called."""

import gc
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from fader_adapters import inspection, refusals
from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.inspection import Inspector
from fader_adapters.pauses import never
from fader_adapters.refusals import Refusals
from tests.adapters.peft_files import BASE, make_config, make_raw

GOOD = make_raw(make_config())
WRONG = replace(GOOD, weights=GOOD.weights[:-1] + b"?", origin="elsewhere")
"""Of the same sizes as the good one."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(known: Refusals, raw=GOOD) -> bool:
    try:
        known.check(raw, never)
    except AdapterInvalid:
        return True
    return False


def test_the_same_bytes_are_refused_again_in_the_same_words_and_no_others():
    known = Refusals()
    assert not refused(known)
    known.note(GOOD, AdapterMismatch("it is for another base"), never)
    with pytest.raises(AdapterMismatch, match=r"^it is for another base$"):
        known.check(replace(GOOD, origin="under another name", revision="f00"), never)
    assert not refused(known, WRONG)


def test_a_refusal_is_forgotten_in_time():
    clock = Clock()
    known = Refusals(clock=clock)
    known.note(GOOD, AdapterInvalid("no"), never)
    clock.now = refusals.SECONDS - 1
    assert refused(known)
    clock.now = refusals.SECONDS
    assert not refused(known)


def test_the_oldest_refusal_goes_first(monkeypatch):
    monkeypatch.setattr(refusals, "MOST", 2)
    known = Refusals()
    raws = [replace(GOOD, config=GOOD.config + b" " * n) for n in range(3)]
    for raw in raws:
        known.note(raw, AdapterInvalid("no"), never)
    assert [refused(known, raw) for raw in raws] == [False, True, True]


def test_good_bytes_are_not_hashed_unless_others_of_their_sizes_were_refused():
    known, pauses = Refusals(), []
    known.note(replace(GOOD, config=b"{}"), AdapterInvalid("no"), never)
    known.check(GOOD, lambda: pauses.append(1))
    assert not pauses
    known.note(WRONG, AdapterInvalid("no"), never)
    known.check(GOOD, lambda: pauses.append(1))
    assert pauses


def test_an_inspector_reads_what_it_refused_once(monkeypatch):
    reads = []
    read = inspection.read_adapter
    monkeypatch.setattr(
        inspection, "read_adapter", lambda *a, **k: (reads.append(1), read(*a, **k))[1]
    )
    inspector = Inspector(BASE, dtype=torch.float32)
    broken = make_raw(make_config(r=-1))
    told = []
    for _ in range(3):
        with pytest.raises(AdapterInvalid) as caught:
            inspector.read(broken)
        told.append(str(caught.value))
    assert len(reads) == 1
    assert len(set(told)) == 1
    for _ in range(2):
        inspector.read(GOOD)
    assert len(reads) == 3


@pytest.mark.parametrize(
    "broken",
    [
        make_raw(make_config(r=-1)),
        make_raw(make_config(target_modules="(((")),  # an error of another's own
        replace(GOOD, weights=GOOD.weights[:-1]),
    ],
)
def test_a_refused_file_is_not_kept_in_memory(broken):
    inspector = Inspector(BASE, dtype=torch.float32)

    def load():
        raw = replace(broken)
        inspector.read(raw)

    before = sys.getrefcount(broken.weights)
    for _ in range(2):
        with pytest.raises(AdapterInvalid):
            load()
    gc.collect()
    after = sys.getrefcount(broken.weights)  # an assert would hold them, too
    assert after == before


class Words(str):
    """A message whose end can be seen."""


@pytest.mark.parametrize("act", [refused, lambda known: known.note(WRONG, AdapterInvalid(), never)])
def test_what_is_forgotten_leaves_memory(act):
    clock = Clock()
    known = Refusals(clock=clock)
    words = Words("no")
    kept = weakref.ref(words)
    known.note(GOOD, AdapterInvalid(words), never)
    del words
    assert kept() is not None
    clock.now = refusals.SECONDS
    act(known)
    assert kept() is None
