"""Kernels made anew by the real compiler: a file for another CPU, a file whose code nobody runs, and code compared."""

import pytest
from gqsa_runtime import Model
from gqsa_runtime.device_cpu import TARGET_VARIABLE, supported_targets
from gqsa_runtime.reader import ArtifactFile

from tests.e2e.checkpoints import save_checkpoint
from tests.e2e.command import gqsac, refusal, succeed
from tests.format import gguf_bytes

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


def answer(file, **options) -> list[int]:
    with Model.open(file, device="cpu", threads=1, **options) as model:
        assert model.context_reason is None
        sequence = list(model.tokenize(PROMPT))
        model.engine.prefill(sequence[:-1])
        made = [int(model.engine.decode(sequence[-1]).argmax())]
        while len(made) < 12:
            made.append(int(model.engine.decode(made[-1]).argmax()))
        return made


@pytest.mark.skipif("x86_64_v4" not in supported_targets(), reason="needs AVX-512")
def test_a_file_for_another_cpu_gives_the_same_tokens(built, tmp_path):
    succeed("relink", built, "-o", tmp_path / "newer.gqsa", "--target", "x86_64_v4")
    with Model.open(tmp_path / "newer.gqsa", device="cpu") as model:
        assert model.device.target == "x86_64_v4"
    expected = answer(built)
    assert len(set(expected)) > 3 and answer(tmp_path / "newer.gqsa") == expected


def test_no_code_of_the_file_runs(built, tmp_path, monkeypatch):
    with ArtifactFile.open(built) as file:
        arrays = {name: file.read(name) for name in file.tensors}
        arrays[f"binary.{TARGET}"] = arrays[f"binary.{TARGET}"] * 0  # and digests that agree with it
        hostile = tmp_path / "hostile.gqsa"
        hostile.write_bytes(gguf_bytes.gguf(file.metadata, arrays))
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


def test_the_code_of_a_build_is_what_is_made_again(built):
    result = succeed("verify", built, "--rebuild")
    assert [TARGET, "all", "same"] in [line.split() for line in result.stdout.splitlines()]
