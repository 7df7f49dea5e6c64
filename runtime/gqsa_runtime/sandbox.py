"""A Jinja environment for templates out of untrusted files: no access to Python, bounded work.

Jinja's own sandbox keeps a template from reaching Python's internals, but not from building a string
of gigabytes or looping for hours. Here every value made, every character written, every turn of a
loop and every call costs fuel, and the render ends with an error when the fuel is used up. What could
do unbounded work without being charged (filters and methods not listed here) does not exist.
"""

from __future__ import annotations

import json
import types

import jinja2
from jinja2 import filters, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

_MAX_INTEGER = 1 << 64
_MAX_INDENT = 32
_MAX_RANGE = 100_000

# fmt: off
_STRING_METHODS = frozenset([
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit",
    "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper",
])
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
)
_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "boolean", "defined", "divisibleby", "eq", "equalto", "even", "false",
    "float", "ge", "greaterthan", "gt", "in", "integer", "iterable", "le", "lessthan", "lower", "lt", "mapping",
    "ne", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined", "upper",
)
# fmt: on


class OutOfFuel(SecurityError):
    """A template did more work than it may."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Renders templates under a budget. Not for use by two threads at once.

    Set `fuel` before each render: about one unit per character made and per turn of a loop.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _GenerationExtension],
            # Constant folding would build values before any fuel is set.
            optimized=False,
        )
        self.fuel = 0
        self.filters = {name: self._charged(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {"tojson": self._to_json, "indent": self._indent}
        self.filters |= {name: getattr(self, name) for name in _HOOKS}
        self.tests = {name: self._charged(name, self.tests[name]) for name in _TESTS}
        self.globals = {"range": self._range, "namespace": self.globals["namespace"], "dict": dict}

    def charge(self, units: int) -> None:
        """Takes fuel. Raises OutOfFuel where there is not enough."""
        self.fuel -= units
        if self.fuel < 0:
            raise OutOfFuel("the chat template does too much work")

    def weigh(self, value) -> int:
        """Characters and elements in a value, a part counted as often as it is reached. Costs that much."""
        total, rest = 0, [value]
        while rest:
            item = rest.pop()
            if isinstance(item, str):
                cost = 1 + len(item)
            elif isinstance(item, (list, tuple, set, frozenset)) or type(item).__name__ in _DICT_VIEWS:
                cost = 1 + len(item)
                rest.extend(item)
            elif isinstance(item, dict):
                cost = 1 + 2 * len(item)
                rest.extend(item.keys())
                rest.extend(item.values())
            elif isinstance(item, jinja2.utils.Namespace):
                raise SecurityError("a namespace may not be used as a value")
            else:
                cost = 1
            total += cost
            self.charge(cost)
        return total

    def _parse(self, source, name, filename):
        return _AddHooks(self).visit(super()._parse(source, name, filename))

    # Hooks: filters that _AddHooks puts around parts of the template.

    @jinja2.pass_context
    def _weighed(self, _context, value):
        self.weigh(value)
        return value

    @jinja2.pass_context
    def _written(self, _context, value):
        self.weigh(value)
        return value

    @jinja2.pass_context
    def _turns(self, _context, value):
        for item in value:
            self.charge(1)
            yield item

    @jinja2.pass_context
    def _concatenated(self, _context, values):
        self.weigh(values)
        return "".join(str(value) for value in values)

    # What Jinja calls.

    def is_safe_attribute(self, obj, attr, value):
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value):
        return None  # a field may ask for any width, so `format` is no method that a template has

    def getitem(self, obj, argument):
        if isinstance(argument, slice) and isinstance(obj, (str, list, tuple)):
            self.charge(len(obj[argument]))
        return super().getitem(obj, argument)

    def call(__self, __context, __obj, *args, **kwargs):  # named so that keywords of the template cannot clash
        __self.charge(1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(owner, str):
            __self.weigh([owner, *args])
            if __obj.__name__ == "replace" and len(args) >= 2:
                __self.charge(owner.count(args[0]) * len(args[1]))
            elif __obj.__name__ == "join" and args:
                args = (list(args[0]),)
                __self.charge(len(owner) * len(args[0]))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (str, list, tuple, dict)):
            __self.weigh(result)
        return result

    def call_binop(self, context, operator, left, right):
        if operator == "+":
            self.weigh((left, right))
        elif operator == "%":
            if isinstance(left, str):
                raise SecurityError("a chat template may not use % on strings")
        elif operator == "*":
            for part, times in ((left, right), (right, left)):
                if isinstance(part, (str, list, tuple)):
                    self.charge(self.weigh(part) * max(int(times), 0))
                elif isinstance(part, int) and abs(part) > _MAX_INTEGER:
                    raise SecurityError("a number in the chat template is too large")
        elif not (isinstance(right, (int, float)) and abs(right) <= 64 and abs(left) <= _MAX_INTEGER):
            raise SecurityError("a power in the chat template is too large")
        return super().call_binop(context, operator, left, right)

    def _charged(self, name, function):
        """The filter or test, paying for what it reads before it starts."""

        def charged(*args, **kwargs):
            values = [list(arg) if isinstance(arg, types.GeneratorType) else arg for arg in args]
            data = [value for value in values if not isinstance(value, _MACHINERY)]
            self.weigh([data, kwargs])
            if name == "replace":
                text, old, new, *_ = [*data, *(kwargs[key] for key in ("old", "new") if key in kwargs), "", ""]
                self.charge(str(text).count(str(old)) * len(str(new)))
            elif name == "join":
                separator = kwargs.get("d", data[1] if len(data) > 1 else "")
                self.charge(len(list(data[0])) * len(str(separator)))
            result = function(*values, **kwargs)
            return list(result) if isinstance(result, types.GeneratorType) else result

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, mark):
                setattr(charged, mark, getattr(function, mark))
        return charged

    def _to_json(self, value, indent=None, ensure_ascii=False, separators=None, sort_keys=False):
        """As transformers has it: plain JSON, no HTML escapes."""
        self.weigh(value)
        _check_indent(indent)
        text = json.dumps(
            value, indent=indent, ensure_ascii=ensure_ascii, separators=separators and tuple(separators),
            sort_keys=sort_keys,
        )  # fmt: skip
        self.charge(len(text))
        return text

    def _indent(self, text, width=4, first=False, blank=False):
        self.weigh(text)
        if not isinstance(width, str):
            _check_indent(width)
        self.charge(text.count("\n") * (len(width) if isinstance(width, str) else width))
        return filters.do_indent(text, width, first, blank)

    def _range(self, *args):
        numbers = range(*args)
        if len(numbers) > _MAX_RANGE:
            raise SecurityError(f"a range in the chat template is longer than {_MAX_RANGE}")
        return numbers


_HOOKS = ("_weighed", "_written", "_turns", "_concatenated")
_DICT_VIEWS = ("dict_keys", "dict_values", "dict_items", "range")
_MACHINERY = (jinja2.runtime.Context, jinja2.nodes.EvalContext, jinja2.Environment)


def _check_indent(width) -> None:
    if width is not None and not (isinstance(width, int) and 0 <= width <= _MAX_INDENT):
        raise SecurityError(f"an indent in the chat template is {width!r}, allowed are 0 to {_MAX_INDENT}")


class _AddHooks(NodeTransformer):
    """Puts the sandbox's hooks around all that makes or writes a value or loops."""

    def __init__(self, environment: Sandbox):
        self._environment = environment

    def _wrap(self, node, hook: str):
        wrapped = nodes.Filter(node, hook, [], [], None, None, lineno=node.lineno)
        return wrapped.set_environment(self._environment)

    def _visit_made(self, node):
        return self._wrap(self.generic_visit(node), "_weighed") if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = visit_Dict = _visit_made

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        return self._wrap(nodes.Tuple(node.nodes, "load", lineno=node.lineno), "_concatenated")

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        node.expr = self._wrap(node.expr, "_weighed")
        for operand in node.ops:
            operand.expr = self._wrap(operand.expr, "_weighed")
        return node

    def visit_Output(self, node):
        node = self.generic_visit(node)
        node.nodes = [self._wrap(child, "_written") for child in node.nodes]
        return node

    def visit_For(self, node):
        if node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not allowed in a chat template", node.lineno)
        node = self.generic_visit(node)
        node.iter = self._wrap(node.iter, "_turns")
        return node


class _GenerationExtension(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it does nothing."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
