"""Ctrl-C in long work: exit code 130, one word on stderr, no partial file, and what can resume does."""

import json
import os
import signal
import subprocess
import time

import pytest
from gqsa_runtime.device_cpu import supported_targets

from tests.e2e.checkpoints import save_checkpoint
from tests.e2e.command import TARGET, command, environment, succeed

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")

PATIENCE_S = 60


class Running:
    """The command in a process group of its own, as a shell starts it."""

    def __init__(self, *args, **changes):
        self._process = subprocess.Popen(
            command(*args), env=environment(**changes), start_new_session=True, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait_for(self, condition) -> None:
        """Waits until condition() is true while the process still runs."""
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert self._process.poll() is None, f"ended too early: {self._process.stderr.read()}"
            assert time.monotonic() < end_s, "never came so far"
            time.sleep(0.005)

    def first_of(self, stream: str) -> str:
        """The first character of stdout or stderr."""
        return getattr(self._process, stream).read(1)

    def interrupt(self) -> str:
        """Ctrl-C, which reaches the whole group. Returns stderr of a process that ended as it should."""
        assert self._process.poll() is None
        os.killpg(self._process.pid, signal.SIGINT)
        _, stderr = self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 130, stderr
        assert stderr.rstrip().endswith("interrupted") and "Traceback" not in stderr
        return stderr


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A model that can write for minutes: a long context, and no token that ends a text."""
    folder = tmp_path_factory.mktemp("long")
    source = save_checkpoint(folder / "source", "qwen2", max_position_embeddings=200_000, eos_token_id=None)
    succeed("build", source, "-o", folder / "long.gqsa", "--bits", 4, "--target", TARGET)
    return folder / "long.gqsa"


def test_compress_goes_on_where_it_was(tmp_path):
    source = save_checkpoint(tmp_path / "source", "llama", num_hidden_layers=10)
    work = ("compress", source, "-o", tmp_path / "out", "--bits", 4, "--samples", 16, "--seq-len", 160)

    def finished() -> int:
        return len(list((tmp_path / "out.partial").glob("*.safetensors")))

    running = Running(*work)
    running.wait_for(lambda: finished() >= 2)
    running.interrupt()
    assert not (tmp_path / "out").exists()
    before = finished()
    report = json.loads(succeed(*work, "--json").stdout)
    assert 2 <= report["resumed_blocks"] == before < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_build_leaves_nothing(tmp_path):
    source = save_checkpoint(tmp_path / "source", "llama")
    (tmp_path / "scratch").mkdir()
    build = ("build", source, "-o", tmp_path / "out.gqsa", "--bits", 4, "--target", TARGET, "--no-cache")
    running = Running(*build, TMPDIR=tmp_path / "scratch")
    running.wait_for(lambda: list((tmp_path / "scratch").glob("gqsac-*/runtime.c")))  # zig is at work
    running.interrupt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "source"]
    assert not list((tmp_path / "scratch").glob("gqsac-*"))


def test_run_while_it_writes(artifact):
    running = Running("run", artifact, "--raw", "-p", "Once", "--context", 100_000, "--max-new-tokens", 90_000)
    assert running.first_of("stdout")
    running.interrupt()


def test_chat_while_it_waits(artifact):
    running = Running("chat", artifact, "--device", "cpu")
    assert running.first_of("stderr")  # the model is open
    running.interrupt()


def test_eval(tmp_path, artifact):
    (tmp_path / "text.txt").write_text("Once upon a time there was a king. " * 10_000)
    running = Running("eval", "ppl", artifact, "--text", tmp_path / "text.txt", "--device", "cpu", "--json")
    assert running.first_of("stderr")  # the model is open
    running.interrupt()
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_eval_while_it_reads_a_long_text(tmp_path, artifact):
    (tmp_path / "text.txt").write_text("Once upon a time there was a king. " * 2_000_000)
    running = Running("eval", "ppl", artifact, "--text", tmp_path / "text.txt", "--device", "cpu", "--json")
    assert running.first_of("stderr")
    time.sleep(1)  # far from all that there is to read
    began_s = time.monotonic()
    running.interrupt()
    assert time.monotonic() - began_s < 5
