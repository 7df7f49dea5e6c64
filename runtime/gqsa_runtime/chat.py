"""Chat messages to a prompt, with the Jinja template that a file carries. The template is not trusted."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Mapping, Sequence

import jinja2

from gqsa_runtime.errors import FormatError, InputError
from gqsa_runtime.sandbox import OutOfFuel, Sandbox

MAX_TEMPLATE_CHARACTERS = 256 << 10
_FUEL = 2_000_000  # a long real template uses some thousands
_FUEL_PER_CHARACTER = 64  # of the messages: templates trim, split and compare what they are given
_MAX_DATE_FORMAT = 64
# Those that chat templates know: most of them take any other for a user or drop it.
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython")


class ChatTemplate:
    """A compiled chat template. bos_token, eos_token: how those tokens are spelled, or None.

    Raises FormatError where the template is too long, is no Jinja, or uses what the sandbox has not.
    """

    def __init__(self, source: str, bos_token: str | None = None, eos_token: str | None = None):
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise FormatError(
                f"the file's chat template has {len(source)} characters, allowed are {MAX_TEMPLATE_CHARACTERS}; "
                "use --raw to prompt without it"
            )
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._lock = threading.Lock()
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError, MemoryError) as error:
            raise FormatError(
                f"the file's chat template cannot be compiled ({error}); use --raw to prompt without it"
            ) from None

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables) -> str:
        """The prompt for messages such as {"role": "user", "content": "Hello"}.

        add_generation_prompt: end where the assistant's answer begins. variables: others that the
        template knows, such as tools. Raises InputError where the template refuses the messages.
        """
        _check_messages(messages)
        names = {
            **self._tokens,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            **variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        size = len(repr(names["messages"])) + len(repr(variables))
        with self._lock:
            self._sandbox.fuel = _FUEL + _FUEL_PER_CHARACTER * size
            try:
                return self._template.render(names)
            except OutOfFuel:
                raise FormatError(
                    "the file's chat template does more work than is allowed; use --raw to prompt without it"
                ) from None
            except _Refused as error:
                raise InputError(f"the model's chat template refuses these messages: {error}") from None
            except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError,
                    AssertionError, RecursionError, MemoryError) as error:  # fmt: skip
                raise FormatError(
                    f"the file's chat template fails on these messages ({error}); use --raw to prompt without it"
                ) from None


class _Refused(Exception):
    """What a template says through raise_exception."""


def _raise_exception(message="") -> None:
    raise _Refused(str(message)[:500])


def _strftime_now(layout: str) -> str:
    if len(layout) > _MAX_DATE_FORMAT:
        raise ValueError(f"a date format is {len(layout)} characters long, allowed are {_MAX_DATE_FORMAT}")
    return datetime.datetime.now().strftime(layout)


def _check_messages(messages: Sequence[Mapping]) -> None:
    if not messages:
        raise InputError('there are no messages; expected at least one, such as {"role": "user", "content": "Hello"}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(f'message {index} is {str(message)[:100]}, expected {{"role": …, "content": …}}')
        if message["role"] not in ROLES:
            raise InputError(
                f"message {index} has the role {message['role'][:40]!r}, expected one of {', '.join(ROLES)}"
            )
