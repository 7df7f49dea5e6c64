"""Half a minute of fuzzing, the mutants that failed once, and whether the harness would see a failure."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from gqsa_runtime.chat import ChatTemplate
from gqsa_runtime.errors import InputError

from tests.fuzz import figures, kinds, limited, mutate, renderer, templates, tokenizers
from tests.fuzz.__main__ import SEEDS, _quotas, mutant, run, try_out
from tests.fuzz.kinds import KINDS
from tests.fuzz.limited import FAILURES, run_all_limited, run_limited

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30
MB = 1 << 20


def test_half_a_minute_of_mutants(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")]),
        "RUST_BACKTRACE": "0",
    }
    # The same mutants each time; `make fuzz` tries others every day.
    written = tmp_path / "figures.json"
    options = ["--seconds", SECONDS, "--seed", 0, "--keep", tmp_path / "failures", "--json", written]
    command = [sys.executable, "-m", "tests.fuzz", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=6 * SECONDS)
    assert done.returncode in (0, 1), done.stderr
    tried = json.loads(written.read_text())["kinds"]
    assert [failed for found in tried.values() for failed in found["failed"]] == []
    assert tried.keys() == KINDS.keys()
    for kind, found in tried.items():
        assert found["counts"].get("refused", 0) >= 5, (kind, found)
        assert kind in ("bytes", "prefix") or found["counts"].get("accepted"), (kind, found)


@pytest.mark.parametrize("path", sorted(SEEDS.iterdir()), ids=lambda path: path.name)
def test_what_failed_once(path):
    (outcome,) = try_out(path.name.split("-")[0], [path.read_bytes()])
    assert outcome.kind not in FAILURES, outcome


def test_a_mutant_is_made_from_its_number_alone():
    for kind in KINDS:
        assert mutant(kind, 3) == mutant(kind, 3)
        assert len({mutant(kind, number) for number in range(20)}) > 10


def test_so_many_mutants_of_each_kind_its_share(tmp_path):
    assert _quotas(list(KINDS), 1_000_000) == {kind: chosen.count_share * 10_000 for kind, chosen in KINDS.items()}
    assert sum(_quotas(list(KINDS), 999).values()) == 999
    found = run(["bytes", "prefix"], 60, 25, seed=3, jobs=2, keep=str(tmp_path))
    assert {kind: figures["counts"].total() for kind, figures in found["kinds"].items()} == {"bytes": 20, "prefix": 5}
    shown = figures.table(found)
    assert "| prefix | 5 | 5 | 0 | 0 |" in shown and "25 mutants, seed 3: " in shown


def test_runs_of_several_seeds_are_added_up(tmp_path):
    runs = [run(["prefix"], 60, 10, seed, jobs=1, keep=str(tmp_path)) for seed in (1, 2)]
    runs = json.loads(json.dumps(runs))
    added = figures.total(runs)
    assert added["kinds"]["prefix"]["counts"]["refused"] == 20 and added["seeds"] == [1, 2]
    assert added["kinds"]["prefix"]["slowest"] == tuple(max(run["kinds"]["prefix"]["slowest"] for run in runs))
    assert "| prefix | 20 | 20 | 0 | 0 |" in figures.table(added)
    with pytest.raises(ValueError, match="seed 2 occurs twice"):
        figures.total([*runs, runs[1]])


def test_the_size_of_a_mutant_has_a_bound(monkeypatch):
    def largest() -> int:
        made = (mutate.json_value(Random(seed), [[0] * 30 for _ in range(30)], 8) for seed in range(40))
        return max(map(mutate.count, made))

    monkeypatch.setattr(mutate, "_MAX_PLACES", 1000)
    assert largest() < 4000
    monkeypatch.setattr(mutate, "_MAX_PLACES", 10**9)
    assert largest() > 40_000


def test_sound_files_are_accepted():
    for data in kinds._sound_files():
        assert run_limited(lambda data=data: KINDS["plan"].use(data), 5, 64 * MB).kind == "accepted"
    made = [json.dumps(make()).encode() for make in tokenizers.FAMILIES.values()]
    assert {outcome.kind for outcome in try_out("tokenizer", made)} == {"accepted"}
    for outcome in try_out("template", [base.encode() for base in templates.BASES]):
        assert outcome.kind == "accepted" or "roles must alternate" in outcome.detail
    assert templates.mutant(Random(0))


def test_a_fork_renders_what_a_process_of_its_own_does():
    answers = []
    for source in (*templates.BASES, "{{ 1 // 0 }}", "{{ a", "{{ 'a' * 9**9 }}"):
        ways = []
        for way in (renderer.forked, contextlib.nullcontext):
            with way():
                (outcome,) = run_all_limited(
                    [lambda source=source: ChatTemplate(source).render(kinds.MESSAGES)], 9, 64 * MB
                )
            ways.append((outcome.kind, outcome.detail))
        assert ways[0] == ways[1]
        answers.append(ways[0])
    assert [kind for kind, _ in answers].count("accepted") == 2, answers


# The harness


def refuse():
    raise InputError("no")


def untyped():
    raise KeyError("x")


def forever():
    while True:
        pass


def forever_without_the_lock():
    time.sleep(100)


def grow():
    assert len(bytearray(150 * MB)) == 150 * MB


def grow_for_ever():
    parts = []
    while True:
        parts.append(bytearray(10 * MB))


def test_a_failure_is_that_of_its_own_work():
    works = [
        refuse,
        lambda: "fine",
        os.abort,
        lambda: "fine",
        forever,
        untyped,
        grow,
        lambda: "fine",
        lambda: os._exit(3),
    ]
    outcomes = run_all_limited(works, 3, 100 * MB)
    expected = ["refused", "accepted", "crash", "accepted", "hang", "untyped", "memory", "accepted", "crash"]
    assert [outcome.kind for outcome in outcomes] == expected
    assert run_all_limited([], 1, MB) == []


def test_a_machine_that_is_busy_with_others_makes_no_hang(monkeypatch):
    began_s = time.monotonic()
    assert run_limited(lambda: time.sleep(1.5), 1, 100 * MB).kind == "hang"
    monkeypatch.setattr(limited, "_starved_s", lambda pid: time.monotonic() - began_s)
    assert run_limited(lambda: time.sleep(1.5), 1, 100 * MB).kind == "accepted"
    monkeypatch.setattr(limited, "_MOST_STARVED", 1)
    assert run_limited(lambda: time.sleep(9), 1, 100 * MB).kind == "hang"
    assert time.monotonic() - began_s < 8


@pytest.mark.parametrize(
    ("work", "kind", "detail"),
    [
        (lambda: "fine", "accepted", "fine"),
        (refuse, "refused", "no"),
        (untyped, "untyped", "KeyError: 'x'"),
        (lambda: sys.exit(0), "untyped", "SystemExit"),
        (lambda: ctypes.string_at(0), "crash", "SIGSEGV"),
        (os.abort, "crash", "SIGABRT"),
        (lambda: os._exit(0), "crash", "exit code 0"),
        (forever, "hang", "more than 1 s"),
        (forever_without_the_lock, "hang", "more than 1 s"),
        (grow, "memory", "MB"),
        (grow_for_ever, "memory", "MemoryError"),
    ],
    ids=range(11),
)
def test_what_the_harness_sees(work, kind, detail):
    outcome = run_limited(work, 1 if kind == "hang" else 20, 100 * MB)
    assert outcome.kind == kind and detail in outcome.detail, outcome
