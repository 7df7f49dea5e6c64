"""Chat templates out of the grammar of Jinja, and pieces of real and of hostile ones."""

from __future__ import annotations

from random import Random

from tests.format import tiny

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ 'Be kind.' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set ns.found = true %}{{ bos_token + m.content }}"
    "{%- for part in m.content.split('x') -%}{{ part[::-1] }}{% endfor %}{% endfor %}{{ strftime_now('%d %b %Y') }}"
    "{% macro show(x) %}{{ x|tojson(indent=2) }}{% endmacro %}{{ show(messages) }}{{ tools|default([])|length }}"
)
BASES = (CHATML, LLAMA, tiny.CHAT_TEMPLATE)
_VALUES = (
    "messages",
    "messages[0].content",
    "m",
    "i",
    "'a'",
    "1",
    "10**9",
    "2.5",
    "[1]",
    "{'a': 1}",
    "none",
    "true",
    "x",
    "range(9)",
    "range(10**9)",
    "'ab' * 10**8",
    "bos_token",
    "loop",
    "ns.x",
    "dict(a=1)",
    "namespace(x=1)",
    "self",
    "(1).to_bytes(9)",
    "''.__class__",
    "joiner",
    "'%s'",
    "raise_exception",
    "strftime_now",
)
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is", "is not", "|")
_AFTER = (
    "|list",
    "|join('b')",
    "|replace('', 'aaaaaaaa')",
    "|tojson",
    "|length",
    "|map('upper')",
    "|sort",
    "|e",
    "|sum",
    "|string",
    "|int",
    "|float",
    "|round(99)",
    "|indent(10**8)",
    "|unique",
    "[0]",
    "[::-1]",
    ".split('a')",
    ".upper()",
    ".replace('a', 'b' * 9999)",
    ".items()",
    ".append(1)",
    "()",
    "(m)",
    ".__init__",
    "|attr('x')",
    ".format(1)",
    "|selectattr('role', 'eq', 'user')",
    "|map(attribute='content')",
    "|first",
    "|dictsort",
    "|nofilter",
)


def expression(random: Random, depth: int = 3) -> str:
    """An expression of Jinja, most often one that compiles."""
    if depth == 0 or random.random() < 0.3:
        return random.choice(_VALUES)
    kind = random.randrange(6)
    if kind < 2:
        return f"({expression(random, depth - 1)} {random.choice(_OPERATORS)} {expression(random, depth - 1)})"
    if kind < 5:
        return f"({expression(random, depth - 1)}){random.choice(_AFTER)}"
    return f"[{expression(random, depth - 1)}, {expression(random, depth - 1)}]"


def template(random: Random, depth: int = 3) -> str:
    """A template of one to three statements."""
    return "".join(_statement(random, depth) for _ in range(random.randint(1, 3)))


def _statement(random: Random, depth: int) -> str:
    value = expression(random)
    body = template(random, depth - 1) if depth else "{{ i }}"
    return random.choice(
        (
            f"{{{{ {value} }}}}",
            f"{{% for i in {value} %}}{body}{{% endfor %}}",
            f"{{% for i in range({random.choice((9, 999, 10**5, 10**9))}) %}}{body}{{% endfor %}}",
            f"{{% if {value} %}}{body}{{% else %}}{{{{ x }}}}{{% endif %}}",
            f"{{% set ns = namespace(x={value}) %}}{{% for i in range(99) %}}{{% set ns.x = {value} %}}{{% endfor %}}",
            # Takes all the memory and time that there is: not as often as the others.
            f"{{% set ns = namespace(x='aa') %}}{{% for i in range({random.choice((5, 9, 15, 99))}) %}}"
            "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            f"{{% set x %}}{body}{{% endset %}}{{{{ x ~ x }}}}",
            f"{{% macro m(x) %}}{body}{{{{ m(x) }}}}{{% endmacro %}}{{{{ m({value}) }}}}",
            f"{{% filter {random.choice(('upper', 'trim', 'indent(9)'))} %}}{body}{{% endfilter %}}",
            f"{{% generation %}}{body}{{% endgeneration %}}{{% break %}}",
            value * random.choice((1, 1, 99)),
        )
    )


def mutant(random: Random) -> str:
    """A template of the grammar, or one with a stretch of another in it."""
    if random.random() < 0.5:
        return template(random)
    one, other = random.choice(BASES), random.choice((*BASES, template(random)))
    place, start = random.randrange(len(one)), random.randrange(len(other))
    cut = other[start : start + random.choice((1, 4, 30, 300))]
    return one[:place] + cut + one[place + random.choice((0, 1, len(cut))) :]
