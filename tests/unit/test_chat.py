"""Chat templates: what real ones use works, and what hostile ones try ends quickly with an error."""

import datetime
import time

import pytest
from gqsa_runtime.chat import MAX_TEMPLATE_CHARACTERS, ChatTemplate
from gqsa_runtime.errors import FormatError, InputError

USER = [{"role": "user", "content": "Hi"}]


def render(source: str, messages=USER, **variables) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **variables)


def test_a_role_that_no_template_knows():
    with pytest.raises(InputError, match="message 1 has the role 'wizard', expected one of system, "):
        ChatTemplate("{{ messages }}").render(
            [{"role": "user", "content": "a"}, {"role": "wizard", "content": "b"}],
        )


def test_chatml():
    source = """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' -}}
{% endif %}"""
    assert render(source) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n<|im_start|>assistant\n"
    )
    assert not render(source, add_generation_prompt=False).endswith("assistant\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ messages|tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ {'a': '<é>'}|tojson(indent=2) }}", '{\n  "a": "<é>"\n}'),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}", "0True1"),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{{ messages[-1].content.split('i')[0] }}{{ messages[::-1]|length }}", "H1"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(', ') }}", "Hi"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=Hi;"),
        ("{{ 'a' ~ 1 ~ none }}{{ 'x' * 3 }}{{ 7 % 4 }}{{ 2 ** 5 }}", "a1Nonexxx332"),
        ("{% if tools is defined and tools %}T{% else %}-{% endif %}", "-"),
        ("{% if 'H' in messages[0].content and messages is iterable %}y{% endif %}", "y"),
        ("{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say('a') }}{{ say(1) }}", "<a><1>"),
        ("{% set a, b = 1, 2 %}{{ a + b }}{{ [1, 2] + [3] }}{{ (1, 2)|last }}", "3[1, 2, 3]2"),
        ("{{ messages[0].missing }}{{ missing }}|{{ missing|default('d') }}", "|d"),
        ("{{ 'a\nb'|indent(2) }}", "a\n  b"),
        ("{{ 'x' if messages[0].content.startswith('H') else 'y' }}{{ 'ab'|replace('a', 'c')|upper }}", "xCB"),
        ("{% set x %}in{{ 1 }}{% endset %}[{{ x }}]", "[in1]"),
    ],
)
def test_what_real_templates_use(source, expected):
    assert render(source) == expected


def test_variables_and_date():
    assert render("{{ tools[0].name }}{{ enable_thinking }}", tools=[{"name": "t"}], enable_thinking=False) == "tFalse"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_the_messages_are_not_changed():
    messages = [{"role": "user", "content": "Hi", "parts": [1]}]
    with pytest.raises(FormatError, match="append"):
        render("{{ messages.append(1) }}", messages)
    with pytest.raises(FormatError):
        render("{{ messages[0].update({'role': 'x'}) }}", messages)
    assert messages == [{"role": "user", "content": "Hi", "parts": [1]}]


def test_refusal_by_the_template():
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "messages", [[], ["Hi"], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}]]
)
def test_bad_messages(messages):
    with pytest.raises(InputError, match="message"):
        render("{{ messages }}", messages)


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ 1 + }}", "{% endif %}", "{{ x|nofilter }}", "{{ '" + "x" * MAX_TEMPLATE_CHARACTERS],
    ids=range(5),
)
def test_templates_that_do_not_compile(source):
    with pytest.raises(FormatError, match="--raw"):
        ChatTemplate(source)


GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        # Python's internals
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{{ messages|map('attr', '__class__')|list }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% include 'x' %}",
        # memory
        "{{ 'a' * 300000000 }}",
        "{{ [1] * 300000000 }}",
        "{{ 'a'|center(200000000) }}",
        "{{ 'a'.ljust(300000000) }}",
        "{{ '{:300000000}'.format(1) }}",
        "{{ '%0300000000d' % 1 }}",
        "{{ 'a'|tojson(indent=100000000) }}",
        "{{ 'a\nb'|indent(100000000) }}",
        "{% filter indent(width=100000000) %}a\nb{% endfilter %}",
        "{{ ('a' * 9999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 9999).replace('', 'b' * 99999) }}",
        "{{ ('a' * 9999)|replace('a', new='b' * 99999) }}",
        "{{ ('b' * 99999).join(range(9999)|map('string')) }}",
        "{{ range(9999)|join('b' * 99999) }}",
        "{{ range(9999)|join(d='b' * 99999) }}",
        "{% macro m() %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endmacro %}{% set y = m() %}",
        "{% set y %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
        "{{ range(1000000000) }}",
        "{{ namespace(a=1) }}",
        "{{ strftime_now('%Y' * 99) }}",
        GROW.replace("START", "'aa'").replace("STEP", "ns.x ~ ns.x"),
        GROW.replace("START", "'aa'").replace("STEP", "ns.x + ns.x"),
        GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
        GROW.replace("START", "[1]").replace("STEP", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x }}",
        GROW.replace("START", "[1]").replace("STEP", "dict(a=ns.x, b=ns.x)") + "{{ ns.x }}",
        GROW.replace("START", "2").replace("STEP", "ns.x * ns.x"),
        GROW.replace("START", "2").replace("STEP", "ns.x ** 9"),
        # time
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) if i in range(99999)|list %}{% endfor %}",
        "{% for i in [1] recursive %}{{ loop([i]) }}{% endfor %}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1.5|round(1000000000, 'ceil') }}",
    ],
)
def test_attacks(source):
    began_s = time.perf_counter()
    with pytest.raises(FormatError, match="chat template"):
        render(source)
    assert time.perf_counter() - began_s < 5


def test_unknown_attributes_are_empty():
    assert render("{{ messages.__class__ }}{{ raise_exception.__globals__ }}") == ""


def test_long_messages_have_the_fuel_they_need():
    source = "{% for m in messages %}{{ (m.content|trim).split('|')[-1].replace('a', 'bb') + '\n' }}{% endfor %}"
    assert len(render(source, [{"role": "user", "content": "a" * 500_000}] * 4)) == 4 * 1_000_001


def test_fuel_is_fresh_for_every_render():
    template = ChatTemplate("{% for i in range(90000) %}{{ i }}{% endfor %}")
    assert len({template.render(USER) for _ in range(5)}) == 1
