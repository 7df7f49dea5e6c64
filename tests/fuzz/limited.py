"""Runs pieces of work in forked children with limits, and says how each ended."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gqsa_runtime.errors import GqsaError


@dataclass(frozen=True)
class Outcome:
    """How work ended: "accepted", "refused" (a GqsaError) or one of FAILURES. grown_bytes: of its resident memory."""

    kind: str
    detail: str
    seconds: float
    grown_bytes: int


MOST_CHARACTERS = 1000  # of a refusal, which is one sentence for people, on their terminal
_MOST_STARVED = 20  # times the time that work may take
FAILURES = ("untyped", "crash", "hang", "memory")


def why_not_here() -> str | None:
    """Why work cannot be limited on this machine, or None: the peak of a child's memory must be known."""
    try:
        _forget_peak()
        _peak_bytes()
    except (OSError, IndexError) as error:
        return f"how much memory a process takes is not known here ({error}): it takes Linux with /proc/self/clear_refs"
    return None


def run_limited(work: Callable[[], object], seconds: float, memory_bytes: int) -> Outcome:
    """How work() ends in a child, see run_all_limited."""
    return run_all_limited([work], seconds, memory_bytes)[0]


def run_all_limited(works: Sequence[Callable[[], object]], seconds: float, memory_bytes: int) -> list[Outcome]:
    """How each work() ends in a forked child, which does them one after another until one of them ends it.

    seconds: after which a child is killed and its work counts as a hang. Here and in outcomes, time for which the
    machine let it wait for a processor does not count. memory_bytes: how much its resident memory may grow in one work;
    its address space may grow by twice as much and 256 MB, for libraries that are loaded late.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(works):
        outcomes += _fork(works[len(outcomes) :], seconds, memory_bytes)
    return outcomes


def _fork(works: Sequence[Callable[[], object]], seconds: float, memory_bytes: int) -> list[Outcome]:
    """The outcomes of one child: of all works, or up to the one that failed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(works, writer, memory_bytes)
    os.close(writer)
    outcomes, rest = [], b""
    began_s, starved_before_s, starved_s = time.monotonic(), _starved_s(pid), 0.0
    while len(outcomes) < len(works):
        ready, _, _ = select.select([reader], [], [], max(began_s + seconds + starved_s - time.monotonic(), 0))
        if not ready and (longer_s := _starved_s(pid) - starved_before_s) > starved_s:
            starved_s = min(longer_s, _MOST_STARVED * seconds)
            if time.monotonic() < began_s + seconds + starved_s:
                continue
        part = os.read(reader, 1 << 16) if ready else b""
        if not part:
            break
        *reports, rest = (rest + part).split(b"\n")
        outcomes += [Outcome(**json.loads(report)) for report in reports]
        if reports:
            began_s, starved_before_s, starved_s = time.monotonic(), _starved_s(pid), 0.0
    os.close(reader)
    if len(outcomes) < len(works) and not ready:
        os.kill(pid, signal.SIGKILL)
        outcomes.append(Outcome("hang", f"more than {seconds:g} s", seconds, 0))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if len(outcomes) < len(works) and not (outcomes and outcomes[-1].kind in FAILURES):
        detail = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        outcomes.append(Outcome("crash", detail, time.monotonic() - began_s, 0))
    return outcomes


def _starved_s(pid: int) -> float:
    """For how long the threads of a process, and its children, were ready to run while others ran; 0: not known."""
    waited_ns = 0
    with contextlib.suppress(OSError, ValueError, IndexError):  # a thread ends when it likes
        for task in Path(f"/proc/{pid}/task").iterdir():
            waited_ns += int((task / "schedstat").read_text().split()[1])
            for child in (task / "children").read_text().split():
                waited_ns += int(Path(f"/proc/{child}/schedstat").read_text().split()[1])
    return waited_ns / 1e9


def _child(works: Sequence[Callable[[], object]], writer: int, memory_bytes: int) -> None:
    try:
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * memory_bytes + (256 << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for work in works:
            outcome = _outcome(work, memory_bytes)
            os.write(writer, json.dumps(dataclasses.asdict(outcome)).encode() + b"\n")
            if outcome.kind in FAILURES:
                break
    finally:
        os._exit(0)


def _outcome(work: Callable[[], object], memory_bytes: int) -> Outcome:
    _forget_peak()
    before_bytes, starved_s, began_s = _peak_bytes(), _starved_s(os.getpid()), time.perf_counter()
    try:
        kind, detail = "accepted", str(work())
    except GqsaError as error:
        kind, detail = "refused", str(error)
        if not detail.isprintable() or len(detail) > MOST_CHARACTERS:
            kind, detail = "untyped", f"a message of {len(detail)} characters: {detail[:1000]!a}"
    except MemoryError:
        kind, detail = "memory", traceback.format_exc()
    except BaseException:
        kind, detail = "untyped", traceback.format_exc()
    took_s, grown_bytes = time.perf_counter() - began_s, _peak_bytes() - before_bytes
    took_s = max(0.0, took_s - (_starved_s(os.getpid()) - starved_s))
    if kind in ("accepted", "refused") and grown_bytes > memory_bytes:
        kind, detail = "memory", f"{grown_bytes >> 20} MB; {detail}"
    return Outcome(kind, detail[-2000:], took_s, grown_bytes)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
