"""The training-cost benchmark: its arithmetic on numbers made up, and a run on a tiny model."""

import json

import pytest

from benchmarks import training_cost
from benchmarks.training_cost import GIB, SHAPES, block_costs, extrapolated
from gqsac.errors import DeviceError

BLOCKS = [
    {"block_seconds": 90.0, "pass_seconds": 9.0, "seconds": 40.0, "epochs": 2},
    {"block_seconds": 12.0, "pass_seconds": 2.0, "seconds": 6.0, "epochs": 2},
    {"block_seconds": 12.0, "pass_seconds": 2.0, "seconds": 6.0, "epochs": 2},
]
TINY = ["--shape", "tiny", "--layers", "3", "--samples", "16", "--seq-len", "16", "--e2e-steps", "4"]
TINY += ["--batch-tokens", "64", "--device", "cpu"]


def values(stages):
    """what -> (value, formula), of 4 layers of a 7B model, measured on 1/128 of the paper's tokens."""
    measured = {"report": {"stages": stages, "parameters": GIB // 2}, "step_seconds": 0.5}
    lines = extrapolated(measured, SHAPES["llama-7b"], 4, 65536)
    return {line["what"]: (line["value"], line["formula"]) for line in lines}


def test_the_first_block_which_compiles_counts_only_where_it_is_alone():
    assert block_costs(BLOCKS) == (4, 2, 3)
    assert block_costs(BLOCKS[:1]) == (41, 9, 20)


def test_what_depends_on_samples_and_epochs_grows_with_them_and_the_rest_stays():
    found = values({"bqpo": {"blocks": BLOCKS}})
    assert found["bqpo, 5 epochs"][0] == pytest.approx(32 * (4 + 128 * (2 + 5 * 3)) / 3600, abs=1e-3)
    assert found["bqpo, 2 epochs"][0] == pytest.approx(32 * (4 + 128 * (2 + 2 * 3)) / 3600, abs=1e-3)
    assert found["bqpo, activations"][0] == 128  # inputs and targets in bf16
    assert len(found) == 3  # nothing of a GPU, nothing of another stage


@pytest.mark.parametrize("peak, fits", [(10.0, "fits in 24 GB"), (13.0, "does not fit in 24 GB")])
def test_steps_and_memory_grow_with_the_layers(peak, fits):
    found = values({"e2e-oqp": {"tokens_per_step": 4096, "peak_gpu_gib": peak}})
    assert found["e2e-oqp, 2 epochs"][0] == pytest.approx(4096 * 0.5 * 8 / 3600, abs=1e-3)
    value, formula = found["e2e-oqp, GPU"]
    assert value == pytest.approx(peak + 28 / 8 * (1 + 22 / 16) + 28 / 16, abs=1e-3)  # 1/8 Gi weights, 16 Mi inputs
    assert f"; {fits} (22.35 GiB)" in formula


def test_the_allocation_grows_with_the_weights():
    value, formula = values({"allocation": {"peak_gpu_gib": 5.0}})["allocation, GPU"]
    assert value == pytest.approx(5 + 28 / 8 * (2 + 4 / 16), abs=1e-3)  # 1/8 Gi weights in a layer
    assert "28 more layers" in formula and "; fits in 24 GB" in formula


def test_a_tiny_run_measures_every_part(tmp_path, capsys):
    assert training_cost.main([*TINY, "-o", str(tmp_path / "cost.json")]) == 0
    result = json.loads((tmp_path / "cost.json").read_text())
    stages = result["report"]["stages"]
    assert list(stages) == ["allocation", "bqpo", "e2e-oqp"] and not result["large"]
    for block in stages["bqpo"]["blocks"]:
        assert min(block["pass_seconds"], block["seconds"]) > 0
        assert block["pass_seconds"] + block["seconds"] <= block["block_seconds"] + 0.01
    assert 0 < result["step_seconds"] < stages["e2e-oqp"]["train_seconds"]
    printed = capsys.readouterr().out
    assert "fewer than 2^30 parameters" in printed
    assert [line["what"] in printed for line in result["extrapolation"]] == [True] * 4


def test_a_run_that_does_not_fit_says_so(tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise DeviceError("e2e-oqp: the GPU has too little memory")

    monkeypatch.setattr(training_cost, "compress", full)
    assert training_cost.main([*TINY, "-o", str(tmp_path / "cost.json")]) == 1
    assert capsys.readouterr() == ("", "error: e2e-oqp: the GPU has too little memory\n")
    assert not (tmp_path / "cost.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seq-len", "100"], "samples of 100 tokens do not fit the model's context of 64"),
        (["--memory-cap-gb", "24"], "--memory-cap-gb is for GPUs"),
        (["--memory-cap-gb", "0"], "--memory-cap-gb is 0.0, expected a number above 0"),
        (["--layers", "0"], "--layers is 0, expected at least 1"),
        (["--e2e-steps", "2"], "--e2e-steps is 2, expected at least 3"),
        (["--stages", "bqpo,tune"], "the stage 'tune' is unknown"),
        (["-o", "/nowhere/at/all.json"], "--output is in /nowhere/at, which is no folder"),
    ],
)
def test_bad_input_is_refused(capsys, arguments, message):
    assert training_cost.main([*TINY, *arguments]) == 1
    assert message in capsys.readouterr().err
