"""Tracing leaves no traces: neither in the config, nor in transformers, nor in memory."""

import copy
import resource

import pytest
import torch
import transformers
from gqsa_runtime.errors import UnsupportedError
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama import modeling_llama

from gqsac.compiler import opaque
from gqsac.compiler.passes.fuse import fuse
from gqsac.compiler.passes.legalize import legalize
from gqsac.compiler.passes.trace import trace
from tests.compiler.tiny import COMPILED, config


def test_patches_are_undone_even_after_a_refusal():
    before = (
        modeling_llama.apply_rotary_pos_emb,
        modeling_llama.LlamaRMSNorm.forward,
        transformers.masking_utils.find_packed_sequence_indices,
        torch.nn.Module.register_parameter,
        torch.nn.init.normal_,
    )
    trace(COMPILED["llama-1-multi-head"])
    with pytest.raises(UnsupportedError):
        trace(config("cohere"))
    after = (
        modeling_llama.apply_rotary_pos_emb,
        modeling_llama.LlamaRMSNorm.forward,
        transformers.masking_utils.find_packed_sequence_indices,
        torch.nn.Module.register_parameter,
        torch.nn.init.normal_,
    )
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert opaque.ATTENTION not in AttentionInterface._global_mapping
    assert opaque.ATTENTION not in AttentionMaskInterface._global_mapping


def test_config_is_left_alone():
    fields = {**COMPILED["llama-3.1"], "quantization_config": {"quant_method": "gqsa", "bits": 4}, "dtype": "float16"}
    before = copy.deepcopy(fields)
    trace(fields)
    assert fields == before
    settings = AutoConfig.for_model(**COMPILED["qwen2"])
    before = settings.to_dict()
    trace(settings)
    assert settings.to_dict() == before


def test_dict_and_config_object_give_the_same_graph():
    fields = COMPILED["llama-3.1"]
    assert legalize(trace(fields)) == legalize(trace(AutoConfig.for_model(**fields)))


def test_tracing_twice_gives_the_same_graph():
    assert legalize(trace(COMPILED["gemma3"])) == legalize(trace(COMPILED["gemma3"]))


def test_tied_weights_become_aliases():
    assert trace(COMPILED["llama-3.2-tied"]).aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert trace(COMPILED["llama-3"]).aliases == {}
    assert trace(COMPILED["opt"]).aliases == {"lm_head.weight": "model.decoder.embed_tokens.weight"}


@pytest.mark.parametrize("name", ["llama-3", "llama-3.1", "llama-linear-rope", "llama-yarn-rope"])
def test_rope_table_is_that_of_the_model(name):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**COMPILED[name]))
    (table,) = trace(COMPILED[name]).ropes.values()
    assert torch.equal(torch.tensor(table.inv_freq), model.model.rotary_emb.inv_freq)
    assert table.scaling == pytest.approx(model.model.rotary_emb.attention_scaling)
    assert (table.scaling != 1.0) == (name == "llama-yarn-rope")


def test_dynamic_scaling_begins_beyond_the_context():
    assert trace(COMPILED["llama-dynamic-rope"]).ropes == trace(config("llama")).ropes


@pytest.mark.parametrize("original", [2, 16, 40, 63])
def test_longrope_has_two_tables(original):
    fields = {**COMPILED["phi3-longrope"], "original_max_position_embeddings": original}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    rotary = model.model.rotary_emb
    (table,) = trace(fields).ropes.values()
    assert table.original_context == original
    for length, inv_freq in ((original, table.inv_freq), (original + 1, table.long_inv_freq)):
        rotary(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(torch.tensor(inv_freq), rotary.inv_freq)


def test_a_rope_that_changes_at_every_length_is_refused(monkeypatch):
    def forward(self, x, position_ids, layer_type=None):
        self.inv_freq /= 1 + position_ids.max() // 8
        angles = (position_ids[..., None] * self.inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", forward)
    with pytest.raises(UnsupportedError, match="depend on the length of the sequence otherwise than by changing once"):
        trace(config("llama"))


def test_rope_parameters_of_transformers_5_configs_are_read():
    new = config("llama", rope_parameters={"rope_theta": 250000.0, "rope_type": "default"})
    old = config("llama", rope_theta=250000.0)
    assert trace(new).ropes == trace(old).ropes != trace(config("llama")).ropes


def test_layers_keep_their_own_window_and_rope():
    graph = legalize(trace(COMPILED["gemma3"]))
    attentions = [op for op in graph.ops if type(op).__name__ == "Attention"]
    assert [op.window for op in attentions] == [5, 5, 0]
    assert attentions[0].rope == attentions[1].rope != attentions[2].rope
    assert graph.ropes[attentions[0].rope].inv_freq != graph.ropes[attentions[2].rope].inv_freq
    assert [op.layer for op in attentions] == [0, 1, 2]


def test_a_window_as_long_as_the_context_is_none():
    graph = legalize(trace(config("mistral", sliding_window=64)))
    assert {op.window for op in graph.ops if type(op).__name__ == "Attention"} == {0}


def test_llama_7b_is_traced_without_weights():
    fields = config(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = fuse(legalize(trace(fields)), lambda names: True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 500_000  # KiB; the weights are 27 GB
    assert sum(type(op).__name__ == "Attention" for op in graph.ops) == 32
    assert graph.vocab_size == 32000
    assert graph.max_context == 4096
