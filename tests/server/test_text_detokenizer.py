"""Detokenizer: deltas add up to the tokenizer's own decode, and never take anything back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fader_server.errors import ModelUnsupported
from fader_server.text.detokenizer import Detokenizer
from fader_server.text.pieces import Pieces
from tests.server.text_worlds import BUILDERS, CORPUS, backend

FAMILIES = sorted(BUILDERS)
PIECES = {family: Pieces(backend(family)) for family in FAMILIES}
BACKENDS = {family: backend(family) for family in FAMILIES}
TEXT = st.text(
    st.one_of(st.sampled_from(" \n\té😀👩‍🇩好e\u0301ß<>|."), st.characters(codec="utf-8")),
    max_size=40,
)


def deltas(family, ids, after=()):
    detokenizer = Detokenizer(PIECES[family], after=after)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


def decode(family, ids):
    return BACKENDS[family].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXT)
@settings(max_examples=60, deadline=None)
def test_deltas_of_a_text_add_up_to_its_decode(family, text):
    ids = BACKENDS[family].encode(text).ids
    assert "".join(deltas(family, ids)) == decode(family, ids)


@pytest.mark.parametrize("family", ["byte_level", "unigram", "words"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_deltas_of_any_tokens_add_up_to_their_decode(family, data):
    size = BACKENDS[family].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 5), max_size=30))
    assert "".join(deltas(family, ids)) == decode(family, ids)


@pytest.mark.parametrize("family", ["llama", "gemma", "metaspace", "metaspace_always"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_deltas_of_tokens_and_whole_characters_add_up_with_byte_fallback(family, data):
    tok = BACKENDS[family]
    words = [[token] for name, token in tok.get_vocab().items() if not name.startswith("<0x")]
    bytes_of = [
        [tok.token_to_id(f"<0x{byte:02X}>") for byte in char.encode()] for char in "é好😀 x"
    ]
    parts = data.draw(st.lists(st.sampled_from(sorted(words) + bytes_of * 40), max_size=25))
    ids = [token for part in parts for token in part]
    assert "".join(deltas(family, ids)) == decode(family, ids)


def test_a_byte_run_that_breaks_keeps_the_characters_already_shown():
    tok = BACKENDS["llama"]
    run = [*"好".encode(), 0xFF, *"é".encode()]
    ids = [tok.token_to_id(f"<0x{byte:02X}>") for byte in run]
    assert "".join(deltas("llama", ids)) == "好\ufffdé"
    assert decode("llama", ids) == "\ufffd" * 6  # the library voids the whole run


@pytest.mark.parametrize("family", FAMILIES)
def test_every_delta_is_final(family):
    for text in CORPUS:
        ids = BACKENDS[family].encode(text).ids
        whole, shown = decode(family, ids), ""
        for delta in deltas(family, ids):
            shown += delta
            assert whole.startswith(shown)


def test_half_a_character_is_held_until_it_is_whole():
    ids = BACKENDS["byte_level"].encode("😀").ids
    assert len(ids) > 1
    assert deltas("byte_level", ids) == [*[""] * (len(ids) - 1), "😀", ""]
    assert deltas("byte_level", ids[:-1])[-1] == "\ufffd"


def test_special_tokens_have_no_text_and_do_not_count_as_the_first():
    tok = BACKENDS["llama"]
    ids = [tok.token_to_id("<s>"), *tok.encode("hello world").ids, tok.token_to_id("</s>")]
    assert "".join(deltas("llama", ids)) == "hello world"
    assert "".join(deltas("llama", ids[2:])) != "hello world"


def test_an_output_that_continues_a_prompt_keeps_its_leading_space():
    for family in ("llama", "metaspace", "unigram", "words"):
        prompt, output = BACKENDS[family].encode("hello").ids, BACKENDS[family].encode("world").ids
        assert "".join(deltas(family, output, after=prompt)) == " world"
        assert decode(family, prompt + output) == "hello world"
        assert "".join(deltas(family, output)) == "world"


def test_a_prompt_that_ends_inside_a_character_is_completed():
    tok = BACKENDS["byte_level"]
    ids = tok.encode("hello").ids + tok.encode("😀").ids
    assert "".join(deltas("byte_level", ids[-1:], after=ids[:-1])) == "😀"
    assert set("".join(deltas("byte_level", ids[-1:]))) == {"\ufffd"}


def test_a_tokenizer_whose_text_is_no_sum_of_tokens_is_refused():
    tok = Backend(models.WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    Pieces(tok)
    tok.decoder = decoders.BPEDecoder(suffix="e")
    with pytest.raises(ModelUnsupported, match="neighbours"):
        Pieces(tok)
