"""`gqsac sweep` on a tiny random model: its points, a run that goes on, and failures that leave the others alone."""

import csv
import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from gqsa_runtime.inspect_ import describe
from gqsa_runtime.reader import ArtifactFile

from gqsac.cli import cli
from gqsac.errors import InputError
from gqsac.evaluate import divergence
from gqsac.evaluate import sweep as sweep_module
from gqsac.evaluate.sweep import sweep
from tests.unit import compress_models
from tests.unit.compress_models import TEXT, folder_bytes, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "build_targets": ("x86_64_v3",), "window": 16, "max_windows": 4, "samples": 8, "seq_len": 16, "show": False,
    "device": "cpu",
}  # fmt: skip
FOUND = divergence.Divergence(0.1, 0.5, 0.2, 12.0, 10.0, 60, 4)
BUILT = SimpleNamespace(counts=SimpleNamespace(bits_per_weight=2.5), file_bytes=1000)
COUNTED = {"2.6": 2.6, "4.3": 4.3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random model all of whose columns are whole tiles of 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compress_models.CONFIGS["llama"], "intermediate_size", 128)
        return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def swept(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, sweep(str(llama), [4.3, 2.6], out, TEXT, **SETTINGS)


def test_points_are_those_of_build_and_eval(llama, swept):
    out, rows = swept
    assert [row.label for row in rows] == list(COUNTED) and not any(row.errors for row in rows)
    for row in rows:
        with ArtifactFile.open(out / f"{row.label}bpw.gqsa") as file:
            facts = describe(file)
        assert facts["file_bytes"] == row.file_bytes == (out / f"{row.label}bpw.gqsa").stat().st_size
        assert facts["linears"]["bits_per_weight"] == row.bits_per_weight
        assert row.bits_per_weight == pytest.approx(COUNTED[row.label], rel=0.05)
        assert vars(divergence.compare(row.path, str(llama), TEXT, 16, None, 4, "cpu")) == row.divergence
    assert rows[0].file_bytes < rows[1].file_bytes
    assert rows[0].divergence["kl"] > rows[1].divergence["kl"] > 0


def test_files_of_a_sweep(swept):
    out, rows = swept
    lines = (out / "sweep.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 2.6", "| 4.3"]
    assert f"| {rows[0].divergence['kl']:.4f} |" in lines[2] and f"| {rows[1].file_bytes / 1e6:.2f} |" in lines[3]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with (out / "sweep.csv").open() as file:
        for line, row in zip(csv.DictReader(file), rows, strict=True):
            assert line["target"] == row.label and int(line["file_bytes"]) == row.file_bytes
            assert float(line["bits_per_weight"]) == row.bits_per_weight
            assert {key: float(line[key]) for key in row.divergence} == row.divergence
    assert not [file.name for file in out.iterdir() if "part" in file.name]
    assert [row["divergence"] for row in json.loads((out / "sweep.json").read_text())["rows"]] == [
        row.divergence for row in sorted(rows, key=lambda row: row.label)
    ]


def test_an_interrupted_sweep_goes_on(llama, swept, tmp_path, monkeypatch):
    made, real = [], sweep_module.build

    def stopped_at_the_second(folder, *rest):
        made.append(folder)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "build", stopped_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            sweep(str(llama), [2.6, 4.3], tmp_path / "out", TEXT, **SETTINGS)
    table = (tmp_path / "out" / "sweep.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 2.6"]  # the second is not made
    assert (tmp_path / "out" / "sweep.png").is_file()
    with monkeypatch.context() as patch:  # both checkpoints are there, and one of them is built
        patch.setattr(sweep_module, "compress", None)
        built = []
        patch.setattr(sweep_module, "build", lambda *args: built.append(args[0]) or real(*args))
        rows = sweep(str(llama), [2.6, 4.3], tmp_path / "out", TEXT, **SETTINGS)
    assert built == [str(tmp_path / "out" / "4.3bpw")]
    assert [row.divergence for row in rows] == [row.divergence for row in swept[1]]
    assert folder_bytes(tmp_path / "out" / "4.3bpw") == folder_bytes(swept[0] / "4.3bpw")


def test_time_left_is_told_once_a_point_is_made(llama, tmp_path, monkeypatch):
    def failing(model, folder, target_bpw, **options):
        if target_bpw == 3.0:
            raise InputError("no")

    for name, result in (("build", lambda *args: BUILT), ("diverge", lambda *args, **kwargs: FOUND)):
        monkeypatch.setattr(sweep_module, name, result)
    monkeypatch.setattr(sweep_module, "compress", failing)
    times, told = iter([0.0, 0.0, 120.0, 130.0, 260.0]), []
    monkeypatch.setattr(sweep_module.time, "monotonic", lambda: next(times))
    sweep(str(llama), [2.0, 3.0, 4.0, 5.0], tmp_path / "out", TEXT, tell=told.append, **SETTINGS)
    assert [line.partition("; ")[2] for line in told if line.startswith("[")] == [
        "", "2 min so far, about 6 min left", "2 min so far, about 4 min left", "4 min so far, about 2 min left",
    ]  # fmt: skip


def test_a_finished_sweep_makes_nothing(llama, swept, monkeypatch):
    for name in ("compress", "build", "diverge"):
        monkeypatch.setattr(sweep_module, name, None)
    rows = sweep(str(llama), [2.6, 4.3], swept[0], TEXT, **SETTINGS)
    assert [vars(row) for row in rows] == [vars(row) for row in swept[1]]


@pytest.mark.parametrize(
    ("changed", "match"),
    [({"seed": 1}, "was made with options"), ({"window": 8}, "was made with scored"),
     ({"text": TEXT + "!"}, "was made with text"), ({"build_targets": ("cpu",)}, "was made with build targets")],
)  # fmt: skip
def test_other_settings_are_refused(llama, swept, changed, match):
    given = {"text": TEXT, **SETTINGS, **changed}
    with pytest.raises(InputError, match=match):
        sweep(str(llama), [2.6], swept[0], given.pop("text"), **given)


def test_a_point_out_of_reach_leaves_the_others_alone(llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["sweep", str(llama), "--bpw", "0.5,3", "-o", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]
    args += ["--target", "x86_64_v3", "--window", "16", "--max-windows", "2", "--samples", "8", "--seq-len", "16"]
    result = CliRunner().invoke(cli, [*args, "--device", "cpu"])
    assert result.exit_code == 1
    assert "can have" in result.stderr and "failed: 0.5; the same command tries them again" in result.stderr
    assert "| 0.5 | failed |" in result.stdout and (tmp_path / "out" / "3bpw.gqsa").is_file()


def test_bad_arguments_make_no_folder(llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    common = ["sweep", str(llama), "-o", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]
    for args, message in [(["--bpw", "2;3"], "numbers separated by commas"), (["--bpw", "-1"], "above 0")]:
        result = CliRunner().invoke(cli, [*common, *args])
        assert result.exit_code != 0 and message in result.output + str(result.exception)
    assert not (tmp_path / "out").exists()
