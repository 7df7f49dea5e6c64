"""`gqsac compress --target-bpw` on tiny random models: widths by row, one-shot and trained."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gqsa_runtime import Model
from gqsa_runtime.device_cpu import supported_targets
from gqsa_runtime.perplexity import perplexity as runtime_perplexity
from torch.utils._python_dispatch import TorchDispatchMode

from gqsac.checkpoint import Checkpoint
from gqsac.cli import cli
from gqsac.compiler.pipeline import BuildOptions, build
from gqsac.compress import choose_widths, end_to_end
from gqsac.compress import row_costs as row_costs_module
from gqsac.compress.choose_widths import set_widths
from gqsac.compress.fake_quant import GroupLinear
from gqsac.compress.losses import token_loss
from gqsac.compress.quantize import quantize
from gqsac.compress.row_costs import best_grid, row_costs
from gqsac.compress.run import compress
from gqsac.compress.sensitivity import fisher_scores
from gqsac.errors import InputError, ModelError
from gqsac.evaluate.compare import bits_per_weight
from gqsac.evaluate.load import load_for_evaluation
from gqsac.evaluate.perplexity import perplexity
from gqsac.source import load_source
from tests.unit import compress_models
from tests.unit.compress_models import TEXT, byte_tokenizer, folder_bytes, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"samples": 24, "seq_len": 16, "progress": False}
TRAINED = {**SMALL, "e2e_steps": 120, "batch_tokens": 64, "weight_lr": 0.016, "stages": ("distill",)}
TARGET = 2.6


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random model whose linears matter, and all of whose columns are whole tiles of 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compress_models.CONFIGS["llama"], "intermediate_size", 128)
        folder = save_model(tmp_path_factory.mktemp("models") / "llama")
    return strengthened(folder)


def strengthened(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in weights:
        weights[name] *= 4 if "_proj" in name or "model.norm" in name else 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def measured(llama):
    """(stage -> KL to the uncompressed model, the function to give as after_stage)."""
    tokens = torch.tensor(byte_tokenizer().encode(TEXT[:512]).ids).view(-1, 16)
    with torch.no_grad():
        teacher = load_source(llama).model(tokens).logits
    found = {}

    @torch.no_grad()
    def after(stage, make):
        found[stage] = float(token_loss(make()(tokens).logits, tokens, teacher, 1.0)[0])

    return found, after


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llama, text):
    out = tmp_path_factory.mktemp("trained") / "out"
    losses, after = measured(llama)
    return out, compress(llama, out, calibration=text, target_bpw=TARGET, after_stage=after, **TRAINED), losses


def widths_of(folder):
    checkpoint = Checkpoint.open(folder)
    return {path: checkpoint.matrix(path).row_bits for path in checkpoint.modules()}


@pytest.mark.parametrize(
    ("stages", "target"), [(("one-shot",), TARGET), (("one-shot",), 7.93), (("bqpo", "e2e-oqp"), TARGET)]
)
def test_the_target_is_met_as_build_counts(tmp_path, llama, text, stages, target):
    options = {**SMALL, "epochs": 1} | ({"e2e_steps": 3} if "e2e-oqp" in stages else {})
    report = compress(llama, tmp_path / "out", calibration=text, target_bpw=target, stages=stages, **options)
    built = build(tmp_path / "out", None, BuildOptions(dry_run=True, targets=("cpu",)))
    assert report["bits_per_weight"] == pytest.approx(built.counts.bits_per_weight, abs=1e-4)
    assert target * 0.995 < report["bits_per_weight"] <= target and "target_missed" not in report
    widths = widths_of(tmp_path / "out")
    assert len(set(np.concatenate(list(widths.values())).tolist())) >= 3 - (target > 4)
    for layer in ("model.layers.0.mlp.", "model.layers.1.mlp."):  # so that one kernel serves both
        np.testing.assert_array_equal(widths[f"{layer}gate_proj"], widths[f"{layer}up_proj"])
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    weights = {
        path: np.repeat(bits, Checkpoint.open(tmp_path / "out").matrix(path).columns) for path, bits in widths.items()
    }
    assert config["bits"] == pytest.approx(np.concatenate(list(weights.values())).mean(), abs=1e-3)
    assert report["row_widths"].keys() == widths.keys()
    rows = np.concatenate(list(widths.values()))
    assert report["all_row_widths"] == {
        str(width): pytest.approx((rows == width).mean(), abs=1e-5) for width in np.unique(rows)
    }
    for path, shares in report["row_widths"].items():
        assert {int(width): share for width, share in shares.items()} == pytest.approx(
            {w: float((widths[path] == w).mean()) for w in set(widths[path].tolist())}, abs=1e-4
        )


def test_a_target_that_blocks_of_rows_miss_is_told(tmp_path, llama, capfd):
    options = {**SMALL, "progress": True, "target_bpw": 4.04, "widths": (3, 8)}
    report = compress(llama, tmp_path / "out", **options)
    assert report["target_missed"] == (
        "the target is 4.04 bits per weight, and 3.9792 were reached, 1.5% less: rows of this model become wider in "
        "blocks of 16, by at least 0.0564 bits per weight"
    )
    assert f"warning: {report['target_missed']}\n" in capfd.readouterr().err
    assert json.loads((tmp_path / "out/report.json").read_text())["target_missed"] == report["target_missed"]


def test_training_comes_down_to_the_target_and_is_worth_it(tmp_path, llama, text, trained):
    out, report, losses = trained
    built = build(out, None, BuildOptions(dry_run=True, targets=("cpu",)))
    assert report["bits_per_weight"] == pytest.approx(built.counts.bits_per_weight, abs=1e-4)
    assert TARGET * 0.995 < report["bits_per_weight"] <= TARGET
    one_shot, after = measured(llama)
    compress(llama, tmp_path / "out", calibration=text, target_bpw=TARGET, after_stage=after, **SMALL)
    assert losses["distill"] < 0.9 * one_shot["one-shot"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_mixed_widths_beat_one_at_the_same_bytes(tmp_path, llama, text):
    losses, after = measured(llama)
    uniform = compress(llama, tmp_path / "3", calibration=text, bits=3, sparsity=0.0, after_stage=after, **SMALL)
    of_one = losses.pop("one-shot")
    mixed = compress(
        llama, tmp_path / "m", calibration=text, target_bpw=uniform["bits_per_weight"], after_stage=after, **SMALL
    )
    assert mixed["bits_per_weight"] <= uniform["bits_per_weight"]
    assert losses["one-shot"] < 0.8 * of_one


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, llama, text, trained, monkeypatch):
    monkeypatch.setattr(end_to_end, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(end_to_end, "_SAVE_EVERY", 10)

    class Killed(Exception):
        pass

    for step in (15, 25, 55):  # twice while the budget falls, and after
        real, calls = end_to_end.token_loss, []

        def loss(*args, step=step, real=real, calls=calls):
            calls.append(1)
            if len(calls) == step:
                raise Killed
            return real(*args)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(end_to_end, "token_loss", loss)
            compress(llama, tmp_path / "out", calibration=text, target_bpw=TARGET, **TRAINED)
    with pytest.raises(InputError, match="another target_bpw: 2.6 there, 2.7 now"):
        compress(llama, tmp_path / "out", calibration=text, target_bpw=2.7, **TRAINED)
    measured_again = []
    monkeypatch.setattr(choose_widths, "sampled_gradient", lambda *args: measured_again.append(1))
    compress(llama, tmp_path / "out", calibration=text, target_bpw=TARGET, **TRAINED)
    assert folder_bytes(tmp_path / "out") == folder_bytes(trained[0])
    assert not measured_again  # the last state was saved after the widths had come to stay


def test_sensitivities_are_those_of_the_models_own_tokens():
    """The Fisher diagonal of a softmax over logits W x is known: E[(onehot(y) - p)^2] x^2 = p (1 - p) x^2."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 5, bias=False)

        def forward(self, tokens, use_cache):
            hidden = torch.nn.functional.one_hot(tokens, 8).float() * torch.arange(1.0, 9.0)
            return type("Output", (), {"logits": self.linear(hidden)})

    torch.manual_seed(0)
    model = Head()
    tokens = torch.arange(8).repeat(4000).view(-1, 1)  # samples of one token
    found = fisher_scores(model, ["linear"], tokens, 1, torch.Generator().manual_seed(1))["linear"]
    p = torch.softmax(model.linear.weight.detach() * torch.arange(1.0, 9.0), 0)
    expected = p * (1 - p) * torch.arange(1.0, 9.0).square() / 8
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0.02)


def test_sensitivities_of_a_model_that_is_not_finite_name_the_layer(llama):
    model = load_source(llama).model
    norm = "model.layers.1.post_attention_layernorm"
    model.get_submodule(norm).weight.data[5] = float("inf")
    paths = ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ModelError, match=rf"are not finite for the calibration text, first that of {norm}; is"):
        fisher_scores(model, paths, torch.arange(32).view(2, 16), 64, torch.Generator())


def test_costs_fall_with_the_width_and_grow_with_the_sensitivity():
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    sensitivity = torch.ones(6, 2)
    sensitivity[3] = 10.0
    costs = row_costs({"linear": weight}, {"linear": sensitivity}, (1, 2, 3, 4, 8))["linear"]
    assert (costs[:, 1:] < 0.5 * costs[:, :-1]).all()
    assert costs[3].mean() > 5 * costs[[0, 1, 2, 4, 5]].mean()
    norm = weight.square().sum(1)
    assert ((costs[:, 1] / norm)[[0, 1, 2, 4, 5]] < 0.14).all()  # Lloyd's four equal steps reach 0.119 of a Gaussian


def test_rows_that_change_their_width_begin_near_their_weights():
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    before = torch.tensor([4, 4, 4, 2, 8], dtype=torch.uint8)
    after = torch.tensor([4, 2, 8, 3, 1], dtype=torch.uint8)
    keep = torch.ones(5, 2, dtype=torch.bool)
    linear = GroupLinear.from_quantized(
        quantize(weight, keep, torch.eye(128), torch.ones(128), before, 64, True), None, True
    )
    with torch.no_grad():
        linear.gains.mul_(1.01)
    kept = linear.effective_weight()[0].clone()
    set_widths({"linear": linear}, {"linear": after})
    assert torch.equal(linear.row_bits, after)
    assert torch.equal(linear.effective_weight()[0], kept)
    expected = quantize(weight, keep, torch.eye(128), torch.ones(128), after, 64, True).dequantize()
    torch.testing.assert_close(linear.effective_weight()[1:], expected[1:])
    assert (linear.zeros[2] == 8).all()


def some_linears(count: int) -> dict[str, GroupLinear]:
    """Linears of 4-bit rows, their weights random, of 64 or 128 columns."""
    generator, found = torch.Generator().manual_seed(0), {}
    for number in range(count):
        rows, q_groups = 16 + number, 1 + number % 2
        row_bits = torch.full((rows,), 4, dtype=torch.uint8)
        tensors = torch.full((rows, q_groups), 0.1), torch.full((rows, q_groups), 8.0)
        keep = torch.ones(rows, 4 * q_groups, dtype=torch.bool)
        weight = torch.randn(rows, 64 * q_groups, generator=generator)
        found[f"linear{number}"] = GroupLinear(row_bits, weight, *tensors, keep, None, True)
    return found


@pytest.mark.parametrize("at_once", [1 << 20, 64 * 7])
def test_many_linears_have_the_costs_and_grids_of_each_by_itself(monkeypatch, at_once):
    monkeypatch.setitem(row_costs_module._WEIGHTS_AT_ONCE, "cpu", at_once)
    together, alone = some_linears(5), some_linears(5)
    weights = {path: linear.weight for path, linear in together.items()}
    scores = {path: torch.rand_like(linear.base) for path, linear in together.items()}
    costs = row_costs(weights, scores, (1, 2, 8))
    generator = np.random.default_rng(0)
    widths = {
        path: torch.from_numpy(generator.choice([1, 2, 4, 8], len(weight)).astype(np.uint8))
        for path, weight in weights.items()
    }
    set_widths(together, widths)
    for path, linear in alone.items():
        own = row_costs({path: weights[path]}, {path: scores[path]}, (1, 2, 8))[path]
        torch.testing.assert_close(costs[path], own, rtol=0, atol=0)
        for row, width in enumerate(widths[path].tolist()):
            if width != 4:
                groups = linear.weight[row].detach().view(linear.base.shape[1], 64)
                scales, zeros, _ = best_grid(groups, torch.full((len(groups),), width, dtype=torch.uint8))
                linear.base[row], linear.zeros.data[row] = scales, zeros
        assert torch.equal(together[path].row_bits, widths[path])
        assert torch.equal(together[path].base, linear.base) and torch.equal(together[path].zeros, linear.zeros)


def test_a_choice_of_widths_is_few_kernels_a_linear():
    """On a GPU the choices of a training would otherwise take longer than its steps."""

    class Counted(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    def calls(count: int) -> int:
        linears = some_linears(count)
        scores = {path: torch.ones_like(linear.base) for path, linear in linears.items()}
        widths = {path: torch.full_like(linear.row_bits, 2) for path, linear in linears.items()}
        with Counted() as counted:
            row_costs({path: linear.weight for path, linear in linears.items()}, scores, (1, 2, 3, 4, 8))
            set_widths(linears, widths)
        return counted.calls

    assert (calls(40) - calls(8)) / 32 < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_bpw": 9.5},
            r"the target is 9.5 bits per weight, .* rows of 1, 2, 3, 4, 8 bits .* can have 1.98 to 9.02;",
        ),
        ({"target_bpw": 2.0, "widths": (3, 4)}, r"rows of 3, 4 bits with scales and all, can have 3.98 to 5.00;"),
        ({"target_bpw": 3.0, "bits": 4}, "bits is 4, but a target of bits per weight chooses them row by row"),
        ({"target_bpw": 3.0, "sparsity": 0.5}, "nothing is removed; leave out sparsity and pattern"),
        ({"target_bpw": 3.0, "widths": (2, 5)}, "widths has 5, expected some of 1, 2, 3, 4, 8"),
        ({"target_bpw": 3.0, "quant_group_size": 32}, "the quantisation group size is 32, but rows of different"),
        ({"target_bpw": -1.0}, "target_bpw is -1.0, expected a number above 0"),
        ({"widths": (2, 4)}, "widths are given, but no target"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused(tmp_path, llama, options, message):
    with pytest.raises(InputError, match=message):
        compress(llama, tmp_path / "out", **options, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_no_whole_tiles_are_refused_by_name(tmp_path):
    source = save_model(tmp_path / "source")  # of 96 columns in its down_proj
    with pytest.raises(
        InputError, match=r"model.layers.0.mlp.down_proj has 96 input columns, .* multiple of 64.*--skip"
    ):
        compress(source, tmp_path / "out", target_bpw=3.0, **SMALL)
    report = compress(source, tmp_path / "out", target_bpw=3.0, skip=("down_proj",), **SMALL)
    assert 2.9 < report["bits_per_weight"] <= 3.0


def test_the_command_takes_a_target_and_says_what_it_made(tmp_path, llama):
    arguments = ["compress", str(llama), "-o", str(tmp_path / "out"), "--target-bpw", "3.5", "--widths", "2,4"]
    result = CliRunner().invoke(cli, [*arguments, "--samples", "4", "--seq-len", "32"])
    assert result.exit_code == 0, result.output
    assert "rows of 2 4 bits" in result.stderr and " bits per weight as built" in result.stderr
    assert set(np.concatenate(list(widths_of(tmp_path / "out").values())).tolist()) == {2, 4}


@pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")
def test_a_built_file_scores_the_same_and_shows_its_widths(tmp_path, trained):
    folder, report, _ = trained
    built = CliRunner().invoke(cli, ["build", str(folder), "-o", str(tmp_path / "m.gqsa"), "--target", "cpu"])
    assert built.exit_code == 0, built.output
    model, _ = load_for_evaluation(str(folder))
    ours = perplexity(model, byte_tokenizer().encode(TEXT[:512]).ids, 64).perplexity
    with Model.open(tmp_path / "m.gqsa", device="cpu", threads=1) as engine:
        assert runtime_perplexity(engine, TEXT[:512], 64).perplexity == pytest.approx(ours, rel=5e-3)
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "m.gqsa"), "--json"]).stdout)["linears"]
    assert shown["bits_per_weight"] == pytest.approx(report["bits_per_weight"], abs=1e-4)
    assert bits_per_weight(str(folder)) == pytest.approx(report["bits_per_weight"], abs=1e-4)
    rows = np.concatenate(list(widths_of(folder).values()))
    assert {int(width): share for width, share in shown["row_widths"].items()} == pytest.approx(
        {width: float((rows == width).mean()) for width in set(rows.tolist())}
    )
    inspected = CliRunner().invoke(cli, ["inspect", str(tmp_path / "m.gqsa")]).stdout
    assert "rows of bits: " in inspected and f"quality        KL {report['measured']['kl']:.4f} nats" in inspected
