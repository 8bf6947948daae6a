"""Chat templates in each family's format, in words of our own."""

from __future__ import annotations

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
THINKING = """\
{%- set last = namespace(user=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.index0 > last.user and loop.last %}
        {%- set thought = message.content.split('</think>') if '</think>' in message.content else ['', message.content] %}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought[0].split('<think>')[-1].strip('\\n') }}
        {{- '\\n</think>\\n\\n' + thought[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set opening = '' %}{%- set turns = messages %}{%- endif %}
{%- for turn in turns %}
    {%- if turn['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (opening if loop.first else '') + turn['content'].strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + turn['content'].strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}
"""
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] + '\\n\\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set opening = '' %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}{%- endif %}
    {%- if turn['role'] == 'user' %}
        {{- '[INST] ' + (opening if loop.last else '') + turn['content'] + '[/INST]' }}
    {%- else %}{{- ' ' + turn['content'] + eos_token }}{%- endif %}
{%- endfor %}
"""
NEMO = MISTRAL.replace("'[INST] '", "'[INST]'").replace("' ' + turn", "turn")
GEMMA2 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{- raise_exception('there is no system role') }}{%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""
GEMMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] + '\\n\\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set opening = '' %}{%- set turns = messages %}{%- endif %}
{%- for turn in turns %}
    {%- set role = 'model' if turn['role'] == 'assistant' else turn['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (opening if loop.first else '') }}
    {{- turn['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""
PHI3 = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"
)
PHI4 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"
)
PHI4_MINI = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- else %}{{- eos_token }}{%- endif %}"
)
