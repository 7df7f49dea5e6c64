"""Runs a piece of work in a forked child with limits, and says how it ended."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gqsa_runtime.errors import GqsaError

_MAX_REPORT = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How work ended: "accepted", "refused" (a GqsaError) or one of FAILURES. grown_bytes: of its resident memory."""

    kind: str
    detail: str
    seconds: float
    grown_bytes: int


FAILURES = ("untyped", "crash", "hang", "memory")


def run_limited(work: Callable[[], object], seconds: float, memory_bytes: int) -> Outcome:
    """Forks, runs work() in the child, and waits for it.

    seconds: after which it is killed and counts as a hang. memory_bytes: how much its resident memory may grow; its
    address space may grow by twice as much and 256 MB, for libraries that are loaded late.
    """
    reader, writer = os.pipe()
    began_s = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(work, writer, 2 * memory_bytes + (256 << 20))
    os.close(writer)
    report, hung = _read(reader, seconds, pid)
    os.close(reader)
    _, status, usage = os.wait4(pid, 0)
    took_s = time.perf_counter() - began_s
    if hung:
        return Outcome("hang", f"more than {seconds:g} s", took_s, 0)
    try:
        found = json.loads(report)
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        return Outcome("crash", signal.Signals(-code).name if code < 0 else f"exit code {code}", took_s, 0)
    grown_bytes = max(usage.ru_maxrss * 1024 - found["rss"], 0)
    if found["kind"] in ("accepted", "refused") and grown_bytes > memory_bytes:
        return Outcome("memory", f"{grown_bytes >> 20} MB; {found['detail']}", took_s, grown_bytes)
    return Outcome(found["kind"], found["detail"], took_s, grown_bytes)


def _read(reader: int, seconds: float, pid: int) -> tuple[bytes, bool]:
    end_s, data = time.monotonic() + seconds, b""
    while True:
        ready, _, _ = select.select([reader], [], [], max(end_s - time.monotonic(), 0))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            return data, True
        part = os.read(reader, _MAX_REPORT)
        if not part:
            return data, False
        data += part


def _child(work: Callable[[], object], writer: int, memory_bytes: int) -> None:
    try:
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        size, rss = (int(pages) * resource.getpagesize() for pages in _statm())
        resource.setrlimit(resource.RLIMIT_AS, (size + memory_bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            kind, detail = "accepted", str(work())
        except GqsaError as error:
            kind, detail = "refused", str(error)
        except MemoryError:
            kind, detail = "memory", traceback.format_exc()
        except BaseException:
            kind, detail = "untyped", traceback.format_exc()
        os.write(writer, json.dumps({"kind": kind, "detail": detail[-4000:], "rss": rss}).encode())
    finally:
        os._exit(0)


def _statm() -> list[str]:
    return Path("/proc/self/statm").read_text().split()[:2]
