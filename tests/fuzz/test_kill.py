"""A few kills at random moments; `python -m tests.fuzz.kill` is for many."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gqsa_runtime.device_cpu import supported_targets

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")
def test_what_is_killed_leaves_nothing_and_is_made_in_the_end():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])}
    command = [sys.executable, "-m", "tests.fuzz.kill", "--kills", "2", "--command", "compress", "--command", "rebuild"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["command"] for row in rows] == ["compress", "rebuild"]
    assert all(row["kills"] >= 2 for row in rows)
