"""The field names the generation bodies know: read, refused with a reason, or ignored by intent."""

from collections.abc import Mapping

from fader_server.api.shapes import SHAPE_FIELDS

Fixed = Mapping[str, tuple[tuple[object, ...], str]]
# fmt: off
_SHARED = frozenset((
    "model", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "logit_bias",
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logprobs", "stream", "stream_options", "adapters", "lora", "lora_path",
    "ignore_eos", "min_tokens", "stop_token_ids", "cache_salt", "best_of", "return_token_ids",
    "reasoning_effort", "include_stop_str_in_output",
))
_IGNORED = frozenset((
    "user", "metadata", "store", "service_tier", "prompt_cache_key",
    "safety_identifier", "verbosity", "prediction", "audio",
    "web_search_options", "spaces_between_special_tokens", "request_id", "priority",
    "guided_decoding_backend",
))
FIXED_FIELDS: Fixed = {
    "skip_special_tokens": ((True,), "is always true here"),
    "prompt_logprobs": ((), "is not supported; completions have echo with logprobs"),
    "truncate_prompt_tokens": ((), "is not supported; send a prompt that fits"),
    "detokenize": ((True,), "is always true here; return_token_ids adds the ids of the tokens"),
    "length_penalty": ((1.0,), "is of beam search, which is not supported"),
    "models": (([],), "is not supported; name one in model"),
}
"""What both bodies may only say as it is done here: the values that say so, and why no other."""
FIXED_OF_COMPLETIONS: Fixed = {
    "add_special_tokens": ((True,), "is always true here; send token ids instead"),
    "top_logprobs": ((0,), "is of chat completions; send the number in logprobs"),
    "suffix": ((), "is not supported"),
}
FIXED_OF_CHAT: Fixed = {
    "add_special_tokens": ((False,), "is always false here: the chat template has them"),
    "echo": ((False,), "is of completions"),
    "suffix": ((), "is of completions, and not supported there"),
}
UNSERVED_FIELDS = (
    "guided_grammar", "guided_whitespace_pattern", "grammar", "ebnf", "bad_words",
    "allowed_token_ids", "use_beam_search",
    "return_tokens_as_token_ids",
)
"""They change what an answer may be: without them it would be another, and look right."""
_COMPLETION = frozenset(("prompt", "echo", "parallel_tool_calls"))
_CHAT = frozenset((
    "messages", "top_logprobs", "tools", "tool_choice",
    "parallel_tool_calls", "functions", "function_call", "modalities", "chat_template",
    "chat_template_kwargs", "continue_final_message", "add_generation_prompt",
))
# fmt: on
_BOTH = _SHARED | SHAPE_FIELDS | _IGNORED | frozenset(UNSERVED_FIELDS) | FIXED_FIELDS.keys()
COMPLETION_FIELDS = _BOTH | _COMPLETION | FIXED_OF_COMPLETIONS.keys()
CHAT_FIELDS = _BOTH | _CHAT | FIXED_OF_CHAT.keys()
