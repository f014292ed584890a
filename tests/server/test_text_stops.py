"""Stop strings: the streamed text equals a search in the whole text, however it is chunked."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fader_server.text.stops import StopMatcher

AB = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def naive(text, stops, *, include=False):
    """Cut where the first stop string becomes complete; the longest of those that do together."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[:end] if include else text[: end - max(map(len, complete))]
    return text


def streamed(chunks, stops, *, include=False):
    matcher = StopMatcher(stops, include=include)
    shown = "".join([matcher.feed(chunk) for chunk in chunks])
    return shown + matcher.flush(), matcher.stopped


def cut(text, borders):
    edges = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(text=AB, stops=STOPS, borders=st.lists(st.integers(0, 99)), include=st.booleans())
@settings(max_examples=250, deadline=None)
def test_streamed_text_equals_a_search_in_the_whole(text, stops, borders, include):
    shown, stopped = streamed(cut(text, borders), stops, include=include)
    assert shown == naive(text, stops, include=include)
    assert stopped == any(stop in text for stop in stops)


@given(text=AB, stops=STOPS)
@settings(max_examples=200, deadline=None)
def test_exactly_what_may_become_a_stop_string_is_held_back(text, stops):
    matcher = StopMatcher(stops)
    shown = matcher.feed(text)
    if matcher.stopped:
        assert not any(stop in shown for stop in stops)
        return
    held = text[len(shown) :]
    ends = [text[at:] for at in range(len(text))]
    possible = [end for end in ends if any(stop.startswith(end) for stop in stops)]
    assert held == max(possible, key=len, default="")


def test_a_stop_string_across_chunks_is_found_and_left_out():
    assert streamed(["say ST", "O", "P now"], ["STOP"]) == ("say ", True)
    assert streamed(["say ST", "O", "P now"], ["STOP"], include=True) == ("say STOP", True)
    assert streamed(["say ST", "O", "X now"], ["STOP"]) == ("say STOX now", False)


@pytest.mark.parametrize("stops", [["abcd", "c"], ["c", "abcd"]])
def test_the_first_complete_stop_string_wins(stops):
    assert streamed(["abcd"], stops) == ("ab", True)
    assert streamed(["abXd"], stops) == ("abXd", False)


def test_of_two_complete_at_once_the_longest_is_cut():
    assert streamed(["xxend"], ["d", "end"]) == ("xx", True)
    assert streamed(["xxend"], ["d"]) == ("xxen", True)


def test_nothing_comes_after_a_stop():
    matcher = StopMatcher(["."])
    assert matcher.feed("one. two") == "one"
    assert matcher.feed("three") == ""
    assert matcher.flush() == ""


def test_without_stop_strings_nothing_is_held():
    matcher = StopMatcher()
    assert matcher.feed("any text") == "any text"
    assert matcher.flush() == ""
