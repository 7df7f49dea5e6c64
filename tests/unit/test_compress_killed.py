"""A compression that a signal ends, or whose GPU or memory is lost: the same command goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gqsa_runtime.cli import main

from gqsac.cli import cli
from gqsac.compress import blockwise, bqpo, end_to_end, partial, run, sensitivity
from gqsac.compress.failures import explained
from gqsac.compress.options import Options
from gqsac.errors import InputError
from gqsac.locks import lock
from tests.unit.compress_models import TEXT, folder_bytes, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
ARGUMENTS = ("--samples", 16, "--seq-len", 16, "--epochs", 2, "--e2e-steps", 20, "--batch-tokens", 64)
ARGUMENTS += ("--sparsity", 0.5, "--device", "cpu", "--stages", "bqpo,distill,e2e-oqp")
# In each stage: the module, the name in it, and which of its calls (from 1) ends the run before it does anything.
PLACES = {
    "allocation": (sensitivity, "token_loss", 5),
    "one-shot": (blockwise, "collect_hessians", 2),
    "bqpo": (bqpo, "relative_error", 60),
    "distill": (end_to_end, "token_loss", 15),  # behind a saved state
    "e2e-oqp": (end_to_end, "token_loss", 35),
}
# As torch words them where there is a GPU.
LOST = [
    torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]


@pytest.fixture(autouse=True)
def saves_often(monkeypatch):
    monkeypatch.setattr(end_to_end, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(end_to_end, "_SAVE_EVERY", 10)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """(the command without its output folder, the files that it makes undisturbed)."""
    folder = tmp_path_factory.mktemp("work")
    source = save_model(folder / "llama")
    (folder / "text.txt").write_text(TEXT)
    command = ["compress", str(source), "--calibration", str(folder / "text.txt"), *map(str, ARGUMENTS)]
    assert ended(command, folder / "whole") == 0
    return command, folder_bytes(folder / "whole")


def ended(command, out) -> int:
    """Exit code of the command in this process."""
    with pytest.raises(SystemExit) as stop:
        main(cli, [*command, "-o", str(out)], "gqsac")
    return stop.value.code


def raise_at(place, error):
    """(module, name, function) in whose call of that number the error comes."""
    module, name, call = place
    real, calls = getattr(module, name), []

    def replacement(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    return module, name, replacement


_PROCESS = """
import os, sys
import gqsac.cli, gqsa_runtime.cli
from gqsac.compress import end_to_end
from importlib import import_module
module, name, call, number = import_module(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
real, calls = getattr(module, name), []
def replacement(*args, **kwargs):
    calls.append(1)
    if len(calls) == call and number:
        os.kill(os.getpid(), number)
    elif len(calls) == call:  # reads outside a tensor, after which this process gets nothing more from its GPU
        import torch
        torch.zeros(1, device="cuda")[torch.ones(1, dtype=torch.long, device="cuda")].sum()
    return real(*args, **kwargs)
setattr(module, name, replacement)
end_to_end._SAVE_EVERY_S, end_to_end._SAVE_EVERY = 0.0, 10
gqsa_runtime.cli.main(gqsac.cli.cli, sys.argv[5:], "gqsac")
"""


def stopped(command, out, stage, number) -> subprocess.CompletedProcess:
    """The command in a process that gets the signal in that stage; 0 makes its GPU fail instead."""
    module, name, call = PLACES[stage]
    return subprocess.run(
        [sys.executable, "-c", _PROCESS, module.__name__, name, str(call), str(int(number)), *command, "-o", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "stage, number",
    [
        ("allocation", signal.SIGKILL),
        ("one-shot", signal.SIGKILL),
        ("bqpo", signal.SIGTERM),
        ("distill", signal.SIGKILL),
        ("e2e-oqp", signal.SIGINT),
        ("e2e-oqp", signal.SIGKILL),
    ],
)
def test_a_signal_in_any_stage_loses_nothing(tmp_path, work, stage, number):
    command, whole = work
    process = stopped(command, tmp_path / "out", stage, number)
    assert process.returncode == (130 if number == signal.SIGINT else -number), process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert ended(command, tmp_path / "out") == 0
    assert folder_bytes(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stage, error", zip(PLACES, LOST, strict=True), ids=PLACES)
def test_a_lost_gpu_is_one_sentence_and_loses_nothing(tmp_path, work, capsys, monkeypatch, stage, error):
    command, whole = work
    place = ("bqpo" if stage == "one-shot" else stage), PLACES[stage]
    with monkeypatch.context() as patch:
        patch.setattr(*raise_at(place[1], error))
        assert ended(command, tmp_path / "out") == 1
    reason = str(error).splitlines()[0]
    _, said = capsys.readouterr().err.splitlines()  # the first names the target
    assert said == f"error: {place[0]}: the GPU failed ({reason}); give the same command again to go on"
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert ended(command, tmp_path / "out") == 0
    assert folder_bytes(tmp_path / "out") == whole


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity")
NO_RAM = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize(
    "stage, error, message",
    [
        (
            "allocation",
            OUT_OF_MEMORY,
            "too little memory (CUDA out of memory); use --allocation row, or shorter",
        ),
        ("bqpo", NO_RAM, "use fewer (--samples 8) or shorter samples (--seq-len 8)"),
        ("bqpo", OUT_OF_MEMORY, "(CUDA out of memory); use shorter samples (--seq-len 8), or --device cpu"),
        ("distill", OUT_OF_MEMORY, "(CUDA out of memory); it sufficed before, so free what else uses it, then give"),
        ("e2e-oqp", NO_RAM, "e2e-oqp: the machine has too little memory ([enforce fail at alloc_cpu.cpp:127]"),
    ],
)
def test_memory_that_runs_out_later_says_what_would_help(tmp_path, work, capsys, monkeypatch, stage, error, message):
    with monkeypatch.context() as patch:
        patch.setattr(*raise_at(PLACES[stage], error))
        assert ended(work[0], tmp_path / "out") == 1
    _, said = capsys.readouterr().err.splitlines()  # the first names the target
    assert message in said and said.startswith(f"error: {stage}: the ")


@pytest.mark.parametrize("stage, call", [("distill", 1), ("e2e-oqp", 21)])
def test_smaller_steps_after_memory_ran_out_keep_the_stages_before(tmp_path, work, capsys, monkeypatch, stage, call):
    command, _ = work
    with monkeypatch.context() as patch:
        patch.setattr(*raise_at((end_to_end, "token_loss", call), OUT_OF_MEMORY))
        assert ended(command, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"error: {stage}: the GPU" in said and "use smaller steps (--batch-tokens 32); finished stages are" in said
    if stage == "e2e-oqp":  # what distill was trained with stays
        assert ended([*command, "--train-samples", "8"], tmp_path / "out") == 1
        assert "another train_samples" in capsys.readouterr().err
    monkeypatch.setattr(*raise_at((run, "allocate", 1), AssertionError("made again")))
    monkeypatch.setattr(*raise_at((blockwise, "collect_hessians", 1), AssertionError("made again")))
    assert ended([*command, "--batch-tokens", "32"], tmp_path / "out") == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_disk_that_fills_up_is_one_sentence():
    with pytest.raises(RuntimeError) as full:
        torch.save({"a": torch.zeros(1000)}, "/dev/full")
    said = str(explained(full.value, "distill", Options(seq_len=8, batch_tokens=8)))
    assert said.startswith("distill: its state could not be written") and "free some space" in said


def test_other_errors_stay_what_they_are(tmp_path, work, monkeypatch):
    error = RuntimeError("Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu!")
    monkeypatch.setattr(*raise_at(PLACES["one-shot"], error))
    with pytest.raises(RuntimeError, match="same device"):
        main(cli, [*work[0], "-o", str(tmp_path / "out")], "gqsac")


@pytest.fixture(scope="module")
def gpu_work(tmp_path_factory):
    """(the command on a GPU, the report of what it makes undisturbed)."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    folder = tmp_path_factory.mktemp("gpu-work")
    (folder / "text.txt").write_text(TEXT)
    command = ["compress", str(save_model(folder / "llama")), "--calibration", str(folder / "text.txt")]
    command += ["cuda" if argument == "cpu" else str(argument) for argument in ARGUMENTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GQSAC_COMPILE", "0")  # which takes longer than all the rest
        assert ended(command, folder / "whole") == 0
        yield command, json.loads((folder / "whole" / "report.json").read_text())


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, signal.SIGKILL], ids=["failed", "killed"])
@pytest.mark.parametrize("stage", ["bqpo", "distill", "e2e-oqp"])
def test_a_gpu_that_fails_or_a_process_that_is_killed_on_one_loses_nothing(tmp_path, gpu_work, stage, number):
    command, whole = gpu_work
    process = stopped(command, tmp_path / "out", stage, number)
    if number:
        assert process.returncode == -number, process.stderr
    else:
        assert process.returncode == 1, process.stderr
        (said,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
        assert said.startswith(f"error: {stage}: the GPU failed (") and "give the same command again to go on" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert ended(command, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["resumed_blocks"] > 0 == whole["resumed_blocks"]
    for name in ("distill", "e2e-oqp"):  # its kernels add in any order, so the same up to that
        curve, expected = report["stages"][name]["curve"], whole["stages"][name]["curve"]
        assert [step for step, _ in curve] == [step for step, _ in expected]
        assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in expected], rel=0.02)


def test_a_run_killed_after_its_folder_had_its_name_is_told_to_be_finished(tmp_path, work, capsys):
    command, whole = work
    code = _PROCESS.replace("setattr(module, name, replacement)", "import shutil; shutil.rmtree = replacement")
    process = subprocess.run(
        [sys.executable, "-c", code, "os", "rename", "1", "9", *command, "-o", str(tmp_path / "out")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == -9, process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    assert ended(command, tmp_path / "out") == 1
    assert "out exists already and is a finished compression; build it with" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and folder_bytes(tmp_path / "out") == whole
    # A partial folder that is not of this OUT stays.
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "published.json").write_text('{"inode": 1}')
    assert ended(command, tmp_path / "out") == 1
    assert (tmp_path / "out.partial").is_dir()


@pytest.mark.parametrize("left", [("published.json", "state.json", "model/x"), ("published.json",), ()])
def test_a_kill_while_the_partial_folder_is_removed_leaves_what_can_be(tmp_path, monkeypatch, left):
    out, folder = tmp_path / "out", tmp_path / "out.partial"
    out.mkdir()
    (folder / "model").mkdir(parents=True)
    for name in ("published.json", "state.json", "a.safetensors", "model/x"):
        (folder / name).write_text(json.dumps({"inode": out.stat().st_ino}))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*raise_at((partial.shutil, "rmtree", 2), KeyboardInterrupt))  # the first is that of model
        partial._remove(folder)
    assert [path.name for path in folder.iterdir()] == ["published.json"]
    for path in folder.iterdir():
        if path.name not in left:
            path.unlink()
    for name in left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"inode": out.stat().st_ino}))
    with pytest.raises(InputError, match="exists already"):
        partial.refuse_existing(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_to_one_folder(tmp_path, work, capsys, monkeypatch):
    command, whole = work
    (tmp_path / "out.partial").mkdir()
    held = lock(tmp_path / "out.partial")
    assert ended(command, tmp_path / "out") == 1
    assert "another compression to" in (said := capsys.readouterr().err) and "is under way" in said
    os.close(held)
    assert ended(command, tmp_path / "out") == 0 and folder_bytes(tmp_path / "out") == whole
