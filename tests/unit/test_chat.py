"""Chat templates: what real ones use works, and what hostile ones try ends quickly with an error."""

import datetime
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from gqsa_runtime import chat
from gqsa_runtime.chat import MAX_TEMPLATE_CHARACTERS, ChatTemplate
from gqsa_runtime.errors import DeviceError, FormatError, InputError

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
        ChatTemplate(source).check()


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
        "{{ ['a']|tojson(indent=100000000) }}",
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
        "{{ range(1000000000)|list }}",
        "{{ ('a'|e).replace('a', 'b' * 99999).replace('b', 'c' * 99999) }}",
        "{{ (1).to_bytes(3 * 10**9) }}",
        "{{ range(30000)|map('string')|list * 99999 }}",
        GROW.replace("START", "2").replace("STEP", "ns.x * ns.x // 3 - ns.x % 7"),
        "{{ 10**1000000 == 10**1000001 - 1 }}" * 50,
        "{{ a }}" * 37000,
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


def test_long_messages_have_the_time_and_memory_they_need():
    source = "{% for m in messages %}{{ (m.content|trim).split('|')[-1].replace('a', 'bb') + '\n' }}{% endfor %}"
    assert len(render(source, [{"role": "user", "content": "a" * 500_000}] * 4)) == 4 * 1_000_001


def test_as_many_threads_as_one_likes():
    template = ChatTemplate("{% for i in range(9000) %}{{ i }}{% endfor %}{{ messages[0].content }}")
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda i: template.render([{"role": "user", "content": f"<{i}>"}]), range(8)))
    assert [text[-3:] for text in texts] == [f"<{i}>" for i in range(8)] and len({len(text) for text in texts}) == 1


def test_values_that_are_no_json():
    with pytest.raises(InputError, match="must be values of JSON"):
        render("{{ tools }}", tools=[object()])


def test_half_a_surrogate_pair_comes_through():
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "a\ud800"}]) == "a\ud800"


def test_the_child_can_do_nothing_else(tmp_path, monkeypatch):
    """What a template would meet that broke out of Jinja's sandbox: no files, no secrets of the environment."""
    break_out = """
import json, os, sys
exec(open(WORKER).read().replace('__name__ == "__main__"', "False"))
def answer(source, names):
    import jinja2
    _close_files()
    try:
        open(TARGET, "w")
    except OSError as error:
        return {"text": str(error) + repr(dict(os.environ))}
_answer = answer
main(sys.argv[1:])
"""
    worker = chat.Path(chat.__file__).with_name("template_worker.py")
    script = tmp_path / "template_worker.py"
    target = tmp_path / "made"
    script.write_text(break_out.replace("WORKER", repr(str(worker))).replace("TARGET", repr(str(target))))
    monkeypatch.setattr(chat, "__file__", str(tmp_path / "chat.py"))
    monkeypatch.setenv("SECRET_OF_THE_SHELL", "hush")
    text = render("x")
    assert "Too many open files" in text and "SECRET" not in text and not target.exists()


@pytest.mark.parametrize(
    "answer", ["", "x", "[]", '{"text": 1}', '{"text": "a", "b": "c"}', "[" * 100_000, '{"x": "y"}', "5"]
)
def test_answers_of_a_child_that_was_taken_over(monkeypatch, answer):
    monkeypatch.setattr(chat, "_run", lambda *args: answer.encode())
    with pytest.raises(FormatError, match="does more work than is allowed"):
        render("x")


def test_an_answer_that_is_too_long():
    with pytest.raises(FormatError, match="does more work than is allowed"):
        render("{{ 'a' * 20000000 }}")


def test_an_interrupt_ends_the_child(monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    children = []
    popen = chat.subprocess.Popen
    monkeypatch.setattr(chat.threading.Timer, "start", interrupted)
    monkeypatch.setattr(chat.subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[0])
    with pytest.raises(KeyboardInterrupt):
        render("x")
    assert children[0].returncode is not None


# Applications


def test_a_python_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "_python", None)
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(DeviceError, match=r"no Python to start.*set_python"):
        render("x")
    chat.set_python(tmp_path / "nothing")
    with pytest.raises(DeviceError, match="cannot be started: No such file"):
        render("x")
    monkeypatch.undo()
    assert render("x") == "x"


FROZEN = """
import sys
sys.path[:0] = {path!r}
sys.frozen, sys.executable = True, __file__
import gqsa_runtime
{support}
from gqsa_runtime.chat import ChatTemplate
assert len(sys.argv) == 1
print(ChatTemplate("{{{{ messages[0].content }}}}").render([{{"role": "user", "content": "Hi"}}]))
"""


def test_a_frozen_application_starts_itself(tmp_path):
    """As PyInstaller makes them: sys.executable is the application, which may be started for this alone."""
    application = tmp_path / "application"
    for support in ("gqsa_runtime.freeze_support()", ""):
        source = FROZEN.format(path=[path for path in sys.path if path], support=support)
        application.write_text(f"#!{sys.executable}\n{source}")
        application.chmod(0o755)
        done = subprocess.run([str(application)], capture_output=True, text=True, timeout=60)
        if support:
            assert (done.stdout, done.stderr) == ("Hi\n", "")
        else:
            assert done.returncode == 1 and "call gqsa_runtime.freeze_support() first in its main" in done.stderr
