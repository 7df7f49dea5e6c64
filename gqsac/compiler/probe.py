"""Probes: find out what a module computes by running it on numbers, not by reading its name.

All arithmetic is f32 on the CPU, on a few values; a probe that does not apply answers None or "none".
"""

import bisect
import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gqsac.compiler.ir import RopeTable

# Rope types whose frequencies are the same at every length that the model is made for, or change once (longrope). Those
# of "dynamic" change only beyond max_position_embeddings.
ROPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def as_rms_norm(module: nn.Module) -> tuple[float, float] | None:
    """(eps, weight_offset) if a module computes x / sqrt(mean(x^2) + eps) * (weight + weight_offset)."""
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or _has_inside(module):
        return None
    generator = torch.Generator().manual_seed(0)
    width = parameters["weight"].shape[0]
    weight = 0.5 + torch.rand(width, generator=generator)
    # Small rows are there for eps: at 1e-3, mean(x^2) is about as large as it.
    x = torch.randn(2, 2, width, generator=generator) * torch.tensor([[[1.0]], [[1e-3]]])
    clone = copy.copy(module)
    clone._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    got = _run(lambda: clone.forward(x))
    if got is None or got.shape != x.shape:
        return None
    candidates = {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2}
    for eps in sorted(candidates | {torch.finfo(torch.float32).eps}):
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            if torch.allclose(got, normal * (weight + offset), rtol=1e-4, atol=1e-6):
                return eps, offset
    return None


def as_activation(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The function of ACTIVATIONS that a module without parameters computes."""
    if next(module.parameters(), None) is not None or _has_inside(module):
        return None
    x = torch.linspace(-8, 8, 257)
    got = _run(lambda: module.forward(x.clone()))
    if got is None or got.shape != x.shape:
        return None
    for function in ACTIVATIONS.values():
        if torch.allclose(got, function(x), rtol=1e-5, atol=2e-6):
            return function
    return None


def is_rotary(module: nn.Module) -> bool:
    """Whether a module makes the cos and sin of a rotary embedding from position ids."""
    names = list(inspect.signature(type(module).forward).parameters)
    return names[1:3] == ["x", "position_ids"] and any(name.endswith("inv_freq") for name, _ in module.named_buffers())


def rope_tables(module: nn.Module) -> dict[str, RopeTable | str]:
    """The tables of a rotary module, one for each buffer of inverse frequencies, by the buffer's name.

    A sentence stands in the place of a table that cannot be compiled.
    """
    tables: dict[str, RopeTable | str] = {}
    for name, _ in module.named_buffers(recurse=False):
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            tables[name] = _rope_table(module, name.removesuffix("inv_freq"))
    return tables


def _rope_table(module: nn.Module, prefix: str) -> RopeTable | str:
    layer_type = prefix.rstrip("_") or None
    rope_type = getattr(module, "rope_type", "default")
    if isinstance(rope_type, dict):
        rope_type = rope_type[layer_type]
    where = f"rotary embedding of type {rope_type!r} in {type(module).__name__}"
    if rope_type not in ROPES:
        return f"{where}: only {', '.join(ROPES)} can be compiled"
    longest = int(getattr(module, "max_seq_len_cached", 1000))
    short, long = (_rope_met(module, prefix, layer_type, length) for length in (1, longest))
    if short is None or long is None:
        return (
            f"{type(module).__name__} does not make cos and sin of position * inv_freq, both halves alike; "
            "only that form of rotary position embedding can be compiled"
        )
    if short == long:
        return short
    original = 1 + bisect.bisect_left(
        range(2, longest), True, key=lambda length: _rope_met(module, prefix, layer_type, length) != short
    )
    changes_once = all(
        _rope_met(module, prefix, layer_type, length) == (short if length <= original else long)
        for length in {original, original + 1, (1 + original) // 2, (original + longest) // 2}
    )
    if not changes_once or short.scaling != long.scaling:
        return f"{where}: its frequencies depend on the length of the sequence otherwise than by changing once"
    return replace(short, long_inv_freq=long.inv_freq, original_context=original)


def _rope_met(module: nn.Module, prefix: str, layer_type: str | None, length: int) -> RopeTable | None:
    """The table of a rotary module that meets a sequence of `length` tokens, None where that is not of our form."""
    module = copy.deepcopy(module)  # it may keep what it has met
    positions = torch.tensor([[0, length // 3, length // 2, length - 1]])
    extra = {} if layer_type is None else {"layer_type": layer_type}
    got = _run(lambda: module.forward(torch.zeros(1, 4, 1), positions, **extra))
    inv_freq = getattr(module, f"{prefix}inv_freq")
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    expected = torch.ops.gqsa.rope_table(positions, inv_freq, scaling, "")
    return RopeTable(tuple(inv_freq.float().tolist()), scaling) if _alike(got, expected, 1e-5) else None


def rotation_form(function: Callable) -> str:
    """What an `apply_rotary_pos_emb(q, k, cos, sin)` does: "full" rotates whole heads by halves,
    "partial" also passes on what lies beyond cos's width, "none" is anything else."""
    if not {"q", "k", "cos", "sin"} <= set(inspect.signature(function).parameters):
        return "none"
    form = "none"
    for rotary_dim, answer in ((16, "full"), (8, "partial")):
        generator = torch.Generator().manual_seed(0)
        q, k = torch.randn(1, 4, 3, 16, generator=generator), torch.randn(1, 2, 3, 16, generator=generator)
        angles = torch.rand(1, 3, rotary_dim // 2, generator=generator).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        got = _run(lambda: function(q=q, k=k, cos=cos, sin=sin))  # noqa: B023
        if not _alike(got, [torch.ops.gqsa.rope(x, cos, sin, 1) for x in (q, k)], 1e-6):
            break
        form = answer
    return form


def is_causal_mask(function: Callable, window: int, max_context: int) -> bool:
    """Whether a transformers mask function lets a query see itself and what went before, and with a
    window only its last `window` positions."""
    zero = torch.tensor(0)
    for query in sorted({0, 1, window, max_context // 2, max_context - 1}):
        keys = torch.arange(max_context + 1)
        got = _run(lambda: function(zero, zero, torch.tensor(query), keys))  # noqa: B023
        expected = (keys <= query) & ((keys > query - window) if window else torch.tensor(True))
        if got is None or not torch.equal(got.expand(expected.shape), expected):
            return False
    return True


def _has_inside(module: nn.Module) -> bool:
    return next(module.children(), None) is not None or next(module.buffers(), None) is not None


def _alike(got: object, expected: Sequence[Tensor], atol: float) -> bool:
    """Whether two sequences of tensors are the same up to rounding."""
    if not isinstance(got, (tuple, list)) or len(got) != len(expected):
        return False
    pairs = zip(got, expected, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=atol) for a, b in pairs)


def _run(function: Callable):
    """The function's value, or None where it fails: then it is not what the probe was looking for."""
    try:
        with torch.no_grad():
            return function()
    except Exception:
        return None
