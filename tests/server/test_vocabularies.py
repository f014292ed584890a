"""A tokenizer with more tokens than the model has embeddings: refused where they would be read."""

from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken

from fader_server.errors import RequestInvalid
from fader_server.text.tokenizer import Tokenizer
from tests.server.served_world import served
from tests.server.text_worlds import hf
from tests.support.families import CONFIGS

CHAT = "{{ messages[0].content }}<|im_end|>"


def wider():
    """A tokenizer, and the id of its last token."""
    source = hf("byte_level", CHAT)
    source.add_tokens([AddedToken("[PAD]", special=True)])
    return source, max(source.get_vocab().values())


def test_text_with_a_token_the_model_lacks_is_refused_by_its_name():
    source, last = wider()
    narrow = Tokenizer(source, max_model_len=64, model_vocab_size=last)
    assert narrow.vocab_size == last
    with pytest.raises(RequestInvalid, match=rf"'\[PAD\]', token {last} .* 0 to {last - 1}"):
        narrow.encode_prompt("a[PAD]b")
    assert narrow.encode_prompt("ab") == Tokenizer(source, max_model_len=64).encode_prompt("ab")
    for size in (last + 1, last + 9, None):
        whole = Tokenizer(source, max_model_len=64, model_vocab_size=size)
        assert last in whole.encode_prompt("a[PAD]b")
        assert whole.vocab_size == last + 1


def test_a_chat_template_with_a_token_the_model_lacks_is_refused():
    source = hf("byte_level", CHAT + "[PAD]")
    source.add_tokens([AddedToken("[PAD]", special=True)])
    last = max(source.get_vocab().values())
    chat = [{"role": "user", "content": "hi"}]
    assert last in Tokenizer(source, max_model_len=64).encode_chat(chat)
    narrow = Tokenizer(source, max_model_len=64, model_vocab_size=last)
    with pytest.raises(RequestInvalid, match=r"'\[PAD\]'") as caught:
        narrow.encode_chat(chat)
    assert caught.value.param == "messages"


async def test_ids_the_model_lacks_are_the_callers_mistake(tmp_path: Path):
    source, last = wider()
    config = CONFIGS["llama"]()
    config.vocab_size = last
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    source.save_pretrained(tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    async with served(tmp_path / "adapters", model=str(tmp_path / "base")) as server:

        async def ask(**body):
            fields = {"model": server.world.base.name, "max_tokens": 2, **body}
            return await server.http.post("/v1/completions", json=fields)

        for body in (
            {"prompt": [5, last]},
            {"prompt": "a[PAD]b"},
            {"prompt": [5], "logit_bias": {str(last): 5}},
            {"prompt": [5], "stop_token_ids": [last]},
        ):
            answer = await ask(**body)
            assert answer.status_code == 400, body
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["param"] in body
        last -= 1
        for body in (
            {"prompt": [5, last]},
            {"prompt": [5], "logit_bias": {str(last): 5}, "stop_token_ids": [last]},
        ):
            assert (await ask(**body)).status_code == 200
