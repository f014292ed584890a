"""The field names the generation bodies know: read, refused with a reason, or ignored by intent."""

# fmt: off
_SHARED = frozenset((
    "model", "max_tokens", "n", "stop", "seed", "logit_bias", "temperature", "top_p", "top_k",
    "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs",
    "stream", "stream_options", "adapters", "lora", "lora_path", "ignore_eos",
    "min_tokens", "stop_token_ids", "cache_salt", "response_format",
))
_IGNORED = frozenset((
    "user", "metadata", "store", "service_tier", "prompt_cache_key",
    "safety_identifier", "reasoning_effort", "verbosity", "prediction", "audio",
    "web_search_options", "skip_special_tokens", "spaces_between_special_tokens",
    "add_special_tokens", "prompt_logprobs", "length_penalty", "request_id", "priority",
    "return_token_ids", "truncate_prompt_tokens", "detokenize",
))
UNSERVED_FIELDS = (
    "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "structured_outputs", "json_schema", "grammar", "regex", "ebnf", "bad_words",
    "allowed_token_ids", "use_beam_search", "include_stop_str_in_output",
)
"""They change what an answer may be: without them it would be another, and look right."""
_COMPLETION = frozenset(("prompt", "echo", "best_of", "suffix", "parallel_tool_calls"))
_CHAT = frozenset((
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "parallel_tool_calls", "functions", "function_call", "modalities", "chat_template",
    "chat_template_kwargs", "continue_final_message", "add_generation_prompt",
))
# fmt: on
COMPLETION_FIELDS = _SHARED | _IGNORED | frozenset(UNSERVED_FIELDS) | _COMPLETION
CHAT_FIELDS = _SHARED | _IGNORED | frozenset(UNSERVED_FIELDS) | _CHAT
