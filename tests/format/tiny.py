"""A tiny sound program, its tensors and its file: one layer, a byte tokenizer, every operator kind that matters."""

import dataclasses
import hashlib
import json

import numpy as np
from gqsa_runtime import machine_code
from gqsa_runtime.format import FORMAT_VERSION
from gqsa_runtime.operators import CHOOSE_PARTIAL, state_elements
from gqsa_runtime.program import Argument, Binary, Buffer, Kernel, KVLayer, Launch, Plan, Program, Rope, Step
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.format import gguf_bytes

WIDTH, CHUNK, CONTEXT, GROUP, ROWS = 32, 4, 32, 16, 32
BOS, EOS = 256, 257
CODE = bytes(range(100))
VOCAB = 258
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_json() -> str:
    """One token per byte, and two special ones."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str()


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    columns = np.array([0, 1, 0, 1], np.uint32)
    words = np.float16(0.5).view(np.uint16).astype(np.uint32) | columns << 16 | np.uint32(8) << 28
    crow = np.zeros(ROWS + 1, np.int32)
    crow[1:3] = 2
    crow[3:] = 4
    return {
        "embed": random.normal(size=(VOCAB, WIDTH)).astype(np.float16),
        "norm": np.ones(WIDTH, np.float32),
        "inv_freq": np.array([1.0, 0.1], np.float32),
        "q.values": random.integers(-128, 127, (4, GROUP // 2)).astype(np.int8),
        "q.groups": words.view(np.int32),
        "q.crow_indices": crow,
        "q.tasks": np.array([0, 5, ROWS], np.int32),
        "binary.cpu": packed(CODE),
    }


def packed(code: bytes) -> np.ndarray:
    """Machine code as a file holds it."""
    return np.frombuffer(machine_code.pack(code), np.int8)


def binary(target: str, kind: str, kernels: dict, tensor: str = "binary.cpu", code: bytes | None = None) -> Binary:
    """Of code whose bytes mean nothing."""
    code = CODE if code is None else code
    return Binary(target, kind, tensor, len(code), hashlib.sha256(code).hexdigest(), kernels)


def _kernels(suffix: str, tokens: int) -> list[Kernel]:
    heads = {"heads": 2, "kv_heads": 1, "head_dim": 16, "kv_dtype": "f32"}
    linear = {"tokens": tokens, "rows": ROWS, "k": WIDTH, "x_stride": WIDTH, "out_stride": ROWS, "bias": False,
              "activation": "none", "residual": False, "residual_stride": 0}  # fmt: skip
    params = {
        "embedding": {"width": WIDTH, "vocab": VOCAB, "source": "tokens", "position_offset": 0, "scale": 1.0,
                      "out_stride": WIDTH},
        "rms_norm": {"width": WIDTH, "heads": 1, "eps": 1e-5, "x_stride": WIDTH, "out_stride": WIDTH},
        "linear_sparse": {**linear, "group_size": GROUP, "bits": 4, "n_tasks": 2, "accumulate": False},
        "kv_append": {**heads, "window": 0, "rotary_dim": 4, "q_stride": ROWS, "k_stride": ROWS, "v_stride": ROWS},
        "attention": {**heads, "scale": 0.25, "window": 0, "q_stride": ROWS, "out_stride": ROWS},
        "linear_dense": {**linear, "rows": VOCAB, "k": ROWS, "x_stride": ROWS, "out_stride": VOCAB},
    }  # fmt: skip
    return [Kernel(f"{op}_{suffix}", op, {"tokens": tokens, **p}, {}) for op, p in params.items()]


def plan(**changes) -> Plan:
    """The plan of CPU targets."""
    kernels = [*_kernels("t1", 1), *_kernels("t8", 8)]
    kernels += [
        Kernel("last_row", "last_row", {"width": ROWS, "x_stride": ROWS}, {}),
        Kernel("choose", "choose", {"vocab": VOCAB}, {}),
        Kernel("log_probs", "log_probs", {"tokens": 8, "vocab": VOCAB, "x_stride": VOCAB}, {}),
    ]
    sizes = [("tokens", "i32", CHUNK), ("targets", "i32", CHUNK), ("state", "i32", state_elements(CHUNK)),
             ("logits", "f32", CHUNK * VOCAB),
             ("log_probs", "f32", CHUNK), ("argmax", "i32", CHUNK), ("last", "f32", ROWS), ("x", "f32", CHUNK * WIDTH),
             ("q", "f32", CHUNK * ROWS), ("y", "f32", CHUNK * ROWS), ("partials", "i32", CHOOSE_PARTIAL),
             ("counters", "i32", 1)]  # fmt: skip
    buffers, offset = [], 0
    for name, dtype, elements in sizes:
        buffers.append(Buffer(name, dtype, elements, offset))
        offset += -(-4 * elements // 64) * 64

    def step(kernel: str, *args) -> Step:
        made = [Argument(*arg) if isinstance(arg, tuple) else Argument("buffer", arg) for arg in args]
        return Step(kernel, (*made, Argument("buffer", "state")))

    def body(suffix: str) -> list[Step]:
        stream = [("tensor", f"q.{part}") for part in ("values", "groups", "crow_indices", "tasks")]
        caches = [("k_cache", 0), ("v_cache", 0)]
        return [
            step(f"embedding_{suffix}", "tokens", ("tensor", "embed"), "x"),
            step(f"rms_norm_{suffix}", "x", ("tensor", "norm"), "x"),
            step(f"linear_sparse_{suffix}", "x", *stream, ("null",), ("null",), "q"),
            step(f"kv_append_{suffix}", "q", "x", ("buffer", "x", 16), ("rope", "main"), *caches),
            step(f"attention_{suffix}", "q", *caches, "y"),
        ]

    def head(suffix: str, hidden: str) -> Step:
        return step(f"linear_dense_{suffix}", hidden, ("tensor", "embed"), ("null",), ("null",), "logits")

    choice = step("choose", "logits", "partials", "counters", "argmax")
    last, scores = step("last_row", "y", "last"), step("log_probs", "logits", "targets", "log_probs", "argmax")
    fields = {
        "prefill_chunk": CHUNK, "score_chunk": CHUNK,
        "buffers": tuple(buffers), "arena_bytes": offset, "kernels": tuple(kernels),
        "phases": {
            "decode": (*body("t1"), head("t1", "y"), choice),
            "prefill_body": tuple(body("t8")),
            "few_body": tuple(body("t8")),
            "last_logits": (last, head("t1", "last"), choice),
            "all_log_probs": (head("t8", "y"), scores),
        },
    }  # fmt: skip
    return Plan(**{**fields, **changes})


def cuda_plan(**changes) -> Plan:
    """The same plan with launches, as CUDA targets need them."""
    made = plan()
    kernels = tuple(dataclasses.replace(kernel, launches={"": Launch((1, 1, 1), 128, 0)}) for kernel in made.kernels)
    return dataclasses.replace(made, **{"kernels": kernels, **changes})


def program(**changes) -> Program:
    fields = {
        "name": "tiny", "model_class": "TinyForCausalLM", "vocab_size": VOCAB, "max_context": CONTEXT,
        "bos_token_id": BOS, "eos_token_ids": (EOS,), "kv_dtype": "f32",
        "kv_layers": (KVLayer(1, 16),), "ropes": {"main": Rope("inv_freq", 4, 1.0)}, "plans": {"cpu": plan()},
        "binaries": (binary("x86_64_v3", "shared_object", {"": (0, 100)}),),
    }  # fmt: skip
    return Program(**{**fields, **changes})


def metadata(made: Program | None = None, **changes) -> dict:
    pairs = {
        "general.architecture": "gqsa",
        "general.alignment": 64,
        "general.name": "tiny",
        "gqsa.format_version": FORMAT_VERSION,
        "gqsa.compiler": json.dumps({"gqsac": "test"}),
        "gqsa.program": (made or program()).to_json(),
        "tokenizer.huggingface.json": tokenizer_json(),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    return {key: item for key, item in {**pairs, **changes}.items() if item is not None}


def file_bytes(made: Program | None = None, arrays: dict | None = None, **changes) -> bytes:
    """A sound file, but for what is asked to be different."""
    return gguf_bytes.gguf(metadata(made, **changes), tensors() if arrays is None else arrays)
