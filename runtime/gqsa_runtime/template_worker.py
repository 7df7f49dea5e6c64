"""Renders one chat template in a process of its own, under limits. Run by chat.py as a script, not imported.

stdin: JSON with "source", "names" or null, and the limits "memory_bytes" and "cpu_s"; stdout: JSON with one of "text",
"refused" (by the template's raise_exception), "invalid" (it does not compile), "failed", "exhausted". Arguments: where
jinja2 and markupsafe lie. Nothing but Python's own library is imported before the limits stand.

Jinja's sandbox keeps a template from Python's internals; what it may do with strings, numbers and loops has no bound
in it, so the operating system sets the bounds: memory and processor time, no files, no processes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# fmt: off
_STRING_METHODS = frozenset([
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit",
    "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper",
])
# Less than Jinja has: what looks up attributes by name or formats objects is where its sandbox was broken before.
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper",
)
_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "boolean", "defined", "divisibleby", "eq", "equalto", "even", "false",
    "float", "ge", "greaterthan", "gt", "in", "integer", "iterable", "le", "lessthan", "lower", "lt", "mapping",
    "ne", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined", "upper",
)
# fmt: on
_MAX_MESSAGE = 500


class _Refused(Exception):
    """What a template says through raise_exception."""


def main(folders: list[str]) -> None:
    """Answers the request on stdin."""
    request = json.load(sys.stdin.buffer)
    _limit(request["memory_bytes"], request["cpu_s"])
    sys.path += folders
    try:
        answer = _answer(request["source"], request["names"])
    except MemoryError:
        answer = {"exhausted": "memory"}
    sys.stdout.buffer.write(json.dumps(answer).encode())
    sys.stdout.buffer.flush()


def _limit(memory_bytes: int, cpu_s: int) -> None:
    """Bounds what this process may take from now on. Windows has no such limits; macOS does not bound memory."""
    try:
        import resource
    except ModuleNotFoundError:
        return
    limits = [(resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)]
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        limits += [(resource.RLIMIT_AS, used + memory_bytes), (resource.RLIMIT_NPROC, 0)]
    for kind, value in limits:
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def _close_files() -> None:
    """No file can be opened from here on."""
    try:
        import resource
    except ModuleNotFoundError:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def _answer(source: str, names: dict[str, Any] | None) -> dict[str, str]:
    import jinja2

    environment = _environment()
    with contextlib.suppress(jinja2.TemplateError):  # imports what Jinja and Python load late, for failures too
        environment.from_string("{{ 'a'|tojson }}{{ 'b'|int }}{{ a.b.c }}").render()
    _strftime_now("%Y")
    _close_files()
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError, ArithmeticError, TypeError) as error:
        return {"invalid": str(error)[:_MAX_MESSAGE]}
    if names is None:
        return {"text": ""}
    try:
        return {"text": template.render(names, raise_exception=_raise_exception, strftime_now=_strftime_now)}
    except _Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # a template can raise whatever the methods of its values do
        return {"failed": str(error)[:_MAX_MESSAGE]}


def _environment() -> ImmutableSandboxedEnvironment:
    import jinja2
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it does nothing."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja's sandbox, with strings that have the methods listed here alone."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str):
                return attr in _STRING_METHODS
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> None:
            return None  # `format` is no method that a template has

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation])
    environment.filters = {name: environment.filters[name] for name in _FILTERS} | {"tojson": _to_json}
    environment.tests = {name: environment.tests[name] for name in _TESTS}
    environment.globals = {"range": range, "namespace": jinja2.utils.Namespace, "dict": dict}
    return environment


def _to_json(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: plain JSON, no HTML escapes."""
    return json.dumps(
        value, indent=indent, ensure_ascii=ensure_ascii, separators=separators,
        sort_keys=sort_keys,
    )  # fmt: skip


def _raise_exception(message: object = "") -> NoReturn:
    raise _Refused(str(message)[:_MAX_MESSAGE])


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


if __name__ == "__main__":
    main(sys.argv[1:])
