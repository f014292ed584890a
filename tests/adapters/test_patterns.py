"""Patterns of strangers: the same answers as `re`, in bounded work."""

import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fader_adapters.pattern_nodes import Budget, PatternUnsafe
from fader_adapters.patterns import Pattern

_ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"[\d.]", "[a-c]", "[]a]", "[a-]", r"\w"]
_ASSERTIONS = [r"\b", r"\B", "^", "$", "(?=a)", "(?!b)"]
_REPEATS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{0,}", "*?", "+?", "??", "{1,2}?"]


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    some = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        some.map("".join),
        some.map(lambda parts: "(?:" + "|".join(parts) + ")"),
        inner.map(lambda part: f"(?={part})"),
        st.tuples(inner, st.sampled_from(_REPEATS)).map(lambda pair: f"({pair[0]}){pair[1]}"),
    )


@settings(max_examples=400, deadline=None)
@given(
    st.recursive(st.sampled_from(_ATOMS + _ASSERTIONS), _grow, max_leaves=8),
    st.text("ab.1-]", min_size=1, max_size=8),
)
def test_every_answer_is_that_of_re(pattern, text):
    assert Pattern(pattern, Budget()).fullmatch(text, Budget()) == bool(re.fullmatch(pattern, text))


PATHS = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj")
] + ["lm_head", "model.visual.blocks.0.mlp.gate_proj", "model.language_model.layers.3.mlp.up_proj"]
REAL = [
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
    r".*layers\.(0|1[0-9])\..*proj",
    r"^(?!.*visual).*(?:gate_proj|up_proj).*",
    r"^(model\.language_model|model)(?=\.).*\.(gate_proj|up_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|gate_proj)))",
    r"(?P<stem>model\.layers)\.\d{1,2}\.[a-z_]+\.[^.]+",
]


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_as_people_write_them_answer_like_re(pattern):
    answers = [Pattern(pattern, Budget()).fullmatch(path, Budget()) for path in PATHS]
    assert answers == [bool(re.fullmatch(pattern, path)) for path in PATHS]
    assert len(set(answers)) == 2


@pytest.mark.parametrize(
    "bomb", ["(a+)+b", "(a|a)*b", "(a*)*b", "(.*)*x", "((a?){0,999}){0,999}b", "(a|aa)+b" * 9]
)
def test_patterns_that_explode_in_re_are_evaluated_in_bounded_time(bomb):
    start = time.process_time()
    with suppress(PatternUnsafe):
        assert not Pattern(bomb, Budget()).fullmatch("a" * 60, Budget())
    assert time.process_time() - start < 2


def test_the_budget_ends_every_evaluation():
    pattern = Pattern("(?=(a*)*)(a|b)*", Budget())
    assert pattern.fullmatch("ab", Budget())
    with pytest.raises(PatternUnsafe, match="costs too much"):
        pattern.fullmatch("ab", Budget(3))


@pytest.mark.parametrize(
    "pattern",
    [
        "(", ")", "[", "[z-a]", "[a-\\d]", "*a", "a**", "a*+", "a{2}{3}", "a{3,2}", "a{99999}",
        r"(a)\1", "(?P=x)", "(?P<1>a)", "(?<=a)b", "(?i)a", "(?>a)", "(?", "\\", r"\x41", "é",
        "a" * 5000, "(" * 40 + ")" * 40, "[[a]",
    ],
)  # fmt: skip
def test_syntax_outside_the_subset_is_refused(pattern):
    with pytest.raises(PatternUnsafe):
        Pattern(pattern, Budget())


def test_texts_outside_the_subset_are_refused():
    for text in ("é", "a" * 2000):
        with pytest.raises(PatternUnsafe):
            Pattern(".*", Budget()).fullmatch(text, Budget())
