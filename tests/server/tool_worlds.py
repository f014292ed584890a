"""Chat templates with tools in the styles that model families have, and tokenizers for them."""

import json

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.server.text_worlds import backend

_HEAD = (
    "{% if tools %}<|im_start|>system\nYou may call these:"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
)
_TAIL = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _chatml(calls: str, *, head: str = _HEAD) -> str:
    """calls: what is written for `m.tool_calls`."""
    return (
        head + "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
        "{{ m.content }}\n</tool_response><|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
        + calls
        + "{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
        + _TAIL
    )


_EACH = "{% for call in m.tool_calls %}{% set f = call.function %}"
_LEAD = "{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"

_PYTHON = (  # texts as JSON writes them, the rest in Python's words
    _EACH + "{{ f.name }}({% for k, v in f.arguments | items %}{{ k }}="
    "{{ v | tojson if v is string or v is mapping else v }}"
    "{% if not loop.last %}, {% endif %}{% endfor %})"
)
_MARKED = (
    "{% macro noted(v) %}{% if v is string %}{{ '<|\"|>' + v + '<|\"|>' }}{% elif v is boolean %}"
    "{{ 'true' if v else 'false' }}{% elif v is mapping %}{{ '{' }}{% for k, w in v | items %}"
    "{{ k }}:{{ noted(w) }}{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}"
    "{% elif v is sequence %}[{% for w in v %}{{ noted(w) }}{% if not loop.last %},{% endif %}"
    "{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}"
)

TEMPLATES = {
    "gemma4": _MARKED
    + _chatml(  # what follows a call is a result, if it is known
        _EACH + "<|tool_call>call:{{ f.name }}{{ noted(f.arguments) }}<tool_call|>{% endfor %}"
        "{% if loop.last %}<|tool_response>{% endif %}"
    ),
    "lfm2": _chatml(
        "<|tool_call_start|>[" + _PYTHON + "{% if not loop.last %}, {% endif %}{% endfor %}]"
        "<|tool_call_end|>"
    ),
    "lfm2_silent": _chatml("", head=_HEAD.replace("these:", "these:<|tool_list_start|>")),
    "olmo3": _chatml(
        "<function_calls>"
        + _PYTHON.replace(" if v is string or v is mapping else v", "")
        + "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}</function_calls>"
    ),
    "pythonic": _chatml(  # no marker: all of the answer
        "[" + _PYTHON + "{% if not loop.last %}, {% endif %}{% endfor %}]"
    ),
    "hermes": _chatml(
        _EACH + _LEAD + '<tool_call>\n{"name": "{{ f.name }}", "arguments": '
        "{{ f.arguments | tojson }}}\n</tool_call>{% endfor %}"
    ),
    "granite": _chatml(  # a list behind a special token
        "<|tool_call|>[{% for call in m.tool_calls %}{{ call.function | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and loop.first %}[AVAILABLE_TOOLS]"
        " {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] ["
        "{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
        "{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
        '{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {\"content\": {{ m.content | tojson }}}"
        "[/TOOL_RESULTS]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral_args": (
        "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
        "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
        "{% else %}{{ m.content }}{% for call in m.tool_calls or [] %}[TOOL_CALLS]"
        "{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "llama": (
        "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n"
        "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}<|eot_id|>{% endif %}"
        "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
        "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
        "{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
        "{% else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
        "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "coder": _chatml(
        _EACH + _LEAD + "<tool_call>\n<function={{ f.name }}>\n"
        "{% for k, v in f.arguments | items %}<parameter={{ k }}>\n"
        "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>{% endfor %}",
        head="{% if tools %}<|im_start|>system\n{% for tool in tools %}<function>\n<name>"
        "{{ tool.function.name }}</name>\n<description>{{ tool.function.description | trim }}"
        "</description>{% for k, p in tool.function.parameters.properties | items %}\n<parameter>"
        "<name>{{ k }}</name><type>{{ p.type }}</type></parameter>{% endfor %}\n</function>"
        "{% endfor %}<|im_end|>\n{% endif %}",
    ),
    "glm": _chatml(
        _EACH + "\n<tool_call>{{ f.name }}\n{% for k, v in f.arguments | items %}<arg_key>{{ k }}"
        "</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}"
        "</tool_call>{% endfor %}"
    ),
    "invoke": _chatml(  # calls in a wrapper
        "<calls>\n" + _EACH + '<invoke name="{{ f.name }}">\n'
        "{% for k, v in f.arguments | items %}"
        '<parameter name="{{ k }}">{{ v if v is string else v | tojson }}</parameter>\n'
        "{% endfor %}</invoke>\n{% endfor %}</calls>"
    ),
    "deepseek": (  # arguments come as text
        "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }}: "
        "{{ tool.function.parameters | tojson }}\n{% endfor %}{% for m in messages %}"
        "{% if m.role == 'assistant' and m.tool_calls %}<|assistant|><|calls|>"
        "{% for call in m.tool_calls %}<|call|>function<|sep|>{{ call.function.name "
        "+ '\n```json\n' + call.function.arguments + '\n```' }}"
        "<|end_call|>{% if not loop.last %}{{ '\n' }}"
        "{% endif %}{% endfor %}<|end_calls|>{{ eos_token }}{% elif m.role == 'assistant' %}"
        "<|assistant|>{{ m.content + eos_token }}{% else %}<|user|>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}

SPECIAL = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|tool_call|>", "<|calls|>", "<|call|>", "<|sep|>",
    "<|end_call|>", "<|end_calls|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>',
)  # fmt: skip
LFM2 = ("<|tool_list_start|>", "<|tool_call_start|>", "<|tool_call_end|>")
"""Of its own worlds: where a template is silent they say how calls are written."""
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>")
"""Tokens of their own, but text: not special."""

NO_TOOLS = {
    "repr": _chatml(_EACH + "<tool_call>{{ f.name }} {{ f.arguments }}</tool_call>{% endfor %}"),
    "own": _chatml(  # a notation of its own; text it would write as it is
        _EACH + "<|tool_call|>{{ f.name }}{% if f.arguments is mapping %}{{ '{' }}"
        "{% for k, v in f.arguments | items %}{{ k }}:<|sep|>{{ v }}<|sep|>{% endfor %}{{ '}' }}"
        "{% else %}{{ f.arguments }}{% endif %}<|end_call|>{% endfor %}"
    ),
    "channels": (  # words are in a channel too, which the model opens
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        " to={{ f.name }}<|sep|>commentary json<|call|>{{ f.arguments | tojson }}<|end_call|>"
        "{% else %}<|sep|>final<|call|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    ),
    "silent": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
    "code": _chatml(  # texts that nothing tells from other values
        "[" + _EACH + "{{ f.name }}({% for k, v in f.arguments | items %}{{ k }}={{ v }}"
        "{% endfor %}){% endfor %}]"
    ),
    "lines": _chatml(  # without a marker and brackets they may be anything
        _PYTHON + "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    ),
    "names": _chatml(_EACH + "<tool_call>{{ f.name }}</tool_call>{% endfor %}"),
    "mute": _chatml(""),
    "bare": _chatml(_EACH + "{{ f.name }} {{ f.arguments | tojson }}\n{% endfor %}"),
}


def hf(template: str, *, merges: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with every marker; merges: else each byte is a token of its own."""
    tok = backend("byte_level")
    if not merges:
        tok = _bytes_only(tok)
    special = [*SPECIAL, *(LFM2 if any(name in template for name in LFM2) else ())]
    tok.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tok.add_tokens([AddedToken(name, normalized=False) for name in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=template,
    )  # fmt: skip


def _bytes_only(tok):
    spec = json.loads(tok.to_str())
    spec["model"]["merges"] = []
    return type(tok).from_str(json.dumps(spec))
