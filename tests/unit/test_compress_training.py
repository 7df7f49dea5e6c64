"""The training stages of `gqsac compress` on tiny random models."""

import json
import re

import numpy as np
import pytest
import torch
from gqsa_runtime import Model
from gqsa_runtime.device_cpu import supported_targets
from gqsa_runtime.perplexity import perplexity as runtime_perplexity
from safetensors.torch import load_file, save_file

from gqsac.checkpoint import Checkpoint
from gqsac.cli import cli
from gqsac.compress import blockwise, bqpo, end_to_end, tune
from gqsac.compress.losses import token_loss
from gqsac.compress.run import compress
from gqsac.errors import InputError, ModelError
from gqsac.evaluate.load import load_for_evaluation
from gqsac.evaluate.perplexity import perplexity
from gqsac.source import load_source
from tests.unit.compress_models import TEXT, byte_tokenizer, folder_bytes, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "samples": 24,
    "seq_len": 16,
    "progress": False,
    "epochs": 3,
    "e2e_steps": 20,
    "batch_tokens": 64,
    "weight_lr": 0.02,
}
ALL = ("bqpo", "distill", "e2e-oqp")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random model whose linears matter: its next tokens depend on them."""
    folder = save_model(tmp_path_factory.mktemp("models") / "llama")
    weights = load_file(folder / "model.safetensors")
    factors = {"_proj": 4, "model.norm": 4}
    for name in weights:
        weights[name] *= next((factor for part, factor in factors.items() if part in name), 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Options of a run through all stages, on a text of its own."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    return {"sparsity": 0.5, "stages": ALL, "calibration": text, **SMALL}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llama, whole):
    """(folder, report, stage -> (KL to the uncompressed model, cross-entropy)) of a model through all stages."""
    out = tmp_path_factory.mktemp("trained") / "out"
    tokens = torch.tensor(byte_tokenizer().encode(TEXT[:512]).ids).view(-1, 16)
    teacher = load_source(llama).model(tokens).logits
    losses = {}

    @torch.no_grad()
    def measure(stage, make):
        logits = make()(tokens).logits
        losses[stage] = (float(token_loss(logits, tokens, teacher, 1.0)[0]), float(token_loss(logits, tokens)[0]))

    return out, compress(llama, out, after_stage=measure, **whole), losses


def test_every_stage_lowers_its_loss_and_reports_it(trained):
    out, report, losses = trained
    assert list(losses) == list(ALL)
    assert list(report["stages"]) == ["allocation", *ALL]
    blocks = report["stages"]["bqpo"]["blocks"]
    assert [block["block"] for block in blocks] == ["model.layers.0", "model.layers.1"]
    for block in blocks:
        assert block["kept"] == "trained" and block["after"] < block["before"]
    assert losses["distill"][0] < losses["bqpo"][0]
    assert losses["e2e-oqp"][1] < losses["distill"][1]
    for stage in ("distill", "e2e-oqp"):
        assert report["stages"][stage]["curve"][-1][0] == 20
    assert json.loads((out / "report.json").read_text())["stages"].keys() == report["stages"].keys()
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_weights_may_learn_in_bf16(tmp_path, llama, whole, trained, monkeypatch):
    learnt, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        learnt.append({p.dtype for p in self.state if p.ndim == 2 and self.state[p]["exp_avg"].dtype == p.dtype})
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(InputError, match="the master dtype is 'float16', expected one of float32, bfloat16"):
        compress(llama, tmp_path / "out", master_dtype="float16", **whole)
    report = compress(llama, tmp_path / "out", master_dtype="bfloat16", **whole)
    assert learnt[0] == {torch.bfloat16, torch.float32} == learnt[-21] and learnt[-1] == {torch.float32}
    blocks, expected = report["stages"]["bqpo"]["blocks"], trained[1]["stages"]["bqpo"]["blocks"]
    for block, exact in zip(blocks, expected, strict=True):  # most of what f32 weights gain
        assert block["before"] - block["after"] > 0.5 * (exact["before"] - exact["after"])
    ends = [r["stages"]["distill"]["curve"][-1][1] for r in (report, trained[1])]
    assert ends[0] == pytest.approx(ends[1], rel=0.1)


def test_the_sparsity_is_exactly_what_was_asked_for(trained, tmp_path, llama):
    for stage_options in ({"stages": ("distill",), "allocation": "row"}, {"stages": ("bqpo",), "allocation": "layer"}):
        compress(llama, tmp_path / "out", sparsity=0.3, **stage_options, **SMALL)
        checkpoint = Checkpoint.open(tmp_path / "out")
        for path in checkpoint.modules():
            (stream,) = checkpoint.streams(path)
            groups = stream.rows * stream.columns // 16
            assert stream.nnz == groups - round(0.3 * groups), path
        (tmp_path / "out").rename(tmp_path / f"done-{stage_options['stages'][0]}")
    assert trained[1]["kept_groups"] * 2 == trained[1]["groups"]  # under one budget for the model


@pytest.mark.parametrize("stages", [("one-shot",), ("bqpo",), ("distill",)])
def test_a_global_budget_is_met_exactly(tmp_path, llama, stages):
    report = compress(llama, tmp_path / "out", sparsity=0.5, allocation="global", stages=stages, **SMALL)
    assert abs(report["kept_groups"] - report["groups"] / 2) < 1
    assert len(set(report["sparsity"].values())) > 3


def test_a_block_that_stays_dense_is_trained_around(tmp_path, llama, whole):
    report = compress(llama, tmp_path / "out", skip=("model.layers.0.*",), **whole)
    first, second = report["stages"]["bqpo"]["blocks"]
    assert (first["kept"], first["epochs"], first["before"]) == ("dense", 0, first["after"])
    assert second["kept"] == "trained"
    assert all(path.startswith("model.layers.1.") for path in report["sparsity"])


def test_a_log_gets_a_line_now_and_then(tmp_path, llama, whole, capfd, monkeypatch):
    from gqsac.compress import progress

    compress(llama, tmp_path / "quiet", **whole | {"progress": True})
    first = "target: 4 bits for every weight, 50.0% of groups of 16 removed"
    assert capfd.readouterr().err.splitlines() == [first]  # it took less than a minute
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    compress(llama, tmp_path / "out", **whole | {"progress": True})
    first_too, *lines = capfd.readouterr().err.splitlines()
    assert first_too == first
    assert re.match(r"bqpo \(calibrating on text.txt\): block 1/2, \d+ s left, error 0.\d+, peak \d", lines[0])
    assert [re.match(r"(\S+): step (\d+)/20, loss \S+, \d+ s left, peak", line).groups() for line in lines[2:]] == [
        (stage, step) for stage in ("distill", "e2e-oqp") for step in ("10", "20")
    ]
    assert "block 2/2, 0 s left" in lines[1] and len(lines) == 6


class _Killed(Exception):
    pass


def _raise_at(call, real):
    """`real`, but the call of that number (from 1) raises before anything is done."""
    calls = []

    def replacement(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise _Killed
        return real(*args, **kwargs)

    return replacement


@pytest.mark.parametrize(
    "where",
    [
        (bqpo, "relative_error", 100),  # in the second block's training
        (end_to_end, "token_loss", 3),  # before the first saved state of distill
        (end_to_end, "token_loss", 18),  # after one
        (tune, "stored_block", 2),  # while distill's result is written
        (end_to_end, "token_loss", 31),  # in e2e-oqp
        (tune, "stored_block", 4),
    ],
    ids=lambda where: f"{where[1]}-{where[2]}",
)
def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, llama, whole, trained, monkeypatch, where):
    monkeypatch.setattr(end_to_end, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(end_to_end, "_SAVE_EVERY", 10)
    module, name, call = where
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(module, name, _raise_at(call, getattr(module, name)))
        compress(llama, tmp_path / "out", **whole)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="another epochs: 3 there, 4 now"):
        compress(llama, tmp_path / "out", **{**whole, "epochs": 4})
    compress(llama, tmp_path / "out", **whole)
    assert folder_bytes(tmp_path / "out") == folder_bytes(trained[0])


def test_a_nan_in_a_block_stops_with_its_name_and_keeps_the_others(tmp_path, llama, monkeypatch):
    options = {"sparsity": 0.5, "stages": ("bqpo",), **SMALL}
    real, seen = bqpo.BlockTrainer._step, []

    def step(self, *args):
        loss = real(self, *args)
        seen.append(self._index)
        return loss * float("nan") if self._index == 1 else loss

    with monkeypatch.context() as patch:
        patch.setattr(bqpo.BlockTrainer, "_step", step)
        with pytest.raises(ModelError, match=r"^model.layers.1: the loss of the training became nan in epoch 1.*lower"):
            compress(llama, tmp_path / "out", **options)
    calls = []
    real_hessians = blockwise.collect_hessians
    monkeypatch.setattr(blockwise, "collect_hessians", lambda *a: calls.append(1) or real_hessians(*a))
    compress(llama, tmp_path / "out", **{**options, "weight_lr": 1e-4})  # another rate may go on from there
    assert len(calls) == 1


def test_a_nan_end_to_end_stops_with_the_stage_and_step(tmp_path, llama, monkeypatch):
    real = end_to_end.token_loss
    monkeypatch.setattr(end_to_end, "token_loss", lambda *args: tuple(part * float("nan") for part in real(*args)))
    with pytest.raises(ModelError, match=r"^distill: the loss .* in step 1, though every layer's output is finite; "):
        compress(llama, tmp_path / "out", sparsity=0.5, stages=("distill",), **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_not_finite_is_named_and_the_last_good_state_goes_on(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(end_to_end, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(end_to_end, "_SAVE_EVERY", 10)
    options = {"sparsity": 0.5, "stages": ("distill",), **SMALL, "e2e_steps": 20}
    compress(llama, tmp_path / "whole", **options)
    real, steps, norm = end_to_end.batch_tokens, [], "model.layers.1.post_attention_layernorm"

    def batch_tokens(training, step):
        steps.append(step)
        if step == 13:
            training.student.get_submodule(norm).weight.data[3] = float("inf")
        return real(training, step)

    with monkeypatch.context() as patch:
        patch.setattr(end_to_end, "batch_tokens", batch_tokens)
        message = rf"^distill: .* in step 14, first in the output of {norm}; give the same"
        with pytest.raises(ModelError, match=message):
            compress(llama, tmp_path / "out", **options)
        assert steps == [*range(14), 13]  # once more, to find the layer
        steps.clear()
        patch.setattr(end_to_end, "batch_tokens", lambda t, step: steps.append(step) or real(t, step))
        compress(llama, tmp_path / "out", **options)
    assert steps == list(range(10, 20))
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_embeddings_learn_if_asked_to_and_later_stages_keep_them(tmp_path, llama):
    name, found = "model.embed_tokens.weight", {}
    for label, stages, learn in (
        ("not", ("distill",), False),
        ("yes", ("distill",), True),
        ("both", ("distill", "e2e-oqp"), True),
    ):
        options = {"sparsity": 0.25, "stages": stages, "learn_embeddings": learn, **SMALL}
        compress(llama, tmp_path / label, **options)
        found[label] = Checkpoint.open(tmp_path / label).read(name)
    source = load_source(llama).model.get_input_embeddings().weight.detach().numpy().astype(np.float16)
    np.testing.assert_array_equal(found["not"], source)
    assert (found["yes"] != source).mean() > 0.5
    np.testing.assert_array_equal(found["both"], found["yes"])


def test_scales_alone_learn_in_e2e_oqp(tmp_path, llama):
    compress(llama, tmp_path / "one-shot", sparsity=0.25, **SMALL)
    compress(llama, tmp_path / "tuned", sparsity=0.25, stages=("e2e-oqp",), allocation="row", distill=0.5, **SMALL)
    before, after = Checkpoint.open(tmp_path / "one-shot"), Checkpoint.open(tmp_path / "tuned")
    changed = 0
    for name in before.names():
        if name.endswith(".scales"):
            changed += not np.array_equal(before.read(name), after.read(name))
        else:
            np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)
    assert changed == len(before.modules())


@pytest.mark.parametrize("stages", [("one-shot",), ("bqpo", "e2e-oqp"), ("distill",)])
def test_two_of_four_with_three_bits(tmp_path, llama, stages):
    options = {"bits": 3, "group_size": 16, "quant_group_size": 32, "pattern": "2:4", "stages": stages, **SMALL}
    report = compress(llama, tmp_path / "out", **options)
    checkpoint = Checkpoint.open(tmp_path / "out")
    for path in checkpoint.modules():
        (stream,) = checkpoint.streams(path)
        weight = stream.dequantize()
        assert ((weight.reshape(-1, 4) == 0).sum(1) >= 2).all()
        assert (weight == 0).mean() < 0.75
        assert stream.bits == 3 and stream.nnz == stream.rows * stream.columns // 16
        pairs = stream.scales.reshape(-1, 2)
        assert (pairs[:, 0] == pairs[:, 1]).all()
    assert report["coded_bits_per_weight"] == pytest.approx(0.5 * 3 + 19 / 32 + 1, abs=1e-3)
    assert set(report["sparsity"].values()) == {0.5}


def test_minutes_end_a_training_with_the_mask_complete(tmp_path, llama):
    options = {**SMALL, "e2e_steps": None, "minutes": 0.01, "stages": ALL}
    report = compress(llama, tmp_path / "out", sparsity=0.5, **options)
    assert report["kept_groups"] * 2 == report["groups"]
    assert all(report["stages"][stage]["train_seconds"] < 3 for stage in ("distill", "e2e-oqp"))


@pytest.mark.parametrize("name", ["opt", "gemma3"])
def test_other_architectures_train(tmp_path, name):
    source = save_model(tmp_path / "source", name)
    report = compress(source, tmp_path / "out", sparsity=0.25, stages=ALL, **{**SMALL, "e2e_steps": (10, 5)})
    assert [report["stages"][stage]["steps"] for stage in ("distill", "e2e-oqp")] == [10, 5]
    assert all(block["after"] <= block["before"] for block in report["stages"]["bqpo"]["blocks"])


@pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")
def test_a_trained_checkpoint_scores_the_same_through_the_runtime(tmp_path, trained):
    from click.testing import CliRunner

    built = CliRunner().invoke(cli, ["build", str(trained[0]), "-o", str(tmp_path / "m.gqsa"), "--target", "cpu"])
    assert built.exit_code == 0, built.output
    model, _ = load_for_evaluation(str(trained[0]))
    text = TEXT[:512]
    ours = perplexity(model, byte_tokenizer().encode(text).ids, 64).perplexity
    with Model.open(tmp_path / "m.gqsa", device="cpu", threads=1) as engine:
        assert runtime_perplexity(engine, text, 64).perplexity == pytest.approx(ours, rel=5e-3)


def test_the_command_reports_in_words(tmp_path, llama):
    from click.testing import CliRunner

    arguments = ["compress", str(llama), "-o", str(tmp_path / "out"), "--stages", "bqpo, e2e-oqp", "--bits", "4"]
    result = CliRunner().invoke(
        cli, [*arguments, "--samples", "4", "--seq-len", "32", "--epochs", "1", "--e2e-steps", "3"]
    )
    assert result.exit_code == 0, result.output
    for words in (
        "calibrated on   built-in text: 4 samples of 32 tokens",
        "bits per weight",
        "relative error of a block",
        f"written to      {tmp_path / 'out'}",
    ):
        assert words in result.stderr
    assert result.stdout == ""


def test_distillation_learns_from_the_uncompressed_model(tmp_path, llama):
    """With 8 bits and nothing removed the student begins, and stays, next to its teacher."""
    report = compress(llama, tmp_path / "out", bits=8, sparsity=0.0, stages=("distill",), **SMALL, scale_lr=1e-5)
    assert max(loss for _, loss in report["stages"]["distill"]["curve"]) < 0.03
