"""Chat templates render as in transformers; and none of them can hang or flood the process."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.runtime.template import MOST_CHARACTERS, ChatTemplate, TemplateFault

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MESSAGES = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": 'Hé "you" {%x%} <b> \n 😀'},
    {"role": "assistant", "content": "<think>a</think>Yes, Sir."},
    {"role": "user", "content": "Hi there"},
]
LINES = """
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'user' %}
        <|user|>
        {{ message['content'] }}
    {% else %}
    {{- '<|' ~ message.role ~ '|>' }}
{{ message.content | trim }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
"""Several lines, and no sign that takes blanks away: trim_blocks and lstrip_blocks do."""

EXPRESSIONS = [
    "messages[1].content.upper()",
    "messages[1].content.lower()",
    "messages[3].content.replace('Hi', 'Ho')",
    "messages[3].content.replace('i', 'ii', 1)",
    "messages[2].content.rsplit('</think>', 1)[-1]",
    "messages[2].content.split('</think>')[-1].lstrip('\\n')",
    "messages[0].content.strip()",
    "messages[0].content.lstrip() + '|'",
    "messages[0].content.rstrip() + '|'",
    "messages[3].content.title()",
    "messages[3].content.capitalize()",
    "messages[3].content.startswith('Hi')",
    "messages[3].content.endswith('there')",
    "messages[3].content.find('there')",
    "messages[3].content.count('e')",
    "messages[3].content.partition(' ')",
    "messages[3].content.center(20)",
    "messages[3].content.ljust(20) ~ '|'",
    "messages[3].content.zfill(20)",
    "messages[3].content.isalpha()",
    "messages[3].content.removeprefix('Hi')",
    "' '.join(['a', 'b'])",
    "'{} and {:>4}'.format('a', 3)",
    "'%s is %d' % ('a', 3)",
    "messages | length",
    "messages | map(attribute='role') | join(', ')",
    "messages | map('upper') | list | length",
    "messages | selectattr('role', 'equalto', 'user') | list | tojson",
    "messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | first",
    "messages | tojson",
    "messages[1] | tojson(indent=2)",
    "messages[1] | tojson(ensure_ascii=true, sort_keys=true)",
    "messages[1] | tojson(separators=(',', ':'))",
    "messages[0] | items | list",
    "messages[0].items() | list",
    "messages[0] | dictsort",
    "messages[0].get('name', 'nobody')",
    "(messages | last).content | replace('Hi', 'Ho')",
    "messages[3].content | upper | lower | title | capitalize",
    "messages[0].content | trim | length",
    "messages[0].content | indent(4, true)",
    "messages[1].content | e",
    "messages[1].content | escape | safe",
    "messages[0].name | default('nobody')",
    "messages[0].name is defined",
    "tools is none",
    "documents is none",
    "messages[0].content is string",
    "messages is iterable and messages is not mapping",
    "messages[1:] | length",
    "messages[::-1][0].role",
    "(messages | map(attribute='role') | unique | sort | list)",
    "[3, 1, 2] | sort | reverse | list",
    "[3, 1, 2] | sum + [3, 1] | max - [3, 1] | min",
    "'3' | int + 2",
    "2.567 | round(1)",
    "7 // 2 + 2 ** 5 % 7",
    "-3 | abs",
    "'ab' * 3",
    "['a'] * 2 + ['b']",
    "'a' in 'cat' and 'role' in messages[0]",
    "range(5) | list",
    "range(1, 4) | join('-')",
    "(messages | groupby('role') | list)[0].grouper",
    "'%.2f' | format(2.5)",
    "dict(a=1).a",
    "messages[0].content | string | wordcount",
    "eos_token + unk_token",
    "'yes' if messages else 'no'",
    "none ~ true ~ 1.5",
    "[1, (2, 'b')] ~ {'a': 1}",
]
BLOCKS = [
    LINES,
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.first }}"
    "{{ loop.previtem.role }}{{ loop.nextitem.role }}{{ loop.cycle('a', 'b') }};{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ m.content }}{% else %}none"
    "{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "{% set ns = namespace(last='', n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'user' %}{% set ns.last = m.content %}{% endif %}{% endfor %}{{ ns.n }}"
    "{{ ns.last }}",
    "{% macro turn(m, open='<|') %}{{ open ~ m.role }}{{ caller() if caller }}{% endmacro %}"
    "{{ turn(messages[0]) }}{% call turn(messages[1], open='[') %} called {% endcall %}",
    "{% set x %}a{{ messages[0].role }}b{% endset %}{{ x }}{{ x | length }}",
    "{% filter upper %}abc{{ messages[0].role }}{% endfilter %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{%- if messages[0].role == 'system' -%} {%- set first = messages[0].content -%} "
    "{%- set rest = messages[1:] -%} {%- endif -%} {{ first }}{{ rest | length }}",
    "{# a remark #}\n  {% with a = 1, b = 2 %}\n{{ a + b }}\n  {% endwith %}\n",
    "{% raw %}{{ not a value }}{% endraw %}",
    "{{ messages }}",
    "{% for a in [1, 2] %}{% for b in (3, 4) %}{{ a * b }} {% endfor %}{% endfor %}",
]


def _reference(source: str, messages: list[dict[str, Any]], ask: bool = True) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=ask, **TOKENS
    )
    return rendered[0]


@pytest.mark.parametrize("source", ["{{ " + one + " }}" for one in EXPRESSIONS] + BLOCKS)
def test_a_template_renders_as_in_transformers(source: str) -> None:
    template = ChatTemplate(source, TOKENS)
    for messages in (MESSAGES, MESSAGES[3:] * 4):
        for ask in (True, False):
            try:
                wanted = _reference(source, messages, ask)
            except Exception:  # refused by both
                with pytest.raises(TemplateFault):
                    template.render(messages, ask=ask)
                continue
            assert template.render(messages, ask=ask) == wanted


_TEXT = st.text(max_size=40) | st.sampled_from(["Total:  42", "1.  2 eggs", "Don'ts", "\n\n \t"])


@given(
    turns=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant")), "content": _TEXT}),
        min_size=1,
        max_size=6,
    ),
    source=st.sampled_from([LINES, BLOCKS[1], BLOCKS[5], "{{ messages | tojson }}"]),
)
def test_any_conversation_renders_as_in_transformers(
    turns: list[dict[str, str]], source: str
) -> None:
    try:
        wanted = _reference(source, turns)
    except Exception:
        return
    assert ChatTemplate(source, TOKENS).render(turns) == wanted


def test_the_time_of_day_is_known() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(MESSAGES).isdecimal()


def test_what_a_template_refuses_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('no system here') }}", {})
    with pytest.raises(TemplateFault, match="no system here"):
        template.render(MESSAGES)
    with pytest.raises(TemplateFault, match="has no attribute 'nothing'"):
        ChatTemplate("{{ messages[0].nothing() }}", {}).render(MESSAGES)
    with pytest.raises(TemplateFault, match="end of"):
        ChatTemplate("{% for m in messages %}", {}).render(MESSAGES)


def test_a_conversation_of_thousands_of_turns_is_no_attack() -> None:
    source = (
        "{% for m in messages %}{% if loop.index == messages|length %}{{ m.content | trim }}"
        "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    )
    many = [{"role": "user", "content": "Hi"}] * 4000
    assert len(ChatTemplate(source, {}).render(many)) == 3999 * 17 + 2
    large = [{"role": "user", "content": "x" * 900_000}]
    assert len(ChatTemplate(LINES, {}).render(large)) > 900_000


LOOP = "{% for a in range(100000) %}"
HOSTILE = {
    "loops": LOOP * 4 + "x" + "{% endfor %}" * 4,
    "empty loops": LOOP * 4 + "{% endfor %}" * 4,
    "doubling": "{% set ns = namespace(x='xx') %}"
    + LOOP
    + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='xx') %}"
    + LOOP
    + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling in blocks": "{% set x = 'xx' %}"
    + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60
    + "{{ x }}",
    "doubling lists": "{% set x = ['xx'] %}" + "{% set x = [x, x] %}" * 45 + "{{ x }}",
    "comparing lists": "".join(
        f"{{% set {name} = [1] %}}" + f"{{% set {name} = [{name}, {name}] %}}" * 45 for name in "xy"
    )
    + "{{ x == y }}",
    "doubling dicts": "{% set x = {1: 1} %}" + "{% set x = {1: x, 2: x} %}" * 45 + "{{ x|tojson }}",
    "namespaces": "{% set x = namespace(a=1) %}"
    + "{% set x = namespace(a=x, b=x) %}" * 45
    + "{{ x }}",
    "namespaces in lists": "{% set x = namespace(a=1) %}"
    + "{% set x = namespace(a=[x, x]) %}" * 45
    + "{{ [x] | string }}",
    "product": "{{ 'a' * 10000000000 }}",
    "product of a list": "{{ ['a'] * 10000000000 }}",
    "numbers": "{{ 10 ** 10000000 }}",
    "growing numbers": "{% set ns = namespace(x=9) %}"
    + LOOP
    + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent by a star": "{{ '%*d' % (1000000000, 1) }}",
    "precision": "{{ '%.1000000000f' % 1.5 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format by a field": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill by subscript": "{{ 'a'['zfill'](1000000000) }}",
    "center by a filter": "{{ 'a' | center(1000000000) }}",
    "center by attr": "{{ ('a' | attr('center'))(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "translate": "{{ ('a' * 1000).translate({97: 'x' * 100000}) }}",
    "replace": "{{ ('a' * 100000).replace('', 'x' * 100000) }}",
    "replace by a filter": "{{ ('a' * 100000) | replace('a', 'x' * 100000) }}",
    "join": "{{ ('x' * 100000).join(range(100000) | list) }}",
    "join by a filter": "{{ range(10000) | join('x' * 100000) }}",
    "indent": "{{ ('\n' * 100000) | indent(1000) }}",
    "indent by a text": "{{ ('\n' * 100000) | indent('x' * 1000) }}",
    "json": "{{ ([1] * 1000) | tojson(indent=1000000) }}",
    "json's separators": "{{ ([1] * 1000) | tojson(separators=('x' * 100000, '')) }}",
    "bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "maps": "{{ range(100000)" + " | map('string')" * 200 + " | list | length }}",
    "lists": "{{ range(100000)" + " | list" * 2000 + " }}",
    "sum": "{{ (range(10000) | map('string') | map('list')) | sum(start=[]) }}",
    "slices": "{% for x in [1] | slice(1000000000) %}{% endfor %}",
    "batches": "{{ [1] | batch(1000000000, ' ') | list }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "two recursions": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "time": "{{ strftime_now('%999999999Y') }}",
    "names": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sums": "{{ " + "1 + " * 20000 + "1 }}",
    "length": " " * (MOST_CHARACTERS + 1),
    "constants": "{{ " + "'a' ~ " * 10000 + "'b' }}" + "{{ 'x' | replace('x', 'y' * 9999999999) }}",
}


@pytest.mark.parametrize("source", [pytest.param(one, id=name) for name, one in HOSTILE.items()])
def test_a_hostile_template_is_stopped(source: str) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    try:
        text = ChatTemplate(source, {}).render(MESSAGES)
    except TemplateFault:
        text = ""
    assert len(text) < 2_000_000
    assert time.thread_time() - started < 30, "seconds of this thread; two are allowed"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400_000, "kB"


def test_a_hostile_template_stops_nobody_else() -> None:
    """It is cut off in the thread that renders it; others get their answers meanwhile."""
    source = "{% if messages[0].content == 'x' %}" + HOSTILE["loops"] + "{% endif %}ok"
    template = ChatTemplate(source, {})
    faults: list[Exception] = []

    def attack() -> None:
        try:
            template.render([{"role": "user", "content": "x"}])
        except TemplateFault as fault:
            faults.append(fault)

    attackers = [threading.Thread(target=attack) for _ in range(3)]
    for one in attackers:
        one.start()
    for _ in range(20):
        assert template.render(MESSAGES) == "ok"
    for one in attackers:
        one.join()
    assert len(faults) == 3
    assert template.render(MESSAGES) == "ok"


@settings(max_examples=40)
@given(size=st.integers(0, 3000), width=st.integers(0, 3000))
def test_what_is_bounded_stays_right_below_the_bound(size: int, width: int) -> None:
    source = f"{{{{ ('ab ' * {size}).ljust({width}) }}}}{{{{ '%{width % 1000}d' % {size} }}}}"
    try:
        found = ChatTemplate(source, {}).render(MESSAGES)
    except TemplateFault:
        assert width > 3 * size + 1000
        return
    assert found == _reference(source, MESSAGES)


def _read(folder: Path, config: dict[str, Any], **files: str) -> str | None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / f"{name}.jinja").write_text(text)
    template = ChatTemplate.read(folder)
    return template and template.render(MESSAGES)


def test_a_template_is_found_where_transformers_looks(tmp_path: Path) -> None:
    assert ChatTemplate.read(tmp_path) is None
    assert _read(tmp_path, {}) is None
    assert _read(tmp_path, {"chat_template": [{"name": "other", "template": "o"}]}) is None
    default = [{"name": "other", "template": "o"}, {"name": "default", "template": "d"}]
    assert _read(tmp_path, {"chat_template": default}) == "d"
    config = {"chat_template": "in config {{ bos_token }}", "bos_token": {"content": "<s>"}}
    assert _read(tmp_path, config) == "in config <s>"
    assert _read(tmp_path, config, chat_template="in a file") == "in a file"
