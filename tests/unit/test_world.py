"""Several processes in the end-to-end stages: the same result as one, and what they refuse."""

import os
import subprocess
import sys

import numpy as np
import pytest

from gqsac.checkpoint import Checkpoint
from gqsac.compress.options import Options, checked
from gqsac.compress.run import compress
from gqsac.compress.world import World
from gqsac.errors import InputError
from tests.unit.compress_models import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "samples": 8,
    "seq_len": 16,
    "train_samples": 16,
    "batch_tokens": 64,
    "e2e_steps": 6,
    "sparsity": 0.25,
    "removal": "at-once",
    "learn_embeddings": True,
    "stages": ("distill", "e2e-oqp"),
    "distill": 0.5,
    "progress": False,
}
# Ends after the first save of the second stage, once; then goes on.
SCRIPT = """
import sys
from gqsac.compress import end_to_end
from gqsac.compress.run import compress
end_to_end._SAVE_EVERY_S, end_to_end._SAVE_EVERY, end_to_end._READ_EVERY = 0.0, 2, 2
killed = sys.argv[4] == "killed"
def saved(training, *rest, real=end_to_end._save):
    real(training, *rest)
    if killed and training.name == "distill":
        raise SystemExit(7)
end_to_end._save = saved
report = compress(sys.argv[1], sys.argv[2], device="cpu", **eval(sys.argv[3]))
assert bool(report) == (end_to_end.os.environ["RANK"] == "0")
"""


def started(folder, out, how: str) -> int:
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(folder), str(out), repr(OPTIONS), how]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True).returncode


def test_two_processes_train_as_one_does_and_go_on_after_a_kill(tmp_path):
    folder = save_model(tmp_path / "llama")
    compress(folder, tmp_path / "one", device="cpu", **OPTIONS)
    assert started(folder, tmp_path / "two", "killed") != 0
    states = sorted(file.name for file in (tmp_path / "two.partial").glob("*.state"))
    assert states == ["distill-1.state", "distill.state"]
    assert started(folder, tmp_path / "two", "") == 0
    assert not (tmp_path / "two.partial").exists()
    one, two = (Checkpoint.open(tmp_path / name) for name in ("one", "two"))
    assert list(one.names()) == list(two.names())
    moved = 0
    for name in one.names():
        ours, theirs = one.read(name), two.read(name)
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(theirs.astype(float), ours.astype(float), rtol=4e-3, atol=1e-4, err_msg=name)
        else:  # a weight between two levels may fall to either
            moved += (ours != theirs).mean() > 0.01
    assert moved == 0
    untrained = tmp_path / "untrained"
    compress(folder, untrained, device="cpu", **(OPTIONS | {"stages": ("one-shot",), "allocation": "global"}))
    name = next(name for name in one.names() if name.endswith(".scales"))
    assert not np.allclose(Checkpoint.open(untrained).read(name), one.read(name), rtol=4e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bpw": 2.6}, "2 processes train widths and masks that stay; give --removal at-once"),
        ({"sparsity": 0.5}, "2 processes train widths and masks that stay"),
        ({"sparsity": 0.0, "master_dtype": "bfloat16"}, "the master dtype is 'bfloat16', but 2 processes"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(options, message):
    chosen = checked(Options(stages=("distill",), **options))
    World().check(chosen)
    with pytest.raises(InputError, match=message):
        World(0, 2).check(chosen)
