"""Kernels made anew by the real compilers: for another CPU, for a GPU, and in place of a file's own."""

import pytest
from gqsa_runtime import Model, device_cuda
from gqsa_runtime.device_cpu import TARGET_VARIABLE, supported_targets
from gqsa_runtime.errors import DeviceError

from gqsac.compiler.passes.compile import CUDA_TARGETS
from tests.e2e.checkpoints import save_checkpoint
from tests.e2e.command import gqsac, refusal, succeed
from tests.e2e.reference import greedy
from tests.format.other_code import with_code

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")

TARGET = supported_targets()[-1] if supported_targets() else "cpu"
PROMPT = "It was the best of times, it was the worst of times"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A file for the oldest CPUs whose kernels this machine runs."""
    folder = tmp_path_factory.mktemp("trust")
    source = save_checkpoint(folder / "source", "llama", seed=2, intermediate_size=128)
    rounding = ("--bits", 4, "--group-size", 64, "--sparsity", 0.3)
    succeed("build", source, "-o", folder / "built.gqsa", *rounding, "--target", TARGET)
    return folder / "built.gqsa"


def answer(file, device="cpu", **options) -> list[int]:
    with Model.open(file, device, threads=1, **options) as model:
        return greedy(model, model.tokenize(PROMPT), 12)


@pytest.mark.skipif("x86_64_v4" not in supported_targets(), reason="needs AVX-512")
def test_a_file_for_another_cpu_gives_the_same_tokens(built, tmp_path):
    succeed("relink", built, "-o", tmp_path / "newer.gqsa", "--target", "x86_64_v4")
    with Model.open(tmp_path / "newer.gqsa", device="cpu") as model:
        assert model.device.target == "x86_64_v4"
    expected = answer(built)
    assert len(set(expected)) > 3 and answer(tmp_path / "newer.gqsa") == expected


def test_no_code_of_the_file_runs(built, tmp_path, monkeypatch):
    hostile = with_code(built, tmp_path / "hostile.gqsa", TARGET, lambda code: bytes(len(code)))
    monkeypatch.setenv(TARGET_VARIABLE, TARGET)
    run = ("run", hostile, "--raw", "--prompt", PROMPT, "--max-new-tokens", 8, "--device", "cpu")
    assert refusal(gqsac(*run))
    result = succeed(*run, "--rebuild-kernels")
    assert "kernels made anew by gqsac" in result.stderr and "no code of the file runs" in result.stderr
    assert result.stdout == succeed("run", built, *run[2:]).stdout
    assert answer(hostile, kernels="rebuild") == answer(built)
    result = gqsac("verify", hostile, "--rebuild")
    assert result.exit_code == 1 and [TARGET, "all", "different"] in [
        line.split() for line in result.stdout.splitlines()
    ]


@pytest.mark.gpu
def test_a_file_for_cpus_gets_kernels_for_this_gpu(built, tmp_path):
    try:
        arch = device_cuda.Gpu().arch
    except DeviceError as error:
        pytest.skip(f"no NVIDIA GPU: {error}")
    file = tmp_path / "gpu.gqsa"
    succeed("relink", built, "-o", file, "--target", arch if arch in CUDA_TARGETS else "compute_80")
    assert Model.check(file).device == "cuda:0" and Model.check(file).runs
    assert succeed("verify", file, "--rebuild").stdout.count(" same") > 10
    expected = answer(built)
    assert answer(file, device="cuda") == answer(file, device="cuda", kernels="rebuild") == expected
