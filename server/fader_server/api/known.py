"""The field names the generation bodies know: read, refused with a reason, or ignored by intent."""

from collections.abc import Mapping

from fader_server.api.response_format import FIELD
from fader_server.api.shapes import SHAPE_FIELDS

Fixed = Mapping[str, tuple[tuple[object, ...], str]]
# fmt: off
_SHARED = frozenset((
    "model", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "logit_bias",
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logprobs", "stream", "stream_options", "adapters", "lora", "lora_path",
    "ignore_eos", "min_tokens", "stop_token_ids", "cache_salt", "best_of", "return_token_ids",
    "return_tokens_as_token_ids", "allowed_token_ids", "bad_words", "reasoning_effort",
    "include_stop_str_in_output", "prediction",
))
_IGNORED = frozenset((
    "user", "metadata", "store", "service_tier", "prompt_cache_key",
    "safety_identifier", "verbosity", "audio",
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
FIXED_OF_RESPONSES: Fixed = {
    **FIXED_OF_CHAT,
    "background": ((False,), "is not supported: an answer is told as it is made"),
    "previous_response_id": ((), "is not supported: responses are not kept, send all of input"),
    "conversation": ((), "is not supported: responses are not kept, send all of input"),
    "prompt": ((), "is not supported: prompts are not kept, send instructions and input"),
    "moderation": ((), "is not supported"),
    "truncation": (("disabled", "auto"), "must be disabled or auto"),
    "messages": ((), "is of chat completions: see input"),
    FIELD: ((), "is of chat completions: see text.format"),
    "reasoning_effort": ((), "is of chat completions: see reasoning.effort"),
    "max_tokens": ((), "is of chat completions: see max_output_tokens"),
    "max_completion_tokens": ((), "is of chat completions: see max_output_tokens"),
    "logprobs": ((False, 0), "is of chat completions: see include and top_logprobs"),
    "functions": (([],), "is of chat completions: see tools"),
    "function_call": (("none",), "is of chat completions: see tool_choice"),
    "n": ((1,), "is always 1 here"),
    "best_of": ((1,), "is always 1 here"),
    "add_generation_prompt": ((True,), "is always true here"),
    "continue_final_message": ((False,), "is of chat completions"),
    "return_token_ids": ((False,), "is of completions and chat completions"),
    "modalities": ((["text"],), "is always text here"),
    "chat_template": ((), "may not come from a request"),
    "chat_template_kwargs": (({},), "may not come from a request: see reasoning.effort"),
}
UNSERVED_FIELDS = ("guided_whitespace_pattern", "use_beam_search")
"""They change what an answer may be: without them it would be another, and look right."""
_COMPLETION = frozenset(("prompt", "echo", "parallel_tool_calls"))
_CHAT = frozenset((
    "messages", "top_logprobs", "tools", "tool_choice",
    "parallel_tool_calls", "functions", "function_call", "modalities", "chat_template",
    "chat_template_kwargs", "continue_final_message", "add_generation_prompt",
))
_RESPONSE = frozenset((
    "input", "instructions", "max_output_tokens", "max_tool_calls", "include", "text", "reasoning",
    "tools", "tool_choice", "top_logprobs", "prompt_cache_retention", "prompt_cache_options",
    "context_management", "background_options", "access_programs", "image", "client_metadata",
))
# fmt: on
_BOTH = _SHARED | SHAPE_FIELDS | _IGNORED | frozenset(UNSERVED_FIELDS) | FIXED_FIELDS.keys()
COMPLETION_FIELDS = _BOTH | _COMPLETION | FIXED_OF_COMPLETIONS.keys()
CHAT_FIELDS = _BOTH | _CHAT | FIXED_OF_CHAT.keys()
RESPONSE_FIELDS = _BOTH | _RESPONSE | {"parallel_tool_calls"} | FIXED_OF_RESPONSES.keys()
SAME_FIELDS = (
    RESPONSE_FIELDS - _RESPONSE - _IGNORED - FIXED_OF_RESPONSES.keys() - {"stream_options"}
)
"""What a response may ask for in the words of a chat."""
RESPONSE_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    FIELD: "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""What else of a chat it has by another name."""
