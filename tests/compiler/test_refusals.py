"""What cannot be compiled is refused in one clear sentence, never compiled into something else."""

import pytest
from gqsa_runtime.errors import ModelError, UnsupportedError

from gqsac.compiler.passes.legalize import legalize
from gqsac.compiler.passes.trace import trace
from tests.compiler.tiny import config

# Name -> config, words that the message must hold.
UNSUPPORTED = {
    "own-attention-bloom": (config("bloom", n_head=4, n_layer=2), "BloomForCausalLM has 2 layers .* 0 times"),
    "own-attention-falcon": (config("falcon"), "falcon chooses among attention classes of its own"),
    # Which of its two obstacles is met first depends on the release of transformers.
    "own-attention-gptj": (
        config("gptj", n_embd=64, n_head=4, n_layer=2, rotary_dim=8),
        "gptj chooses among|modeling_gptj rotates queries and keys otherwise than by halves",
    ),
    "conv1d-gpt2": (
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 64},
        "GPT2LMHeadModel: operator aten.addmm .*transposed weight.* in transformer.h.0.attn.c_attn",
    ),
    "interleaved-qkv-gpt-neox": (config("gpt_neox"), "GPTNeoXForCausalLM: .*interleaved.* gpt_neox.layers.0.attention"),
    "softcap-gemma2": (config("gemma2", head_dim=32), "Gemma2Attention of layer 0 needs attention with 'softcap'"),
    "final-softcap-gemma2": (
        config("gemma2", head_dim=32, attn_logit_softcapping=None),
        "Gemma2ForCausalLM: operator aten.tanh in its outermost module",
    ),
    "experts-mixtral": (config("mixtral"), "mixtral is a mixture of experts"),
    "experts-gpt-oss": (config("gpt_oss"), "gpt_oss is a mixture of experts"),
    "interleaved-rope-cohere": (config("cohere"), "CohereRotaryEmbedding does not make cos and sin"),
    "interleaved-rope-glm": (config("glm", head_dim=16), "modeling_glm rotates queries and keys otherwise"),
    "norm-after-rope": (
        config("hunyuan_v1_dense", head_dim=16),
        "gqsa.rms_norm with rotated queries or keys .* in model.layers.0.self_attn.query_layernorm",
    ),
    "norm-without-weights": (config("olmo"), "OlmoForCausalLM: .* without weights in model.layers.0.input_layernorm"),
    "unknown-operator": (config("apertus"), "ApertusForCausalLM: operator aten.softplus in model.layers.0.mlp.act_fn"),
    # Before transformers 5, bert has its own attention classes, too.
    "not-causal-bert": (config("bert"), "BertLMHeadModel: its attention mask is neither causal|bert chooses among"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_model_is_refused(name):
    fields, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedError, match=message):
        legalize(trace(fields))


BROKEN = {
    "no-model-type": ({"hidden_size": 64}, "no model_type"),
    "unknown-model-type": (config("no-such-model"), "knows no model_type 'no-such-model'"),
    "not-a-language-model": ({"model_type": "t5"}, "no causal language model of the architecture 't5'"),
    "no-heads": (config("llama", num_attention_heads=0), "the llama config is broken"),
    "text-for-a-number": (config("llama", hidden_size="wide"), "the llama config is broken"),
    "unknown-activation": (config("llama", hidden_act="no-such"), "the llama config is broken.*no-such"),
    "no-layers": (config("llama", num_hidden_layers=0), "no num_hidden_layers"),
    "a-million-layers": (
        config("llama", num_hidden_layers=10**6),
        "num_hidden_layers.* is 1000000, expected 1 to",
    ),
    "endless-context": (config("llama", max_position_embeddings=2**40), "max_position_embeddings.* is 1099511627776"),
    "uneven-heads": (config("llama", num_key_value_heads=3), "4 attention heads cannot share 3 key/value heads"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_config_is_one_sentence(name):
    fields, message = BROKEN[name]
    with pytest.raises(ModelError, match=message) as caught:
        legalize(trace(fields))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
