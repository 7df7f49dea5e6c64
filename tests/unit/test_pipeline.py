"""The small decisions of the pipeline: targets, what may be stacked, how far the context reaches."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from gqsa_runtime.tokenizer import Tokenizer

from gqsac.checkpoint import StreamHeader
from gqsac.compiler import ir
from gqsac.compiler.passes import compile_cpu
from gqsac.compiler.passes.choose_layouts import LayoutOptions, Weights
from gqsac.compiler.passes.compile import CPU_TARGETS, CUDA_TARGETS, check_targets, default_targets, families
from gqsac.compiler.pipeline import BuildOptions, build, can_stack, compiler_identity, limit_context
from gqsac.compiler.plan_family import PREFILL_CHUNK
from gqsac.errors import InputError
from gqsac.model_info import tokenizer_json
from gqsac.rounding import Rounding
from tests.format import tiny


@pytest.mark.parametrize(
    "machine, cpu",
    [
        ("x86_64", ("x86_64_v3", "x86_64_v3_vnni", "x86_64_v4", "x86_64_v4_vnni")),
        ("aarch64", ("aarch64", "aarch64_dotprod")),
        ("riscv64", ()),
    ],
)
def test_default_targets_follow_the_machine(monkeypatch, machine, cpu):
    monkeypatch.setattr(compile_cpu.platform, "machine", lambda: machine)
    assert default_targets() == CUDA_TARGETS + cpu
    assert check_targets(("cpu", "sm_90")) == ("sm_90", *cpu)


def test_targets_come_once_and_in_canonical_order():
    assert check_targets(("aarch64", "sm_90", "compute_80", "sm_80", "sm_90")) == (
        "sm_80",
        "sm_90",
        "compute_80",
        "aarch64",
    )
    assert check_targets(("cuda",)) == CUDA_TARGETS
    assert check_targets(("cuda", *CPU_TARGETS)) == CUDA_TARGETS + CPU_TARGETS


@pytest.mark.parametrize("name", ["sm_99", "SM_90", "", "gpu", "compute_90", "sm_90 "])
def test_unknown_targets_are_named(name):
    with pytest.raises(InputError, match=f"unknown target '{name}'; choose from cpu, cuda, sm_80"):
        check_targets(("sm_90", name))


def test_families():
    assert families(("sm_80", "compute_80", "aarch64")) == ("cuda", "cpu")
    assert families(("x86_64_v3",)) == ("cpu",)


def test_only_linears_of_one_layout_are_stacked():
    headers = {
        "a": (StreamHeader(8, 64, 16, 4, 10),),
        "b": (StreamHeader(4, 64, 16, 4, 3),),
        "eight": (StreamHeader(8, 64, 16, 8, 10),),
        "wide": (StreamHeader(8, 64, 32, 4, 10),),
        "both": (StreamHeader(8, 64, 16, 4, 10), StreamHeader(8, 64, 16, 8, 10)),
        "turned": (StreamHeader(8, 64, 16, 8, 10), StreamHeader(8, 64, 16, 4, 10)),
    }
    checkpoint = SimpleNamespace(is_compressed=lambda name: name in headers, stream_headers=lambda name: headers[name])
    graph = SimpleNamespace(aliases={"alias.weight": "a.weight"}, ops=(), logits="logits")

    def stacks(*names):
        return can_stack(
            Weights(graph, checkpoint, LayoutOptions(exact=True)), tuple(f"{name}.weight" for name in names)
        )

    assert stacks("a", "b") and stacks("a", "b", "alias") and stacks("dense", "other") and stacks("both", "both")
    assert not any(stacks("a", other) for other in ("eight", "wide", "both", "dense"))
    assert not stacks("both", "turned") and not stacks("dense", "a") and not stacks("a", "b", "eight")


def graph(max_context: int) -> ir.Graph:
    return ir.Graph("X", (), "logits", 10, max_context)


def test_the_context_can_be_limited_only():
    assert limit_context(graph(100), None).max_context == 100
    assert limit_context(graph(100), 100).max_context == 100
    assert limit_context(graph(100), 1).max_context == 1
    for wrong in (0, -1, 101):
        with pytest.raises(InputError, match=f"--max-context is {wrong}; this model's positions allow 1 to 100"):
            limit_context(graph(100), wrong)


def test_the_file_says_what_made_it():
    options = BuildOptions(kv_dtype="f32", rounding=Rounding(4, 16, 0.5))
    identity = compiler_identity(("sm_90",), options)
    assert identity["zig"] is None and identity["nvrtc"].startswith("12.") and identity["targets"] == ["sm_90"]
    assert identity["kv_dtype"] == "f32" and identity["rounding"] == {"bits": 4, "group_size": 16, "sparsity": 0.5}
    identity = compiler_identity(("x86_64_v3",), BuildOptions())
    assert identity["nvrtc"] is None and identity["zig"].startswith("zig ") and identity["rounding"] is None


def test_options_are_checked_before_the_model(tmp_path):
    for options, message in (
        (BuildOptions(kv_dtype="f64"), "unknown KV cache type 'f64'; choose from f16, f32, int8"),
        (BuildOptions(targets=("sm_99",)), "unknown target 'sm_99'"),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path / "no-model", tmp_path / "out.gqsa", options)
    with pytest.raises(InputError, match="which is a folder"):
        build(tmp_path / "no-model", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_of_a_dry_run_is_told(tmp_path, monkeypatch):
    from tests.unit.compress_models import save_model

    stages = []
    options = BuildOptions(rounding=Rounding(), dry_run=True, max_context=20, targets=("aarch64",))
    summary = build(save_model(tmp_path / "model"), None, options, lambda *told: stages.append(told))
    assert stages == [("trace", 0, 1), ("trace", 1, 1)]
    assert summary.file_bytes is None and summary.program.max_context == 20
    assert summary.program.plans["cpu"].prefill_chunk == PREFILL_CHUNK["cpu"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_is_stored_without_white_space():
    said = tiny.tokenizer_json()
    text = json.dumps(json.loads(said), indent=2)  # with escapes for what is no ASCII
    checkpoint = SimpleNamespace(tokenizer_json=lambda: text, config={"vocab_size": tiny.VOCAB}, path=Path("model"))
    made = tokenizer_json(checkpoint)
    assert json.loads(made) == json.loads(said) and len(made) < len(text) / 2 and "Ġ" in made
    assert Tokenizer(made).encode("a déjà vu <s>") == Tokenizer(text).encode("a déjà vu <s>")
