"""Chat templates in the manner of model families, and conversations to render with them."""

SYSTEM = {"role": "system", "content": "Be brief. "}
ASK = {"role": "user", "content": "  What's 2 < 3 & \"so\"?\n"}
ANSWER = {"role": "assistant", "content": "It's true\u2026 \U0001f600"}
AGAIN = {"role": "user", "content": "And {{ 2 > 3 }}?"}

CONVERSATIONS = [
    ([ASK], True),
    ([ASK], False),
    ([SYSTEM, ASK], True),
    ([ASK, ANSWER, AGAIN], True),
    ([SYSTEM, ASK, ANSWER], False),
]

LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""

LLAMA31 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The first system turn is taken out of the list. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN2 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

# Whitespace rules, Python methods, loop controls, tojson's options, printed constants.
CORNERS = """\
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {% continue %}
    {% endif %}
  {{ loop.index }}/{{ messages | length }} {{ message.role.upper() }}:
{{ message.content.strip().split(' ') | join('_') }}
    {% generation %}
{{ message['content'] | tojson }}
    {%- endgeneration %}

    {% if loop.index == 4 %}{% break %}{% endif %}
{% endfor %}
{{ messages[0] | tojson }}
{{ messages[-1] | tojson(indent=2) }}
{{ messages[::-1] | map(attribute='role') | list | tojson(separators=(',', ':')) }}
{{ {'b': 1.5, 'a': [true, none, 1e-5]} | tojson(sort_keys=true) }}
{{ messages[0].content | tojson(ensure_ascii=True) }}
{{ none }} {{ true }} {{ missing }}|{{ 'x' if missing is defined else 'y' }}
{{ strftime_now('%A %-d %B %Y, %j %H:%M:%S %I %p %y %%') }}
{{ messages[0].get('name', 'anon') }} {{ messages[0].items() | list | length }} {{ messages[0].name is defined }}
{{ messages[0].content.startswith('  ') }} {{ messages[0].content.rstrip().endswith('?') }}
{% set joined %}{% for m in messages %}{{ m.role[0] }}{% endfor %}{% endset %}
{{ joined }}{{ '' ~ messages | length ~ '!' }}{{ "%s-%s" | format('a', 2) }}
{%- if add_generation_prompt +%}

end   {% endif %}
"""

CASES = [
    {
        "name": "llama 3",
        "template": LLAMA3,
        "special_tokens": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "conversations": CONVERSATIONS,
    },
    {
        "name": "llama 3.1",
        "template": LLAMA31,
        "special_tokens": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "conversations": CONVERSATIONS,
    },
    {
        "name": "qwen 2",
        "template": QWEN2,
        "special_tokens": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "conversations": CONVERSATIONS,
    },
    {
        "name": "mistral",
        "template": MISTRAL,
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
        "conversations": CONVERSATIONS + [([ASK, AGAIN], True), ([ANSWER], False)],
    },
    {
        "name": "corners",
        "template": CORNERS,
        "special_tokens": {},
        "conversations": CONVERSATIONS + [([{"role": "tool", "content": "x"}, ASK, ANSWER, AGAIN, ANSWER], False)],
    },
]
