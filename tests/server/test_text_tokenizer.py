"""Tokenizer and TextStream: prompts, limits, names of tokens, offsets, and other threads."""

import importlib.util
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from tokenizers.processors import TemplateProcessing

from fader_server.errors import ContextTooLong, ModelUnsupported, RequestInvalid
from fader_server.text.tokenizer import Tokenizer
from tests.server.text_worlds import CORPUS, TEMPLATES, hf


def make(family="byte_level", template=None, *, max_model_len=4096, **more):
    return Tokenizer(hf(family, template, **more), max_model_len=max_model_len, eos_ids=[7])


def with_bos(family="byte_level"):
    source = hf(family)
    source.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", source.bos_token_id)]
    )
    return source


def test_a_prompt_is_encoded_as_transformers_does():
    source = with_bos()
    tokenizer = Tokenizer(source, max_model_len=4096)
    for text in CORPUS:
        want = source(text)["input_ids"]
        assert tokenizer.encode_prompt(text) == want
        assert want[0] == source.bos_token_id
        assert tokenizer.encode_prompt(text, special=False) == want[1:]


def test_truncation_set_by_someone_else_does_not_reach_us():
    source = hf("byte_level")
    tokenizer = Tokenizer(source, max_model_len=4096)
    short = source(CORPUS[0], truncation=True, max_length=3)["input_ids"]
    assert len(short) == 3
    assert len(tokenizer.encode_prompt(CORPUS[0])) > 3


def test_control_tokens_of_a_raw_prompt_are_control_tokens():
    source = hf("byte_level")
    ids = Tokenizer(source, max_model_len=64).encode_prompt("a<|im_end|>b")
    assert source.convert_tokens_to_ids("<|im_end|>") in ids


def test_control_tokens_are_text_in_the_prompts_of_a_base_that_says_so():
    """As transformers encodes them; those that a chat template writes are control tokens."""
    source, plain = with_bos(), Tokenizer(with_bos(), max_model_len=64)
    source.split_special_tokens = True
    tokenizer = Tokenizer(source, max_model_len=64)
    control = source.convert_tokens_to_ids("<|im_end|>")
    for text in ("a<|im_end|>b", "<s>hi</s>", *CORPUS[:2]):
        want = source(text)["input_ids"]
        assert tokenizer.encode_prompt(text) == want
        assert want[0] == source.bos_token_id
        assert tokenizer.encode_prompt(text, special=False) == want[1:]
    assert control not in tokenizer.encode_prompt("a<|im_end|>b")
    assert control in plain.encode_prompt("a<|im_end|>b")


def test_a_template_writes_control_tokens_where_prompts_have_none():
    source = hf("byte_level", TEMPLATES["chatml"])
    plain = Tokenizer(source, max_model_len=64)
    source.split_special_tokens = True
    tokenizer = Tokenizer(source, max_model_len=64)
    chat = [{"role": "user", "content": "a<|im_end|>b"}]
    control = source.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.encode_chat(chat) == plain.encode_chat(chat)
    assert [control] == [token for token in tokenizer.encode_chat(chat) if token == control]


def test_a_prompt_beyond_all_hope_is_refused_before_it_is_tokenised():
    tokenizer = make(max_model_len=10)
    assert len(tokenizer.encode_prompt("a" * 320)) > 0
    with pytest.raises(ContextTooLong, match="maximum context length is 10 tokens") as caught:
        tokenizer.encode_prompt("a" * 321)
    assert caught.value.param == "prompt"


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(RequestInvalid, match="surrogate"):
        make().encode_prompt("a\ud800b")
    assert make().encode_prompt("a\ue000b")


def test_a_failing_tokenizer_fails_the_request_only():
    tokenizer = make("words")
    tokenizer._backend.model.unk_token = "absent"
    with pytest.raises(RequestInvalid, match="cannot encode"):
        tokenizer.encode_prompt("unseenword")
    assert tokenizer.encode_prompt("hello world")


def test_a_long_prompt_does_not_stall_other_threads():
    tokenizer = make(max_model_len=10**6)
    text = " ".join(f"w{n * 7919 % 100003}" for n in range(60_000))
    gaps, done = [], threading.Event()

    def beat():
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    start = time.perf_counter()
    tokenizer.encode_prompt(text)
    spent = time.perf_counter() - start
    done.set()
    thread.join()
    assert len(gaps) > 3, f"the other thread never ran in {spent:.3f} s"
    assert max(gaps) < max(0.5 * spent, 0.05)


def test_ends_come_from_the_generation_config_and_the_tokenizer(tmp_path):
    source = hf("byte_level")
    source.save_pretrained(tmp_path)
    end = source.eos_token_id
    load = Tokenizer.load
    assert load(str(tmp_path), max_model_len=64).eos_ids == {end}
    (tmp_path / "config.json").write_text('{"eos_token_id": 5, "model_type": "llama"}')
    assert load(str(tmp_path), max_model_len=64).eos_ids == {end, 5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert load(str(tmp_path), max_model_len=64).eos_ids == {end, 9, 11}


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelUnsupported, match=r"cannot load the tokenizer of .*: there is none"):
        Tokenizer.load(str(tmp_path), max_model_len=64)


def test_a_folder_with_a_sentencepiece_model_alone_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"a model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')

    def refusal() -> str:
        with pytest.raises(ModelUnsupported) as caught:
            Tokenizer.load(str(tmp_path), max_model_len=64)
        return str(caught.value)

    def found(name: str) -> object:
        return None if name == "sentencepiece" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    lacking = "a tokenizer.model and no tokenizer.json; .* install sentencepiece"
    assert re.search(lacking, refusal())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "install sentencepiece" not in refusal()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "Novel"}}'),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_tokenizer_files_nobody_can_read_are_refused_in_one_line(tmp_path, file, text):
    hf("byte_level").save_pretrained(tmp_path)
    assert Tokenizer.load(str(tmp_path), max_model_len=100)
    (tmp_path / file).write_text(text)
    with pytest.raises(ModelUnsupported, match=r"\Acannot load the tokenizer of .+\Z"):
        Tokenizer.load(str(tmp_path), max_model_len=100)


HELLO = [{"role": "user", "content": "hello"}]


def test_a_template_file_travels_with_the_base(tmp_path):
    hf("byte_level", TEMPLATES["chatml"]).save_pretrained(tmp_path)
    assert Tokenizer.load(str(tmp_path), max_model_len=64).encode_chat(HELLO)
    with pytest.raises(RequestInvalid, match="no chat template"):
        make().encode_chat(HELLO)


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_kept_with_a_processor_is_found(tmp_path, name):
    hf("byte_level").save_pretrained(tmp_path)
    file = tmp_path / name
    for nothing in ("{", "[]", '{"chat_template": null}'):
        file.write_text(nothing)
        with pytest.raises(RequestInvalid, match="no chat template"):
            Tokenizer.load(str(tmp_path), max_model_len=64).encode_chat(HELLO)
    file.write_text(json.dumps({"chat_template": TEMPLATES["chatml"]}))
    found = Tokenizer.load(str(tmp_path), max_model_len=64)
    message = [{"role": "user", "content": "hello"}]
    own = Tokenizer(hf("byte_level", TEMPLATES["chatml"]), max_model_len=64)
    assert found.encode_chat(message) == own.encode_chat(message)


def test_tokens_have_a_text_and_bytes():
    source = hf("byte_level")
    tokenizer = Tokenizer(source, max_model_len=64)
    half = source("😀")["input_ids"][0]
    assert tokenizer.token_text(half) == "\ufffd"
    assert tokenizer.token_bytes(half) == "😀".encode()[: len(tokenizer.token_bytes(half))]
    assert tokenizer.token_text(source.eos_token_id) == "</s>"
    assert tokenizer.token_bytes(source.eos_token_id) is None
    assert tokenizer.token_bytes(10**6) is None
    space = source(" hello")["input_ids"]
    assert b"".join(tokenizer.token_bytes(token) for token in space) == b" hello"
    assert tokenizer.vocab_size == len(source)


def test_decode_is_what_a_stream_gives():
    tokenizer = make("llama")
    for text in [line for line in CORPUS if "<|" not in line]:
        ids = tokenizer.encode_prompt(text)
        stream = tokenizer.stream()
        assert "".join([stream.feed(token).text for token in ids]) + stream.finish() == text
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_told_by_name_where_that_is_asked_for():
    tokenizer = make()
    text = "<|im_start|>user\nnaïve 😀<|im_end|>\n"
    ids = tokenizer.encode_prompt(text, special=False)
    assert tokenizer.decode(ids, special=True) == text
    assert tokenizer.decode(ids) == "user\nnaïve 😀\n"
    assert tokenizer.told["chat_template"] is None
    assert tokenizer.told["eos_token"] == "</s>"


def test_offsets_count_the_characters_before_each_token():
    tokenizer = make()
    prompt = tokenizer.encode_prompt("hello wor")
    output = tokenizer.encode_prompt("ld 😀!")
    echo = tokenizer.echo(prompt)
    stream = echo.stream(stops=["hello"])
    parts = [*echo.deltas, *(stream.feed(token) for token in output)]
    text = "".join(part.text for part in parts) + stream.finish()
    assert text == "hello world 😀!"
    names = [tokenizer.token_text(token) for token in prompt + output]
    assert parts[0].offset == 0
    for part, name in zip(parts, names, strict=True):
        if "\ufffd" not in name:
            assert text[part.offset :].startswith(name)
    assert tokenizer.stream(after=prompt).feed(output[0]).offset == 0


def test_choices_of_one_prompt_share_its_echo_and_nothing_else():
    """The prompt ends within a character."""
    tokenizer = make("llama")
    ids = tokenizer.encode_prompt("say 🦔!")
    middle = ids.index(next(t for t in ids if tokenizer.token_bytes(t).startswith(b"\xf0"))) + 1
    echo = tokenizer.echo(ids[:middle])
    told = "".join(delta.text for delta in echo.deltas)
    one, other = echo.stream(), echo.stream()
    assert "".join(one.feed(token).text for token in ids[middle:]) == "🦔!"
    assert [one.feed(ids[0]).offset, other.feed(ids[0]).offset] == [len("say 🦔!"), len(told)]
    assert told == "say "


def test_a_stop_string_across_tokens_ends_the_stream():
    tokenizer = make()
    ids = tokenizer.encode_prompt("one two END three")
    stream = tokenizer.stream(stops=["END"])
    parts = []
    for token in ids:
        parts.append(stream.feed(token))
        if parts[-1].stopped:
            break
    assert "".join(part.text for part in parts) + stream.finish() == "one two "
    assert stream.stopped
    assert len(parts) < len(ids)
    other = tokenizer.stream(stops=["ENDX"])
    text = "".join([other.feed(token).text for token in ids]) + other.finish()
    assert text == "one two END three"
    assert not other.stopped


def test_an_unfinished_character_can_complete_a_stop_string_at_the_end():
    tokenizer = make()
    ids = tokenizer.encode_prompt("a😀")[:-1]
    stream = tokenizer.stream(stops=["a\ufffd"])
    assert "".join([stream.feed(token).text for token in ids]) + stream.finish() == ""
    assert stream.stopped


def test_many_threads_get_what_one_gets():
    source = hf("llama", TEMPLATES["chatml"])
    tokenizer = Tokenizer(source, max_model_len=4096)
    chats = [
        [{"role": "user", "content": line + "</s>" * (n % 2)}] for n, line in enumerate(CORPUS)
    ]
    alone = [tokenizer.encode_chat(chat) for chat in chats]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode_chat, chats * 8)) == alone * 8
    assert len(set(map(tuple, alone))) > 1
