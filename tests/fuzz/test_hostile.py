"""Near-sound mutants, and what watches those that are accepted: no GPU is needed for either."""

import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest
from gqsa_runtime.errors import GqsaError

from tests.fuzz import hostile, kinds
from tests.gpu.hostile_plans import Outcome, Watch, table

# Stands for the processes that run files: what it does is in their names.
RUNNER = """
import json, os, sys, time
for path in sys.argv[2:]:
    if "abort" in path:
        os.abort()
    if "hang" in path:
        time.sleep(60)
    print(json.dumps({"file": path, "kind": "ran", "detail": sys.argv[1]}), flush=True)
    if "last" in path:
        break
"""
# Stands for compute-sanitizer: its log tells of an error where a file of that name is run.
SANITIZER = """
import subprocess, sys
open(sys.argv[1], "w").write(f"== Invalid read\\n== ERROR SUMMARY: {sum('bad' in word for word in sys.argv)} errors")
sys.exit(subprocess.run(sys.argv[2:]).returncode)
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Parts of small sound files: groups with a word each for a GPU, and records."""
    found = []
    for index, family in ((1, "cuda"), (2, "cpu")):
        path = tmp_path_factory.mktemp("sound") / "sound.gqsa"
        path.write_bytes(kinds._sound_files()[index])
        found.append(hostile.Parts.read(path, family))
    return found


def test_mutants_of_every_kind_are_refused_or_accepted(parts, tmp_path):
    taken = defaultdict(Counter)
    for number in range(240):
        kind, data = hostile.mutant(Random(number), parts[number % 2])
        (tmp_path / "mutant.gqsa").write_bytes(data)
        try:
            kinds.use_path(tmp_path / "mutant.gqsa")
            taken[kind]["accepted"] += 1
        except GqsaError as error:
            assert "sha256" not in str(error)  # digests are right
            taken[kind]["refused"] += 1
    assert taken.keys() == hostile.CHANGES.keys()
    assert all(counts["refused"] for kind, counts in taken.items() if kind != "numbers"), taken
    assert sum(counts["accepted"] for counts in taken.values()) > 24, taken


def test_a_mutant_is_made_from_its_number_and_its_file_stays_as_it_was(parts):
    for made in parts:
        before = made.file()
        assert hostile.mutant(Random(5), made) == hostile.mutant(Random(5), made)
        assert made.file() == before


def watch(tmp_path, **changes) -> Watch:
    for name, text in (("runner.py", RUNNER), ("sanitizer.py", SANITIZER)):
        (tmp_path / name).write_text(text)
    prefix = (sys.executable, str(tmp_path / "sanitizer.py"))
    return Watch("gpu", prefix, (sys.executable, str(tmp_path / "runner.py")), logs=tmp_path, **changes)


def test_findings_are_told_from_files_beside_them(tmp_path):
    files = [Path(name) for name in ("a", "last", "bad", "abort", "b")]
    outcomes = watch(tmp_path).run(files)
    assert {path.name: outcome.kind for path, outcome in outcomes.items()} == {
        "a": "ran", "last": "ran", "abort": "crash", "bad": "findings", "b": "ran",
    }  # fmt: skip
    assert "Invalid read" in outcomes[Path("bad")].detail and outcomes[Path("a")].detail == "gpu"


def test_a_file_that_hangs_is_named(tmp_path):
    outcomes = watch(tmp_path, seconds=1).run([Path("a"), Path("hang"), Path("b")])
    assert [outcomes[Path(name)].kind for name in ("a", "hang", "b")] == ["ran", "hang", "ran"]


def test_the_table_counts_what_came_of_each_kind():
    found = {"masks": [(Path("a"), Outcome("refused")), (Path("b"), Outcome("findings"))]}
    assert table(found).splitlines()[-1] == "| masks | 2 | 1 | 0 | 0 | 1 | 0 | 0 | 0 |"
