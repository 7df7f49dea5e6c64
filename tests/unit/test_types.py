"""What a type checker knows of the runtime in the code of those who use it."""

import subprocess
import sys

import gqsa_runtime
import pytest

from tests.e2e.command import ROOT

USE = """
from gqsa_runtime import Model

with Model.open("model.gqsa") as model:
    for piece in model.chat([{"role": "user", "content": "Hello"}], max_new_tokens=4):
        print(piece.upper())
    model.generate(["Hello"])
"""


def test_whoever_uses_the_package_has_its_types(tmp_path):
    pytest.importorskip("mypy", reason="mypy checks types; install the extra 'dev'")
    script = tmp_path / "use.py"
    names = [name for name in gqsa_runtime.__all__ if name != "__version__"]
    script.write_text(USE + "".join(f"from gqsa_runtime import {name}\nreveal_type({name})\n" for name in names))
    command = (sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml", script)
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    revealed = [line for line in told.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(names) and not any('"Any"' in line for line in revealed), told
    (wrong,) = (line for line in told.splitlines() if "error:" in line)
    assert 'incompatible type "str"; expected "int"' in wrong
