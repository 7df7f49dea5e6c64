"""What the runtime tells the logger `gqsa_runtime`, and that it tells nothing else."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import gqsa_runtime
from gqsa_runtime import load
from gqsa_runtime.model import Model

from tests.format import tiny
from tests.unit import fake_device


def test_opening_and_generations_are_logged_and_no_text_is(tmp_path, monkeypatch, caplog):
    path = tmp_path / "tiny.gqsa"
    path.write_bytes(tiny.file_bytes())
    device = fake_device.FakeDevice(tiny.program(), tiny.CONTEXT)
    opened = load.OpenedDevice(device, "cpu", tiny.CONTEXT, "cpu, as asked", "context 48: less than asked fits")
    monkeypatch.setattr("gqsa_runtime.model.open_device", lambda *args: opened)
    with caplog.at_level(logging.DEBUG, "gqsa_runtime"), Model.open(path) as model:
        text = "".join(model.generate("secret", max_new_tokens=3))
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["INFO", "WARNING", "DEBUG"]
    assert told[0][1].startswith(f"{path}: open in ") and told[0][1].endswith("device cpu, as asked")
    assert told[1][1] == f"{path}: context 48: less than asked fits"
    assert "prompt_tokens=6" in told[2][1] and "finish_reason='length'" in told[2][1]
    assert "secret" not in caplog.text and text not in caplog.text


def test_nothing_is_heard_unless_it_is_asked_for():
    code = "import logging, gqsa_runtime; logging.getLogger('gqsa_runtime.model').warning('unheard')"
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_library_prints_nothing():
    folder = Path(gqsa_runtime.__file__).parent
    for path in folder.rglob("*.py"):
        if path.name in ("cli.py", "template_worker.py"):  # whose output is theirs
            continue
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "print" not in names, path
