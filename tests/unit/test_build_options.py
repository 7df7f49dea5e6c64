"""--exact and --head-bits: what they refuse, and the kernels, sizes and facts of the builds that they make."""

import json

import pytest
from gqsa_runtime.inspect_ import describe, render
from gqsa_runtime.program import PHASES
from gqsa_runtime.reader import ArtifactFile

from gqsac.compiler.passes.choose_layouts import LayoutOptions
from gqsac.compiler.pipeline import BuildOptions, build, layout_options
from gqsac.errors import InputError
from gqsac.rounding import Rounding
from tests.format import records_program, tiny
from tests.unit.compress_models import save_model

ROUNDING = Rounding(4, 64, 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of which o_proj, q, k, v, gate and up fit records, and down (96 columns) does not."""
    from gqsac.checkpoint import Checkpoint

    folder = save_model(tmp_path_factory.mktemp("models") / "model", "qwen2")
    assert Checkpoint.open(folder).shape("model.layers.0.mlp.down_proj.weight") == (64, 96)
    return folder


def dry(model, targets=("sm_90", "x86_64_v3"), rounding=Rounding(4, 32, 0.0), **options):
    return build(model, None, BuildOptions(targets=targets, rounding=rounding, dry_run=True, **options))


def ops(summary, family, phase="decode") -> list[str]:
    plan = summary.program.plans[family]
    kernels = {kernel.name: kernel.op for kernel in plan.kernels}
    return [kernels[step.kernel] for step in plan.phases[phase]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (BuildOptions(), LayoutOptions(False, 8)),
        (BuildOptions(head_bits=4), LayoutOptions(False, 4)),
        (BuildOptions(head_bits=16), LayoutOptions(False, 16)),
        (BuildOptions(exact=True), LayoutOptions(True, 16)),
        (BuildOptions(exact=True, head_bits=16), LayoutOptions(True, 16)),
        (BuildOptions(rounding=Rounding(16)), LayoutOptions(False, 16)),
        (BuildOptions(rounding=Rounding(16), head_bits=8), LayoutOptions(False, 8)),
        (BuildOptions(rounding=Rounding(4)), LayoutOptions(False, 8)),
    ],
)
def test_heads_have_8_bits_unless_asked_otherwise(options, expected):
    assert layout_options(None, options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_bits": 3}, "--head-bits is 3; choose from 4, 8, 16"),
        ({"head_bits": 32}, "--head-bits is 32"),
        ({"exact": True, "head_bits": 8}, "--exact keeps heads and embeddings in 16 bits; leave out --head-bits"),
        ({"exact": True, "head_bits": 4}, "--exact keeps heads"),
    ],
)
def test_options_that_exclude_each_other(model, options, message):
    with pytest.raises(InputError, match=message):
        dry(model, **options)


def test_attention_of_a_few_tokens_is_one_kernel_on_cuda_alone(model):
    summary = dry(model)
    for phase in PHASES:
        cuda, cpu = ops(summary, "cuda", phase), ops(summary, "cpu", phase)
        assert (
            cpu.count("kv_append")
            == cpu.count("attention")
            == (2 if phase == "decode" or phase.endswith("_body") else 0)
        )
        assert "append_attention" not in cpu
        assert cuda.count("append_attention") == (2 if phase in ("decode", "few_body") else 0)
        assert cuda.count("kv_append") == cuda.count("attention_halves") == (2 if phase == "prefill_body" else 0)
        assert "attention" not in cuda and "attention_halves" not in cpu


@pytest.mark.parametrize(
    "family, several", [("cuda", ["halves", "matmul_records"]), ("cpu", ["quantize", "linear_records"])]
)
def test_activations_of_several_tokens_are_made_before_each_linear(tmp_path, family, several):
    model = save_model(tmp_path / "model", "llama")
    summary = dry(model, rounding=Rounding(16), head_bits=8)
    for phase in ("decode", "last_logits"):
        assert ops(summary, family, phase)[-2:] == ["linear_records", "choose"]
    assert several[0] not in ops(summary, family) + ops(summary, family, "last_logits")
    assert ops(summary, family, "all_log_probs") == [*several, "log_probs"]
    plan = summary.program.plans[family]
    (maker,) = [kernel for kernel in plan.kernels if kernel.op == several[0]]
    assert maker.params["norm"] == "rms"  # of the norm before the head, which one token's kernel applies itself
    one = next(kernel for kernel in plan.kernels if kernel.op == "linear_records" and kernel.params["tokens"] == 1)
    assert one.params["norm"] == "rms"
    assert any(kernel.op == several[1] and kernel.params["tokens"] > 1 for kernel in plan.kernels)


def test_a_layer_in_records_is_five_launches(tmp_path):
    from tests.e2e.checkpoints import save_checkpoint

    model = save_checkpoint(tmp_path / "model", "llama", intermediate_size=128)
    summary = dry(model, rounding=ROUNDING)
    layer = ["linear_records", "append_attention", *["linear_records"] * 3]
    assert ops(summary, "cuda") == ["embedding_records", *layer, *layer, "linear_records", "choose"]
    assert ops(summary, "cuda", "few_body") == ["embedding_records", *layer, *layer]
    halved = ["halves", "matmul_records"]
    layer = [*halved, "kv_append", "attention_halves", *halved * 3]
    assert ops(summary, "cuda", "prefill_body") == ["embedding_records", *layer, *layer]
    exact = dry(model, rounding=ROUNDING, exact=True)
    assert {op for op in ops(exact, "cuda") if op.startswith(("linear", "embedding"))} == {
        "linear_sparse", "linear_dense", "embedding",
    }  # fmt: skip
    sixteen = dry(model, rounding=ROUNDING, head_bits=16)
    assert ops(sixteen, "cuda")[0] == "embedding" and ops(sixteen, "cuda")[-2] == "linear_dense"
    assert ops(sixteen, "cuda").count("linear_records") == 8


def test_what_the_summary_counts(tmp_path):
    from tests.e2e.checkpoints import save_checkpoint

    model = save_checkpoint(tmp_path / "model", "qwen2", intermediate_size=128)
    whole, masked = (dry(model, rounding=Rounding(4, 64, share)) for share in (0.0, 0.5))
    # Rows of one group keep it; down's, of two, lose one.
    assert whole.counts.sparsity == 0
    assert masked.counts.sparsity == pytest.approx(2 * 64 * 64 / whole.counts.compressed_parameters)
    n_bytes = 0
    for rows, tiles in ((128, 1), (64, 1), (256, 1), (64, 2)):  # q+k+v, o, gate+up, down
        record = 16 + 32 * tiles + 16 + 512 * tiles  # header, scales, zeros, levels
        n_bytes += rows // 16 * record + 2 * 4 * (rows // 16 + 1) + 4 * rows  # starts and blocks, order
    assert whole.counts.compressed_bytes == 2 * n_bytes > masked.counts.compressed_bytes
    heads = {bits: dry(model, rounding=ROUNDING, head_bits=bits).counts for bits in (4, 8, 16)}
    assert heads[4].weight_bytes < heads[8].weight_bytes < heads[16].weight_bytes
    assert len({(counts.compressed_bytes, counts.parameters) for counts in heads.values()}) == 1
    # Embedding and head, each: a byte a weight; of each 16 rows a header, scales and zeros; starts, blocks and order.
    table = 256 * 64 + 256 // 16 * (16 + 32 + 16) + 2 * 4 * (256 // 16 + 1) + 4 * 256
    assert heads[16].weight_bytes - heads[8].weight_bytes == 2 * (2 * 256 * 64 - table)


def test_inspect_tells_sparsity_where_sizes_do(tmp_path):
    path = tmp_path / "records.gqsa"
    path.write_bytes(tiny.file_bytes(records_program.program(), records_program.tensors()))
    with ArtifactFile.open(path) as file:
        facts = describe(file)
    n_bytes = sum(records_program.SOURCES[name][1].n_bytes for name in ("gate", "bare"))
    n_weights = 72 * 320 + records_program.BARE_ROWS * records_program.BARE_K
    assert facts["linears"] == {  # neither the table nor the head, which are rounded to 8 bits
        "weights": n_weights, "bytes": n_bytes, "bits_per_weight": 8 * n_bytes / n_weights, "sparsity": None,
        "row_widths": None,
    }  # fmt: skip
    assert "bits per weight" in render(facts) and "of groups removed" not in render(facts)
    assert json.loads(json.dumps(facts)) == facts
    with ArtifactFile.open(path) as file:
        assert facts["dense_bytes"] == sum(
            info.size for name, info in file.tensors.items() if name.startswith(("embed.", "norm"))
        )
