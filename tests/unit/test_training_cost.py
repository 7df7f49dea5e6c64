"""The training-cost benchmark: its arithmetic on numbers made up, and a run on a tiny model."""

import json

import pytest
from gqsa_runtime.errors import DeviceError

from benchmarks import training_cost
from benchmarks.training_cost import GIB, PAPER_TOKENS, SHAPES, Costs, Shape, block_seconds, extrapolated, step_seconds

BLOCKS = [
    {"seconds": 90.0, "passes": 9.0, "training": 40.0, "epochs": 2, "batch": 2, "allocated": 9 * GIB},
    {"seconds": 12.0, "passes": 2.0, "training": 6.0, "epochs": 2, "batch": 2, "allocated": 10 * GIB},
    {"seconds": 12.0, "passes": 2.0, "training": 6.0, "epochs": 2, "batch": 2, "allocated": 8 * GIB},
]


def test_what_depends_on_samples_and_epochs_grows_with_them_and_the_rest_stays():
    # 12 s = 4 constant + 2 passes + 2 epochs of 3; the first block, which compiles, does not count
    assert block_seconds(BLOCKS, 1000, 1000, 2) == pytest.approx(12)
    assert block_seconds(BLOCKS, 1000, 10000, 5) == pytest.approx(4 + 10 * (2 + 5 * 3))
    assert block_seconds(BLOCKS[:1], 1000, 1000, 2) == pytest.approx(90)


def test_a_step_grows_with_the_layers_but_not_for_the_head():
    shape = Shape(hidden=4, intermediate=8, layers=32, heads=2, kv_heads=1, vocabulary=288, context=8)
    block, head = 4 * (2 * 16 + 2 * 8 + 3 * 32), 2 * 4 * 288  # q, o; k, v; three of the FFN
    assert 4 * block == head
    assert step_seconds(2.0, shape, 4) == pytest.approx(1 + 8)
    assert step_seconds(2.0, shape, 32) == pytest.approx(2)


def test_memory_grows_with_the_layers_but_not_outside_them():
    costs = Costs(
        blocks=BLOCKS,
        stages={"e2e-oqp": {"tokens_per_step": 16384, "allocated": 8 * GIB}},
        state_bytes=16384,
        step_starts=[0.0, 9.0, 10.0, 11.0],
        scoring={"allocated": 4 * GIB, "per_layer": GIB // 2, "outside": GIB},
        choosing={"allocated": 3 * GIB},
        end_to_end={"block": GIB // 4, "saved": GIB // 4, "outside": GIB},
    )
    found = {line["what"]: line["value"] for line in extrapolated(costs, SHAPES["llama-7b"], 4, 65536)}
    assert found["allocation, scores: GPU"] == 4 + 28 / 2
    assert found["allocation, choice: GPU"] == 1 + 2 * 8
    assert found["bqpo: GPU"] == 10
    assert found["e2e-oqp: GPU"] == 8 + 28 / 2
    assert found["bqpo: activations of all samples, RAM or disk"] == 128  # inputs and targets in bf16
    assert found["bqpo, 5 epochs: time"] == pytest.approx(32 * (4 + 128 * (2 + 5 * 3)) / 3600, abs=1e-3)
    step = step_seconds(1.0, SHAPES["llama-7b"], 4)
    assert found["e2e-oqp: time"] == pytest.approx(2 * PAPER_TOKENS / 16384 * step / 3600, abs=1e-3)
    gpu = training_cost.torch.device("cuda")
    lines = [{"what": what, "value": value} for what, value in found.items()]
    assert training_cost.verdict(lines, gpu) == "fits in 24 GB (22.35 GiB): at most 22.0 GiB"
    lines[0]["value"] = 23.0
    assert training_cost.verdict(lines, gpu) == "does not fit in 24 GB (22.35 GiB): allocation, scores (23.0 GiB)"


def test_a_tiny_run_measures_every_part(tmp_path, capsys):
    arguments = ["--shape", "tiny", "--layers", "3", "--samples", "16", "--seq-len", "16", "--epochs", "2"]
    arguments += ["--e2e-steps", "4", "--batch-tokens", "64", "--device", "cpu", "--work", str(tmp_path)]
    assert training_cost.main([*arguments, "-o", str(tmp_path / "cost.json")]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["cost.json"]
    result = json.loads((tmp_path / "cost.json").read_text())
    assert list(result["stages"]) == ["allocation", "bqpo", "e2e-oqp"]
    assert len(result["blocks"]) == 3 and len(result["steps"]) == 3 and not result["large"]
    for block in result["blocks"]:
        parts = [block[part] for part in ("passes", "inverses", "one-shot", "training", "packing")]
        assert min(parts) > 0 and sum(parts) <= block["seconds"]
    printed = capsys.readouterr().out
    assert "bqpo, 5 epochs: time" in printed and "e2e-oqp: time" in printed
    assert "fewer than 2^30 parameters" in printed


def test_a_run_that_does_not_fit_reports_what_it_got_to(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise DeviceError("the GPU has too little memory")

    monkeypatch.setattr(training_cost.run, "train", full)
    arguments = ["--shape", "tiny", "--layers", "2", "--samples", "8", "--seq-len", "16", "--epochs", "1"]
    arguments += ["--device", "cpu", "--work", str(tmp_path)]
    assert training_cost.main([*arguments, "-o", str(tmp_path / "cost.json")]) == 1
    result = json.loads((tmp_path / "cost.json").read_text())
    assert list(result["stages"]) == ["allocation", "bqpo", "stopped"] and len(result["blocks"]) == 2
    printed = capsys.readouterr().out
    assert "bqpo, 5 epochs: time" in printed and "e2e-oqp: time" not in printed
    assert "stopped: the GPU has too little memory" in printed


def test_bad_input_is_refused(tmp_path, capsys):
    assert training_cost.main(["--shape", "tiny", "--seq-len", "100", "--device", "cpu"]) == 1
    assert "--seq-len is 100, expected at most tiny's context of 64" in capsys.readouterr().err
    assert training_cost.main(["--shape", "tiny", "--seq-len", "64", "--memory-cap-gb", "24", "--device", "cpu"]) == 1
    assert "--memory-cap-gb is for GPUs" in capsys.readouterr().err
    assert training_cost.main(["--shape", "tiny", "--layers", "0"]) == 1
    assert "--layers is 0, expected at least 1" in capsys.readouterr().err
