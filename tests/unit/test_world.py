"""Several processes in the end-to-end stages: the same result as one, and what they refuse."""

import json
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
from tests.unit import compress_models
from tests.unit.compress_models import save_model
from tests.unit.test_compress_widths import strengthened

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
BY_ROWS = {
    "samples": 8,
    "seq_len": 16,
    "train_samples": 64,
    "batch_tokens": 128,
    "e2e_steps": 40,
    "target_bpw": 2.6,
    "weight_lr": 0.016,
    "stages": ("distill",),
    "progress": False,
}
# Given "killed", ends after the first save of the first stage. Otherwise goes on, and then trains by rows.
SCRIPT = """
import sys
from gqsac.compress import end_to_end
from gqsac.compress.run import compress
folder, out, options, by_rows, how = sys.argv[1:]
end_to_end._SAVE_EVERY_S, end_to_end._SAVE_EVERY, end_to_end._READ_EVERY = 0.0, 2, 2
def saved(training, *rest, real=end_to_end._save):
    real(training, *rest)
    if how == "killed":
        raise SystemExit(7)
end_to_end._save = saved
report = compress(folder, out, device="cpu", **eval(options))
assert bool(report) == (end_to_end.os.environ["RANK"] == "0")
compress(folder, out + "-rows", device="cpu", **eval(by_rows))
"""


def started(folder, out, how: str) -> int:
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(folder), str(out), repr(OPTIONS), repr(BY_ROWS), how]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300
    ).returncode


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a model, what one process makes of it, what two make that are stopped and go on): folders."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compress_models.CONFIGS["llama"], "intermediate_size", 128)  # whole tiles of 64 columns
        folder = strengthened(save_model(root / "llama"))
    compress(folder, root / "one", device="cpu", **OPTIONS)
    compress(folder, root / "one-rows", device="cpu", **BY_ROWS)
    assert started(folder, root / "two", "killed") != 0
    states = sorted(file.name for file in (root / "two.partial").glob("*.state"))
    assert states == ["distill-1.state", "distill.state"]
    assert started(folder, root / "two", "") == 0
    assert not list(root.glob("*.partial"))
    return folder, root


def test_two_processes_train_as_one_does(tmp_path, trained):
    folder, root = trained
    one, two = (Checkpoint.open(root / name) for name in ("one", "two"))
    assert list(one.names()) == list(two.names())
    for name in one.names():
        ours, theirs = one.read(name), two.read(name)
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(theirs.astype(float), ours.astype(float), rtol=4e-3, atol=1e-4, err_msg=name)
        else:  # a weight between two levels may fall to either
            assert (ours != theirs).mean() <= 0.01, name
    compress(
        folder, tmp_path / "untrained", device="cpu", **(OPTIONS | {"stages": ("one-shot",), "allocation": "global"})
    )
    name = next(name for name in one.names() if name.endswith(".scales"))
    assert not np.allclose(Checkpoint.open(tmp_path / "untrained").read(name), one.read(name), rtol=4e-3)


def test_two_processes_choose_widths_together(trained):
    one, two = (json.loads((trained[1] / f"{name}-rows" / "report.json").read_text()) for name in ("one", "two"))
    assert two["stages"]["distill"]["processes"] == 2
    for report in (one, two):
        assert 2.6 * 0.98 < report["bits_per_weight"] <= 2.6 and "2" in report["all_row_widths"]
    # Other tokens are sampled for the sensitivities, so widths differ a little.
    assert two["measured"]["kl"] == pytest.approx(one["measured"]["kl"], rel=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5}, "2 processes train masks that stay; give --removal at-once"),
        ({"sparsity": 0.0, "master_dtype": "bfloat16"}, "the master dtype is 'bfloat16', but 2 processes"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(options, message):
    chosen = checked(Options(stages=("distill",), **options))
    World().check(chosen)
    with pytest.raises(InputError, match=message):
        World(0, 2).check(chosen)
