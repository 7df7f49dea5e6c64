"""Targets in bytes of `gqsac compress`: the whole built file, the memory of a run; and the one without options."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from gqsac.cli import cli
from gqsac.compiler.pipeline import BuildOptions, build
from gqsac.compress.options import Options, checked
from gqsac.compress.run import compress
from gqsac.errors import InputError
from tests.unit import compress_models
from tests.unit.compress_models import TEXT, save_model

pytestmark = pytest.mark.usefixtures("one_thread")
TARGETS = ("x86_64_v3",)  # compiled anywhere
ONE = BuildOptions(targets=TARGETS)
SMALL = {"samples": 8, "seq_len": 16, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """A cache of kernels of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GQSAC_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random model, all of whose columns are whole tiles of 64, and most of which is linears."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}.items():
            patch.setitem(compress_models.CONFIGS["llama"], key, value)
        return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def three_bits(tmp_path_factory, llama):
    """A built file of about three bits."""
    folder = tmp_path_factory.mktemp("three")
    compress(llama, folder / "out", target_bpw=3.0, **SMALL)
    return build(folder / "out", folder / "m.gqsa", ONE)


def test_the_built_file_has_the_size_that_was_asked_for(tmp_path, llama, text, three_bits):
    target = int(three_bits.file_bytes * 0.97)
    asked = {"target_size": target, "targets": TARGETS, "calibration": text}
    trained = {"stages": ("distill",), "e2e_steps": 24, "batch_tokens": 64}
    report = compress(llama, tmp_path / "out", **asked, **SMALL, **trained)
    assert 0.995 * target <= report["file_bytes"] <= target
    summary = build(tmp_path / "out", tmp_path / "m.gqsa", ONE)
    assert summary.file_bytes == report["file_bytes"] == (tmp_path / "m.gqsa").stat().st_size
    assert report["bits_per_weight"] == pytest.approx(summary.counts.bits_per_weight, abs=1e-4)
    assert len(report["all_row_widths"]) > 2


@pytest.mark.parametrize("context", [None, 16])
def test_a_run_takes_the_memory_that_was_asked_for(tmp_path, llama, three_bits, context):
    target = int(three_bits.memory_bytes["cpu"] * 0.95)
    asked = {"target_memory": target, "context": context, "targets": TARGETS}
    report = compress(llama, tmp_path / "out", **asked, **SMALL)
    assert 0.995 * target <= report["memory_bytes"] <= target
    if context is None:
        assert build(tmp_path / "out", None, replace(ONE, dry_run=True)).memory_bytes["cpu"] == report["memory_bytes"]
        return
    build(tmp_path / "out", tmp_path / "m.gqsa", ONE)
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "m.gqsa"), "--json", "--context", str(context)]).stdout
    assert json.loads(shown)["plans"]["cpu"]["memory"]["total"] == report["memory_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_size": 1000},
            r"the target is 1.00 kB for the file that `gqsac build` .* it can take .* to .* MB",
        ),
        (
            {"target_memory": 10**12},
            r"the target is 1000.00 GB for the memory of a run on a CPU at a context of \d+",
        ),
        (
            {"target_memory": 10**6, "context": 10**9},
            r"the context is 1000000000 tokens, and this model's positions",
        ),
        ({"target_size": 10**6, "context": 128}, "the context is 128, but only a target of memory depends on it"),
        (
            {"target_size": 10**6, "target_bpw": 3.0},
            "target_bpw and target_size are given, and each is a target",
        ),
        ({"target_size": 10**6, "targets": ("abacus",)}, "unknown target 'abacus'"),
        ({"target_size": 10**6, "bits": 4}, "bits is 4, but a target of size chooses them row by row"),
    ],
)
def test_what_cannot_be_met_is_refused(tmp_path, llama, options, message):
    with pytest.raises(InputError, match=message):
        compress(llama, tmp_path / "out", **{"targets": TARGETS, **options}, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_targets_of_a_build_need_a_target_in_bytes():
    with pytest.raises(InputError, match="only a target of size or memory depends on them"):
        checked(Options(target_bpw=3.0, targets=TARGETS))


def test_without_options_the_target_is_what_a_model_hardly_shows(tmp_path, llama):
    result = CliRunner().invoke(cli, ["compress", str(llama), "-o", str(tmp_path / "out"), "--samples", "2"])
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == "target: 4.50 bits per weight, rows of 1, 2, 3, 4, 8 bits"
    found = json.loads((tmp_path / "out/report.json").read_text())["bits_per_weight"]
    assert 4.5 * 0.995 <= found <= 4.5
    for one in ({"bits": 4}, {"sparsity": 0.5}, {"group_size": 32}, {"quant_group_size": 64}, {"pattern": "2:4"}):
        assert checked(Options(**one)).target_bpw is None and checked(Options(**one)).bits == 4


@pytest.mark.parametrize(
    ("size", "expected"),
    [("90M", 90_000_000), ("1.5G", 1_500_000_000), ("512Mi", 512 << 20), ("2000000", 2_000_000), ("90 MB", 90_000_000)],
)
def test_the_command_reads_sizes(monkeypatch, size, expected):
    taken = {}
    monkeypatch.setattr("gqsac.compress.run.compress", lambda source, output, **options: taken.update(options) or {})
    CliRunner().invoke(cli, ["compress", "model", "-o", "out", "--target-size", size, "--json"])
    assert taken == {"target_size": expected, "seed": 0, "device": "auto"}


@pytest.mark.parametrize("size", ["90X", "-1M", "i", "M", "nan"])
def test_the_command_refuses_what_is_no_size(size):
    result = CliRunner().invoke(cli, ["compress", "model", "-o", "out", "--target-memory", size])
    assert result.exit_code == 2 and "expected a size such as 90M, 4G or 512Mi" in result.stderr
