"""Chat messages to a prompt, with the Jinja template that a file carries. The template is not trusted.

It is rendered in a child process under limits (template_worker.py), one for each rendering, so that whatever it does
ends in an error here. Windows has no such limits: there the child's time and output are bounded, its memory is not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gqsa_runtime.errors import DeviceError, FormatError, InputError

MAX_TEMPLATE_CHARACTERS = 256 << 10
_MEMORY_BYTES = 300 << 20  # beyond what Python itself takes; a real template needs some
_MEMORY_PER_BYTE = 32  # of the messages: templates trim, split and compare what they are given
_CPU_S = 1  # of which starting takes a tenth
_SECONDS = 3.0  # until the child is ended, whatever the machine is busy with
_BYTES_PER_SECOND = 4 << 20  # of messages, for which there is more time
_MAX_ANSWER_BYTES = 8 << 20
_FROZEN_ARGUMENT = "--gqsa-render-chat-template"
# Without PYTHON…, which an isolated interpreter ignores, and without what is no business of a template.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")
# Those that chat templates know: most of them take any other for a user or drop it.
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython")

_frozen_support = False
_python: str | None = None


def freeze_support() -> None:
    """To be called first in the `main` of an application frozen with PyInstaller or the like, before `chat` is used.

    Such an application has no Python to start: it starts itself to render a chat template, and this call does that
    work and ends the process. It returns at once in all other processes.
    """
    global _frozen_support
    if sys.argv[1:2] == [_FROZEN_ARGUMENT]:
        from gqsa_runtime import template_worker

        template_worker.main([])
        sys.exit(0)
    _frozen_support = True


def set_python(path: str | os.PathLike[str]) -> None:
    """Which Python 3.10 or later renders chat templates: for programs that embed Python and are none themselves.

    Default: sys.executable. It needs no packages of its own; jinja2 is taken from this process's.
    """
    global _python
    _python = os.fspath(path)


class ChatTemplate:
    """A chat template. bos_token, eos_token: how those tokens are spelled, or None.

    Raises FormatError where the template is too long. Any number of threads may use it.
    """

    def __init__(self, source: str, bos_token: str | None = None, eos_token: str | None = None) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise FormatError(
                f"the file's chat template has {len(source)} characters, allowed are {MAX_TEMPLATE_CHARACTERS}; "
                "use --raw to prompt without it"
            )
        self._source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    def check(self) -> None:
        """Raises FormatError where the template is no Jinja, or uses what the sandbox has not."""
        self._ask(None)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for messages such as {"role": "user", "content": "Hello"}.

        add_generation_prompt: end where the assistant's answer begins. variables: others that the
        template knows, such as tools; values of JSON. Raises InputError where the template refuses the messages,
        FormatError where it fails on them or takes too long, DeviceError where no process can be started for it.
        """
        _check_messages(messages)
        return self._ask(
            {
                **self._tokens,
                **variables,
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def _ask(self, names: dict[str, Any] | None) -> str:
        try:
            given = json.dumps(names)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"messages and variables of the chat template must be values of JSON ({error}); "
                "expected strings, numbers, lists and objects"
            ) from None
        extra_s = len(given) // _BYTES_PER_SECOND
        limits = {"memory_bytes": _MEMORY_BYTES + _MEMORY_PER_BYTE * len(given), "cpu_s": _CPU_S + extra_s}
        request = f'{{"source": {json.dumps(self._source)}, "names": {given}, {json.dumps(limits)[1:]}'
        data = _run(request.encode(), _SECONDS + extra_s, _MAX_ANSWER_BYTES + 16 * len(given))
        kind, text = _parse(data)
        if kind == "text":
            return text
        if kind == "refused":
            raise InputError(f"the model's chat template refuses these messages: {text}")
        what = {
            "invalid": f"cannot be compiled ({text})",
            "failed": f"fails on these messages ({text})",
        }.get(kind, "does more work than is allowed")
        raise FormatError(f"the file's chat template {what}; use --raw to prompt without it")


def _command() -> list[str]:
    """The command line of the child. Raises DeviceError where there is none."""
    if getattr(sys, "frozen", False) and _python is None:
        if not _frozen_support:
            raise DeviceError(
                "chat templates are rendered by a process of their own, and a frozen application has no Python for it; "
                "call gqsa_runtime.freeze_support() first in its main"
            )
        return [sys.executable, _FROZEN_ARGUMENT]
    worker = Path(__file__).with_name("template_worker.py")
    python = _python or sys.executable
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    origins = [spec.origin for spec in specs if spec and spec.origin]
    if not python or not worker.is_file() or len(origins) < len(specs):
        raise DeviceError(
            "chat templates are rendered by a Python of their own, but there is no Python to start, or gqsa_runtime, "
            "jinja2 or markupsafe are no files that it could read; install them with pip, or name a Python with "
            "gqsa_runtime.set_python()"
        )
    folders = sorted({os.fspath(Path(origin).parents[1]) for origin in origins})
    return [python, "-I", "-S", os.fspath(worker), *folders]


def _run(request: bytes, seconds: float, most_bytes: int) -> bytes:
    """What the child answers; empty where it was ended, or answered more than most_bytes."""
    command = _command()
    keep = os.environ if command[1] == _FROZEN_ARGUMENT else _ENVIRONMENT
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which ends the child itself
        )  # fmt: skip
    except OSError as error:
        raise DeviceError(
            f"chat templates are rendered by a process of their own, but {command[0]} cannot be started: "
            f"{error.strerror or error}; name a Python with gqsa_runtime.set_python()"
        ) from None
    given, answer = child.stdin, child.stdout
    assert given is not None and answer is not None  # pipes, as asked
    timer = threading.Timer(seconds, child.kill)
    try:
        timer.start()
        for give in (lambda: given.write(request), given.close):
            with contextlib.suppress(BrokenPipeError):  # it ended early
                give()
        data = answer.read(most_bytes + 1)
        return data if len(data) <= most_bytes else b""
    finally:
        timer.cancel()
        child.kill()
        answer.close()
        child.wait()


def _parse(data: bytes) -> tuple[str, str]:
    """The one pair of the child's answer, which is no more trusted than the template."""
    try:
        ((kind, text),) = json.loads(data).items()
    except (ValueError, AttributeError, RecursionError):
        return "exhausted", ""
    return (kind, text) if isinstance(text, str) else ("exhausted", "")


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InputError('there are no messages; expected at least one, such as {"role": "user", "content": "Hello"}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(f'message {index} is {str(message)[:100]}, expected {{"role": …, "content": …}}')
        if message["role"] not in ROLES:
            raise InputError(
                f"message {index} has the role {message['role'][:40]!r}, expected one of {', '.join(ROLES)}"
            )
