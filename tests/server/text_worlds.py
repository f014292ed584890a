"""Small tokenizers of every family, trained on the spot, and chat templates in known styles."""

import functools
import json

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's a test, isn't it?",
    "hello world hello there  two spaces\n\nnew lines\ttabs",
    "naïve café e\u0301 größe Ελληνικά русский текст",
    "你好，世界。日本語のテキスト 한국어 문장",
    "emoji 😀 👩‍👩‍👧 🇩🇪 flags and ﷽ نص عربي हिन्दी",
    "def f(x): return x * 2  # code",
    "user assistant system <|im_start|> <|im_end|> end of turn",
] * 3

CONTROLS = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
]


def _trainer(kind, **more):
    return kind(vocab_size=600, special_tokens=CONTROLS, show_progress=False, **more)


def byte_level():
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(CORPUS, _trainer(trainers.BpeTrainer, initial_alphabet=alphabet))
    return tok


def llama(*, prepend):
    """SentencePiece BPE with byte fallback, as Llama-2 converts: spaces in the normaliser."""
    tok = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    tok.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prepend else []), *steps]
    )
    tok.pre_tokenizer = None
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prepend else []),
        ]
    )
    text = [line for line in CORPUS if line.isascii()]
    raw = _trainer(trainers.BpeTrainer, max_token_length=12)
    tok.train_from_iterator(text, raw)
    return _bytes_in_vocab(tok)


def metaspace(scheme="first"):
    tok = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tok.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    text = [line for line in CORPUS if line.isascii()]
    tok.train_from_iterator(text, _trainer(trainers.BpeTrainer, max_token_length=12))
    return _bytes_in_vocab(tok)


def _bytes_in_vocab(tok):
    """Byte tokens belong to the model's vocabulary, not to the added tokens."""
    spec = json.loads(tok.to_str())
    vocab = spec["model"]["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def unigram():
    tok = tokenizers.Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    tok.train_from_iterator(CORPUS, _trainer(trainers.UnigramTrainer, unk_token="<unk>"))
    return tok


def words():
    tok = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.train_from_iterator(CORPUS, _trainer(trainers.WordLevelTrainer))
    return tok


BUILDERS = {
    "byte_level": byte_level,
    "llama": functools.partial(llama, prepend=True),
    "gemma": functools.partial(llama, prepend=False),
    "metaspace": metaspace,
    "metaspace_always": functools.partial(metaspace, "always"),
    "unigram": unigram,
    "words": words,
}


@functools.cache
def _serialised(family):
    return BUILDERS[family]().to_str()


def backend(family):
    return tokenizers.Tokenizer.from_str(_serialised(family))


def hf(family, template=None, *, rstrip=False, structure=()):
    """A transformers tokenizer; rstrip: control tokens swallow the space after them, as Phi-3's."""
    tok = backend(family)
    if rstrip:
        tok.add_special_tokens([AddedToken(c, rstrip=True, normalized=False) for c in CONTROLS[3:]])
    tok.add_tokens([AddedToken(name, normalized=False) for name in structure])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
        " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
        "{% set role = m['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "parts": (  # of models that also see: content that is no list is lost
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "direct": (  # the template's text touches the content
        "{% for m in messages %}{{ '<|' }}{{ m['content'] }}{{ '|>' }}{% endfor %}<|im_start|>"
    ),
    "slicing": (  # templates that cut and rejoin what they are given
        "{% for m in messages %}<|im_start|>{{ m['content'].split('<|im_end|>')[-1] }}"
        "{{ m['content'][1:] }}{{ m['content'] | replace('<|im_start|>', '') | upper }}<|im_end|>"
        "{% endfor %}"
    ),
}
