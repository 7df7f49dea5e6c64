"""The IR, before and after fusing, computes the logits that transformers computes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gqsac.compiler import ir
from gqsac.compiler.passes import fuse as fusions
from gqsac.compiler.passes.legalize import legalize
from gqsac.compiler.passes.trace import trace
from tests.compiler.interpreter import interpret
from tests.compiler.tiny import COMPILED

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"


def random_model(fields: dict) -> torch.nn.Module:
    """A model whose every parameter is random: norms of ones and biases of zeros would hide mistakes."""
    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        spread = 0.5 if parameter.dim() == 1 else 2.0 / parameter.shape[-1] ** 0.5
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1.0
    return model


def stored_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())  # without the duplicates of tied weights


@torch.no_grad()
def expected_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None]).logits[0]


def launches(graph: ir.Graph) -> int:
    return sum(not isinstance(op, ir.Slice) for op in graph.ops)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    # In parts of the logits' spread, since random weights make logits of any size.
    error = (got - expected).abs().max() / expected.std()
    assert error < 1e-4, f"logits differ by {error:.2e} of their standard deviation"


@pytest.mark.parametrize(
    "name, op_type, change",
    [
        ("qwen2-sliding", ir.Attention, {"window": 6}),
        ("llama-3.1", ir.Attention, {"rope": None}),
        ("llama-2-grouped", ir.Attention, {"scale": 0.26}),
        ("gemma", ir.RMSNorm, {"weight_offset": 0.0}),
        ("opt", ir.Embedding, {"position_offset": 1}),
        ("phi", ir.Linear, {"activation": "none"}),
    ],
)
def test_the_comparison_notices_a_wrong_graph(name, op_type, change):
    model = random_model(COMPILED[name])
    tokens = torch.randint(0, 100, (24,), generator=torch.Generator().manual_seed(2))
    graph = fusions.fuse(legalize(trace(COMPILED[name])), lambda names: True)
    ops = tuple(replace(op, **change) if isinstance(op, op_type) else op for op in graph.ops)
    with pytest.raises(AssertionError, match="logits differ"):
        wrong = interpret(replace(graph, ops=ops), stored_weights(model), tokens)
        assert_close(wrong, expected_logits(model, tokens))


@pytest.mark.parametrize("name", COMPILED)
def test_logits_match_before_and_after_each_fusion(name):
    if name == "stablelm" and transformers.__version__ < "5":
        pytest.skip("stablelm goes through transformers' attention interface since version 5")
    model = random_model(COMPILED[name])
    tokens = torch.randint(0, 101, (24,), generator=torch.Generator().manual_seed(2))
    expected = expected_logits(model, tokens)
    weights = stored_weights(model)

    graph = legalize(trace(COMPILED[name]))
    ir.verify(graph)
    assert_close(interpret(graph, weights, tokens), expected)

    traced = graph
    for fusion in (
        fusions.fuse_gated_activations,
        lambda graph: fusions.stack_siblings(graph, lambda names: True),
        fusions.fuse_activations,
        fusions.fuse_residuals,
        fusions.remove_dead,
    ):
        graph = fusion(graph)
        ir.verify(graph)
        assert_close(interpret(graph, weights, tokens), expected)
    assert launches(graph) < launches(traced)
    assert graph == fusions.fuse(traced, lambda names: True)


@pytest.mark.parametrize("folder", ["qwen2-novels", "opt-novels"])
def test_trained_models_match(folder):
    folder = MODELS / folder
    if not folder.is_dir():
        pytest.skip(f"no {folder.name} beside the checkout")
    config = json.loads((folder / "config.json").read_text())
    graph = fusions.fuse(legalize(trace(config)), lambda names: True)
    ir.verify(graph)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, graph.vocab_size, (64,), generator=torch.Generator().manual_seed(3))
    weights = load_file(folder / "model.safetensors")
    assert_close(interpret(graph, weights, tokens), expected_logits(model, tokens))
