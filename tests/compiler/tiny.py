"""Tiny configs of many architectures: two layers, 64 wide, as a config.json would hold them."""

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Sequences of more than 16 tokens have the long factors.
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
}

_OPT = {
    "model_type": "opt",
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
}


def config(model_type: str, **changes) -> dict:
    return {"model_type": model_type, **_BASE, **changes}


# Name -> config of a model that compiles.
COMPILED = {
    "llama-1-multi-head": config("llama", num_key_value_heads=4, tie_word_embeddings=False),
    "llama-2-grouped": config("llama", tie_word_embeddings=False),
    "llama-3": config("llama", rope_theta=500000.0, head_dim=32, tie_word_embeddings=False),
    "llama-3.1": config("llama", rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE, tie_word_embeddings=False),
    "llama-3.2-tied": config("llama", rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biases": config("llama", attention_bias=True, mlp_bias=True),
    "llama-linear-rope": config("llama", rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama-yarn-rope": config("llama", rope_scaling=_YARN_ROPE),
    "llama-dynamic-rope": config("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "qwen2": config("qwen2", tie_word_embeddings=True),
    "qwen2-untied": config("qwen2", tie_word_embeddings=False),
    "qwen2-sliding": config("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": config("qwen3", head_dim=32),
    "opt": _OPT,
    "opt-untied-projected": {**_OPT, "word_embed_proj_dim": 32, "tie_word_embeddings": False},
    "opt-norm-after": {**_OPT, "do_layer_norm_before": False, "activation_function": "gelu"},
    "mistral": config("mistral", sliding_window=None),
    "mistral-sliding": config("mistral", sliding_window=5),
    "phi": config("phi", partial_rotary_factor=0.5, num_key_value_heads=4),
    "phi3": config("phi3", sliding_window=None),
    "phi3-longrope": config("phi3", sliding_window=None, rope_scaling=_LONGROPE, original_max_position_embeddings=16),
    "gemma": config("gemma", head_dim=32),
    "gemma3": config(
        "gemma3_text",
        head_dim=32,
        num_hidden_layers=3,
        sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "olmo2": config("olmo2"),
    "stablelm": config("stablelm", partial_rotary_factor=0.25),
    "smollm3": config("smollm3", no_rope_layers=[1, 0]),
    "granite": config(
        "granite", embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.1
    ),
    "gemma2-uncapped": config(
        "gemma2", head_dim=32, sliding_window=5, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "olmo3": config("olmo3", num_hidden_layers=4, sliding_window=5),
    "exaone4": config("exaone4", sliding_window=5, sliding_window_pattern=2),
    "seed_oss": config("seed_oss", head_dim=32),
    "biogpt": config("biogpt", hidden_act="gelu"),
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        "vocab_size": 101,
    },
    "starcoder2": config("starcoder2", sliding_window=None),
}
