"""A stand-in for the process that renders a chat template: a fork in place of a new interpreter.

The worker's code, its limits and its pipes are the runtime's own; what is left out is a Python that starts, which takes
longer than nearly all templates.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import jinja2  # noqa: F401 - what the worker imports, so that its forks have it
import jinja2.ext
import jinja2.sandbox  # noqa: F401
from gqsa_runtime import chat, template_worker


class Fork:
    """What the runtime needs of subprocess.Popen. Arguments are not regarded: the worker is what it starts."""

    def __init__(self, *_, **__) -> None:
        (given, give), (take, answer) = os.pipe(), os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _work(given, answer, (give, take))
        os.close(given)
        os.close(answer)
        self.stdin, self.stdout = os.fdopen(give, "wb"), os.fdopen(take, "rb")

    def kill(self) -> None:
        """Ends it, if `wait` has not yet seen its end."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        """Until it has ended."""
        pid, self._pid = self._pid, 0
        os.waitpid(pid, 0)


def _work(given: int, answer: int, others: tuple[int, ...]) -> None:
    try:
        os.setsid()
        os.dup2(given, 0)
        os.dup2(answer, 1)
        for opened in (given, answer, *others):
            os.close(opened)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")  # multiprocessing gives its processes others
        template_worker.main([])
    finally:
        os._exit(0)


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Chat templates are rendered by forks within."""
    stand_in = SimpleNamespace(Popen=Fork, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    with mock.patch.object(chat, "subprocess", stand_in):
        yield
