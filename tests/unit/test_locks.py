"""What a killed process left is told from what another one is still making."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gqsac.compiler.passes import compile_cpu
from gqsac.errors import DeviceError
from gqsac.locks import lock, scratch_folder, sweep

ROOT = Path(__file__).resolve().parents[2]


def killed(code: str, **environment) -> None:
    """Runs code in a process that is killed at its end."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    done = subprocess.run(
        [sys.executable, "-c", f"import os\n{code}\nos.kill(os.getpid(), 9)"],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL


def test_a_lock_has_one_holder(tmp_path):
    held = lock(tmp_path)
    assert held is not None and lock(tmp_path) is None
    os.close(held)
    held = lock(tmp_path)
    assert held is not None
    os.close(held)
    assert lock(tmp_path / "nothing") is None


def test_sweep_spares_what_is_held(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    for name in ("held", "left"):
        (tmp_path / name).write_text("x")
    held = lock(tmp_path / "held")
    sweep(tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["held"]
    os.close(held)


def test_scratch_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed(
        "from gqsac.locks import scratch_folder; s = scratch_folder('gqsac-build-'); s.__enter__()",
        TMPDIR=str(tmp_path),
    )
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder("gqsac-build-") as outer, scratch_folder("gqsac-build-") as inner:
        assert sorted(tmp_path.iterdir()) == sorted([outer, inner])
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    locked = []

    def late(path):
        if not locked:
            path.rmdir()  # another process, in between
        locked.append(path)
        return lock(path)

    monkeypatch.setattr("gqsac.locks.lock", late)
    with scratch_folder("gqsac-build-") as folder:
        assert folder.is_dir() and len(set(locked)) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DeviceError, match=f"compiled in {tmp_path}.*No space left on device.*set TMPDIR"):
        compile_cpu.compile_cpu({}, "x86_64_v3")
