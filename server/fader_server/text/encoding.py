"""One text to token ids, off the interpreter lock. Knows nothing of chats or prompts."""

import tokenizers

from fader_server.errors import ContextTooLong, RequestInvalid

CHARS_PER_TOKEN = 32
"""No real text has more characters a token over a whole context; longer ones are not tokenised."""


def encode(
    backend: tokenizers.Tokenizer,
    text: str,
    *,
    param: str,
    special: tokenizers.Tokenizer | None = None,
) -> list[int]:
    """Token ids of a text; special: with the tokens this tokenizer adds by itself, such as BOS.

    Raises RequestInvalid for text that cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestInvalid(
            "expected valid Unicode text, got a lone surrogate", param=param
        ) from error
    try:
        # The batch call releases the interpreter lock, the plain one stalls every other thread.
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=special is backend)
        if special is not None and special is not backend:
            encoding = special.post_process(encoding)
    except Exception as error:  # the library raises nothing more precise
        raise RequestInvalid("the tokenizer cannot encode this text", param=param) from error
    return encoding.ids


def check_length(characters: int, max_model_len: int, *, param: str) -> None:
    """Refuse a text that cannot fit before any time is spent on it."""
    if characters > CHARS_PER_TOKEN * max_model_len:
        what = f"the prompt has {characters} characters"
        raise ContextTooLong.of(max_model_len, what, param=param)
