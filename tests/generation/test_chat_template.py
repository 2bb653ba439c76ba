import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from slr_core.errors import RequestError
from slr_core.generation import chat_template
from slr_core.generation.chat_template import render_chat
from slr_core.generation.prepare import prepare
from tests import tiny

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if message.role not in ['user', 'assistant', 'system', 'tool'] %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}{{ message.content.replace('<|', '< |').split('x')[0].strip() }}{% endif %}
    {%- if message.reasoning_content is defined %}{{ message.reasoning_content }}{% endif %}
    {{- '<|im_end|>' + eos_token + '\\n' * 2 }}
{%- endfor %}
{{- messages | length }} {{ messages[-1] | tojson }} {{ messages | map(attribute='role') | join(', ') }} {{ ns.last }}
{%- for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{{ '%02d' % i }}{{ '{:>4}'.format(i) }}{% endfor %}
{%- macro shown(x) %}<{{ x }}>{% endmacro %}{{ shown('a') }}{% set block %}in {{ shown(2) }}{% endset %}{{ block }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
{{- {'a': [1, 2.5, none, true]} }}{{ tools }}{{ undefined_name }}{{ dict(a=1) }}{{ 2 ** 10 }}
{{- (messages[0].role ~ 1) | upper }}
"""
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=12)},
        optional={"thinking": st.text("ab", max_size=3), "name": st.none()},
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=20)
@given(MESSAGES)
def test_equals_transformers(messages):
    shown = [{key: value for key, value in message.items() if value is not None} for message in messages]
    ((expected,), _) = render_jinja_template(
        [shown], chat_template=CHATML, add_generation_prompt=True, eos_token="</s>"
    )
    assert render_chat(CHATML, messages, {"eos_token": "</s>"}) == expected


GROWING = "{% set ns = namespace(a='x' * 1000) %}{% for i in range(90) %}{% set ns.a = GROWN %}{% endfor %}{{ ns.a }}"
REASONER = tiny.reasoner()
HOSTILE = {
    "repeated text": "{{ 'a' * 3000000000 }}",
    "repeated list": "{{ ([1] * 3000000000) | length }}",
    "large power": "{{ 9 ** (9 ** 9) }}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filters over ranges": "{{ range(99999) | map('abs') | sum }}" * 99,
    "large range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% for i in range(9) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "width": "{{ 'a' | center(3000000000) }}",
    "method's width": "{{ 'a'.ljust(3000000000) }}",
    "format": "{{ '{:3000000000}'.format(1) }}",
    "format's width": "{{ '{:{}}'.format(1, 3000000000) }}",
    "percent": "{{ '%3000000000d' % 1 }}",
    "indent": "{{ ('\\n' * 60000) | indent(60000) }}",
    "growing sum": GROWING.replace("GROWN", "ns.a + ns.a"),
    "growing concatenation": GROWING.replace("GROWN", "ns.a ~ ns.a"),
    "growing replacement": GROWING.replace("GROWN", "ns.a.replace('x', 'xxxxxxxx')"),
    "growing filter": GROWING.replace("GROWN", "ns.a | replace('x', 'xxxxxxxx')"),
    "growing join": GROWING.replace("GROWN", "ns.a.join(['x'] * 100)"),
    "growing block": "{% set ns = namespace(a='x' * 1000) %}{% for i in range(90) %}"
    "{% set b %}{{ ns.a }}{{ ns.a }}{% endset %}{% set ns.a = b %}{% endfor %}",
    "comparison": GROWING.replace("GROWN", "[ns.a, ns.a]").replace("{{ ns.a }}", "{{ ns.a == [ns.a, 1] }}"),
    "nested tuples": GROWING.replace("GROWN", "(ns.a, ns.a)").replace("{{ ns.a }}", "{{ ns.a | length }}"),
    "nested dictionaries": GROWING.replace("GROWN", "{1: ns.a, 2: ns.a}").replace("{{ ns.a }}", ""),
    "nested calls": GROWING.replace("GROWN", "dict(x=ns.a, y=ns.a)").replace("{{ ns.a }}", ""),
    "nested arguments": "{% macro f() %}{% set ns.a = varargs %}{% endmacro %}{% set ns = namespace(a='x') %}"
    "{% for i in range(90) %}{{ f(ns.a, ns.a) }}{% endfor %}",
    "nested lists": GROWING.replace("GROWN", "[ns.a, ns.a]"),
    "nested lists as JSON": GROWING.replace("GROWN", "[ns.a, ns.a]").replace("{{ ns.a }}", "{{ ns.a | tojson }}"),
    "long output": "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "long source": "x" * (2**17 + 1),
    "code": "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
    "deep nesting": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(REASONER, "config", REASONER.config.replace(text={"chat_template": HOSTILE[name]}))
    began = time.thread_time()
    with pytest.raises(RequestError, match="the chat template refuses the messages") as caught:
        prepare(REASONER, [{"role": "user", "content": "w1 w2"}])
    assert time.thread_time() - began < 1
    assert len(str(caught.value)) < 500
