"""`reasoning_effort` and an operator's variables, as chat templates take them."""

import pytest

from fader_server.errors import ConfigInvalid, RequestInvalid
from fader_server.text.effort import EFFORTS, variables_for, variables_read
from fader_server.text.tokenizer import Tokenizer
from tests.server.text_worlds import TEMPLATES, hf

CHAT = [{"role": "user", "content": "hello"}]
SAID = "{% for m in messages %}{{ m.content }}{% endfor %}"
SWITCH = SAID + "{% if enable_thinking is defined and not enable_thinking %} quiet{% endif %}"
SWITCHED_OFF = SAID + "{% if thinking %} loud{% endif %}"
WORD = SAID + " {{ reasoning_effort | default('medium') }}"
TAGGED = (
    SAID + "{%- generation -%}{% if not thinking %} quiet{% endif %}{%- endgeneration -%}"
    "{% for m in messages %}{% break %}{% endfor %}"
)


def said(template, effort=None, **variables):
    tokenizer = Tokenizer(
        hf("byte_level", template), max_model_len=99, template_variables=variables
    )
    return tokenizer.decode(tokenizer.encode_chat(CHAT, (), effort))


def test_no_effort_leaves_every_template_as_it_is():
    assert [said(t) for t in (SWITCH, SWITCHED_OFF, WORD)] == ["hello", "hello", "hello medium"]


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_switch_is_off_for_none_and_on_for_any_other_effort(effort):
    off = effort == "none"
    assert said(SWITCH, effort) == ("hello quiet" if off else "hello")
    assert said(SWITCHED_OFF, effort) == ("hello" if off else "hello loud")


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_template_with_a_word_for_it_gets_the_word(effort):
    assert said(WORD, effort) == f"hello {effort}"


def test_a_template_with_a_word_and_a_switch_gets_both_and_for_none_the_switch():
    both = {"reasoning_effort", "thinking", "messages"}
    assert variables_for("low", both) == {"reasoning_effort": "low", "thinking": True}
    assert variables_for("none", both) == {"thinking": False}
    assert variables_for(None, both) == {}


@pytest.mark.parametrize(
    "template",
    [
        "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
        "{{ reasoning_effort }}",
        "{% macro head() %}{% if not reasoning_effort %}{% set reasoning_effort = 'a' %}{% endif %}"
        "{{ reasoning_effort }}{% endmacro %}{{ head() }}",
        "{% set reasoning_effort = reasoning_effort | default('x') %}{{ reasoning_effort }}",
    ],
    ids=["set where missing", "in a macro", "set from itself"],
)
def test_a_template_that_sets_its_own_default_still_reads_the_word(template):
    assert variables_for("low", variables_read(template)) == {"reasoning_effort": "low"}


def test_an_effort_that_the_template_refuses_is_told_as_such():
    template = (
        SAID + "{% if reasoning_effort == 'low' %}{{ raise_exception('only high') }}{% endif %}"
    )
    assert said(template, "high") == "hello"
    with pytest.raises(RequestInvalid, match="refuses the effort 'low'") as refused:
        said(template, "low")
    assert refused.value.param == "reasoning_effort"
    with pytest.raises(RequestInvalid, match="refuses these messages: only high"):
        said("{{ raise_exception('only high') }}{{ reasoning_effort }}", "low")


def test_a_template_that_knows_of_no_effort_is_not_told():
    assert said(SAID, "high") == "hello"
    assert variables_for("high", variables_read(TEMPLATES["chatml"])) == {}


def test_what_a_template_reads_is_known_with_tags_of_transformers_and_loop_controls():
    assert "thinking" in variables_read(TAGGED)
    assert "thinking" not in variables_read("{% set thinking = true %}{{ thinking }}")
    assert variables_read("{% if %}") == frozenset()
    usual = "{% set ns = namespace(a=range(9)) %}{{ raise_exception('x') or strftime_now('%d') }}"
    assert variables_read(usual) == frozenset()


def test_an_operators_variables_are_in_every_chat_and_a_requests_effort_is_before_them():
    assert said(SWITCH, enable_thinking=False) == "hello quiet"
    assert said(SWITCH, "high", enable_thinking=False) == "hello"
    assert said(WORD, reasoning_effort="low") == "hello low"


@pytest.mark.parametrize(
    "name", ["enable_thinkin", "messages", "tools", "chat_template", "padding"]
)
def test_a_variable_that_the_template_does_not_read_or_that_is_not_free_is_refused(name):
    template = SWITCH + "{{ tools or chat_template or padding }}"
    with pytest.raises(ConfigInvalid, match=f"no variable '{name}'.*: enable_thinking$"):
        said(template, **{name: "x"})


def test_variables_need_a_template():
    source = hf("byte_level", SAID)
    source.chat_template = None
    with pytest.raises(ConfigInvalid, match="no chat template"):
        Tokenizer(source, max_model_len=99, template_variables={"enable_thinking": False})
