"""The examples that need the runtime alone run on a tiny file."""

import importlib.util
import io
import sys
from pathlib import Path

import pytest
from gqsa_runtime import load

from tests.format import tiny
from tests.unit import fake_device

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch):
    def open_fake(kind, ordinal, program, tensors, binaries, context, threads, clock):
        return fake_device.FakeDevice(program, context)

    monkeypatch.setattr(load, "_open", open_fake)
    monkeypatch.setattr(load, "probe", lambda kind, program, ordinal: (kind == "cpu", f"about {kind}"))
    path = tmp_path / "model.gqsa"
    # The examples' messages are longer than the tiny model's own context.
    path.write_bytes(tiny.file_bytes(tiny.program(max_context=250)))

    def run(name: str, *args: str, named: bool = True) -> None:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(*((str(path), *args) if named else ()))

    run.path = path
    return run


def test_stream(example, capsys):
    example("stream", "Once upon a time")
    captured = capsys.readouterr()
    assert len(captured.out) > 1 and "per second on fake" in captured.err


def test_chat_loop(example, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\n"))
    example("chat_loop")
    assert capsys.readouterr().out.endswith("\n")


def test_score(example, capsys):
    example("score", "A sentence.", "Another one.")
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.split()[0]) for line in lines]
    assert len(lines) == 2 and values == sorted(values, reverse=True)
    assert all("per token" in line for line in lines)


def test_async_stream(example, capsys):
    example("async_stream", "Once", "upon")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["'Once'", "'upon'"] and all(len(line) > 12 for line in lines)


def test_standalone(example, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["answer", "none.gqsa", "Hi"])
    with pytest.raises(SystemExit, match="error: none.gqsa: there is no such file"):
        example("standalone/answer", named=False)
    monkeypatch.setattr(sys, "argv", ["answer", str(example.path), "Hi"])
    example("standalone/answer", named=False)
    assert len(capsys.readouterr().out) > 1
