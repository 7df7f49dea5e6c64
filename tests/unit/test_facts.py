"""What compression and build have found, in a file's metadata."""

import json

import numpy as np
import pytest
import torch
from gqsa_runtime.errors import FormatError
from gqsa_runtime.facts import MEASURES, facts_json, read_facts
from gqsa_runtime.inspect_ import describe, render
from gqsa_runtime.reader import ArtifactFile

from gqsac.compiler.pipeline import BuildOptions, build
from gqsac.compress import measure
from gqsac.compress.memory import Free
from gqsac.compress.run import compress
from gqsac.errors import ModelError
from gqsac.evaluate.divergence import divergence
from gqsac.evaluate.load import load_for_evaluation
from gqsac.source import load_source
from tests.unit.compress_models import save_model

pytestmark = pytest.mark.usefixtures("one_thread")
FOUND = dict(zip(MEASURES, (0.1234567891, 1.5, 0.25, 1e304, 20.9, 2048), strict=True))


def test_facts_come_back_and_always_take_the_same_room():
    text = facts_json(0.3, FOUND)
    assert len(text) == len(facts_json(1 / 3, None)) == 256
    assert read_facts(text, "m") == {"sparsity": 0.3, "measured": {**FOUND, "kl": 0.123457}}
    assert read_facts(facts_json(0.0, None), "m") == {"sparsity": 0.0, "measured": None}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100000, '{"sparsity":2,"measured":null}', '{"sparsity":true,"measured":null}',
     '{"sparsity":0,"measured":{"kl":1}}', facts_json(0, FOUND).replace("20.9", "NaN"),
     facts_json(0, FOUND).replace("20.9", "-1"), facts_json(0, FOUND).replace("20.9", '"20.9"')],
)  # fmt: skip
def test_other_facts_are_refused(text):
    with pytest.raises(FormatError, match=r"^m\.gqsa: the metadata string 'gqsa.facts' does not hold"):
        read_facts(text, "m.gqsa")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """(source, folder, report) of a model half of whose groups are removed."""
    folder = tmp_path_factory.mktemp("facts")
    source = save_model(folder / "source")
    small = {"samples": 4, "seq_len": 16, "progress": False}
    return source, folder / "out", compress(source, folder / "out", sparsity=0.5, quant_group_size=16, **small)


def test_what_was_measured_and_removed_is_shown_of_the_file(tmp_path, compressed, monkeypatch):
    source, folder, report = compressed
    assert report["measured"] == json.loads((folder / "report.json").read_text())["measured"]
    monkeypatch.setenv("GQSAC_CACHE", str(tmp_path))
    build(folder, tmp_path / "m.gqsa", BuildOptions(targets=("x86_64_v3",)))
    with ArtifactFile.open(tmp_path / "m.gqsa") as file:
        facts = describe(file)
    assert facts["linears"]["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert facts["measured"] == pytest.approx(report["measured"], rel=1e-5)
    assert ", 50.0% of groups removed" in render(facts)
    assert f"{report['measured']['flips']:.1%} of likeliest tokens flip" in render(facts)
    assert "on 30 tokens of the calibration text" in render(facts)


def test_it_is_what_the_checkpoint_measures(compressed, monkeypatch):
    source, folder, report = compressed
    tokens = np.random.default_rng(0).integers(3, 250, (4, 16))
    models = load_for_evaluation(str(folder))[0], load_source(source).model
    found = measure.measured(lambda: models[0], lambda: models[1], 100, tokens, torch.device("cpu"))
    expected = vars(divergence(*models, tokens[:2].reshape(-1).tolist(), 16))
    assert found == {name: expected[name] for name in MEASURES} and found["n_tokens"] == 30 and found["kl"] > 0
    monkeypatch.setattr(measure, "free_memory", lambda device: Free(gpu=None, ram=799))
    assert measure.measured(None, None, 100, tokens, torch.device("cpu")) is None


def test_a_model_that_cannot_be_measured_is_told_of(capfd):
    def failing():
        raise ModelError("no")

    tokens = np.zeros((1, 4), np.int64)
    assert measure.measured(failing, failing, 1, tokens, torch.device("cpu")) is None
    assert capfd.readouterr().err == "warning: the compressed model was not measured: no\n"


def test_a_damaged_report_is_named(tmp_path, compressed):
    folder = tmp_path / "out"
    folder.mkdir()
    for file in compressed[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "report.json").write_text('{"measured": {"kl": 1}}')
    with pytest.raises(FormatError, match=r"report.json: measured is \{'kl': 1\}, expected kl, kl_99"):
        build(folder, None, BuildOptions(dry_run=True, targets=("x86_64_v3",)))
    (folder / "report.json").unlink()
    build(folder, None, BuildOptions(dry_run=True, targets=("x86_64_v3",)))
