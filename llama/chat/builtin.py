"""Templates that need no tokenizer's own. `begin` is BOS where the tokenizer puts it before a text by itself.

alpaca: Stanford Alpaca's train.py (Taori et al. 2023), whose answer follows "### Response:" directly; alpaca_newline: its
forks with a line break between. chatml: OpenAI's. llama3: Llama 3's prompt format (Meta's llama-models,
llama3/chat_format.py). plain: prompt and completion end to end, nothing between.
"""

from __future__ import annotations

_ALPACA = """\
{{- begin -}}
{%- if tools %}{{ raise_exception('alpaca has no place for tools') }}{% endif -%}
{%- set ns = namespace(system='Below is an instruction that describes a task', first=true) -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first %}{{ raise_exception('a system prompt must come first') }}{% endif -%}
{{- message.content + '\\n\\n' -}}{%- set ns.system = '' -%}
{%- elif message.role == 'user' -%}
{%- if not ns.first %}{{ '\\n\\n' }}{% elif ns.system -%}
{{- ns.system -}}
{{- ', paired with an input that provides further context' if message.input -}}
{{- '. Write a response that appropriately completes the request.\\n\\n' -}}
{%- endif -%}
{%- set ns.first = false -%}
{{- '### Instruction:\\n' + message.instruction + '\\n\\n' -}}
{%- if message.input %}{{ '### Input:\\n' + message.input + '\\n\\n' }}{% endif -%}
{{- '### Response:NEWLINE' -}}
{%- elif message.role == 'assistant' -%}
{%- if message.tool_calls %}{{ raise_exception('alpaca has no place for tool calls') }}{% endif -%}
{{- message.content + eos_token -}}
{%- else %}{{ raise_exception('alpaca has no place for a turn of the ' + message.role) }}{%- endif -%}
{%- endfor -%}"""

_PLAIN = """\
{{- begin -}}
{%- if tools %}{{ raise_exception('plain has no place for tools') }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ message.content }}
{%- elif message.role == 'assistant' and not message.tool_calls %}{{ message.content + eos_token }}
{%- else %}{{ raise_exception('plain has no place for tools') }}
{%- endif -%}
{%- endfor -%}"""

_CHATML = """\
{%- if tools %}{{ raise_exception('chatml has no place for tools; use the tokenizer\\'s own template') }}{% endif -%}
{%- for message in messages -%}
{%- if message.tool_calls %}{{ raise_exception('chatml has no place for tool calls') }}{% endif -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

_LLAMA3 = """\
{{- '<|begin_of_text|>' -}}
{%- if tools %}{{ raise_exception('llama3 has no place for tools; use the tokenizer\\'s own template') }}{% endif -%}
{%- for message in messages -%}
{%- if message.tool_calls %}{{ raise_exception('llama3 has no place for tool calls') }}{% endif -%}
{%- set role = 'ipython' if message.role == 'tool' else message.role -%}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}{{- message.content | trim -}}{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}"""

TEMPLATES = {
    "alpaca": _ALPACA.replace("NEWLINE", ""),
    "alpaca_newline": _ALPACA.replace("NEWLINE", "\\n"),
    "plain": _PLAIN,
    "chatml": _CHATML,
    "llama3": _LLAMA3,
}
NEEDED = {
    "alpaca": (),
    "alpaca_newline": (),
    "plain": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Control tokens that the tokenizer must have."""
