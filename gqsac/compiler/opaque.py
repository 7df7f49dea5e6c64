"""Opaque operators: what `trace` keeps in one piece, and the patches that put them into a model.

Exported as they are written, a norm, a rotary embedding and an attention are some thirty aten
operators a layer, in as many spellings as there are architectures. Each is replaced by one custom
operator before export. Nothing is recognised by a class's name: a module is replaced only after its
own code, run on numbers (see probe.py), gave what the operator computes.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import transformers.masking_utils
from gqsa_runtime.errors import UnsupportedError
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gqsac.compiler import probe
from gqsac.compiler.ir import RopeTable

ATTENTION = "gqsa_trace"  # the name under which transformers knows the opaque attention

# Arguments that models hand to their attention function and that change nothing in what it computes.
_HARMLESS = {
    "cache_position",
    "dropout",
    "layer_idx",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}


@torch.library.custom_op("gqsa::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset). x: [..., width], weight: [width]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + weight_offset)


@torch.library.custom_op("gqsa::rope_table", mutates_args=())
def rope_table(position_ids: Tensor, inv_freq: Tensor, scaling: float, table: str) -> tuple[Tensor, Tensor]:
    """cos and sin, [batch, n_tokens, 2 * len(inv_freq)] each. table: key of the traced rope tables."""
    angles = position_ids[..., None].float() * inv_freq.float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


@torch.library.custom_op("gqsa::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, heads_axis: int) -> Tensor:
    """Rotates pairs (i, i + rotary_dim / 2) of x's last axis, [..., head_dim]; the rest passes through.

    cos, sin: [batch, n_tokens, rotary_dim], broadcast over x's heads_axis.
    """
    cos, sin = cos.unsqueeze(heads_axis), sin.unsqueeze(heads_axis)
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat((rotary * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


@torch.library.custom_op("gqsa::causal_mask", mutates_args=())
def causal_mask(like: Tensor, window: int) -> Tensor:
    """bool [1, 1, n_tokens, n_tokens], true where a query may look. like: [n_tokens]; window: 0 or length."""
    n_tokens = like.shape[0]
    allowed = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=like.device).tril()
    if window:
        allowed = allowed.triu(1 - window)
    return allowed[None, None]


@torch.library.custom_op("gqsa::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, window: int) -> Tensor:
    """softmax(scale * q k^T, where mask) v. q: [batch, heads, n_tokens, head_dim], k and v with kv_heads.

    Gives [batch, n_tokens, heads, head_dim]. window: the sliding window that the model names beside the
    mask, or 0; what counts is the mask, but the two must agree (checked by legalize).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


@rms_norm.register_fake
def _(x, weight, eps, weight_offset):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@rope_table.register_fake
def _(position_ids, inv_freq, scaling, table):
    shape = (*position_ids.shape, 2 * inv_freq.shape[0])
    return inv_freq.new_empty(shape), inv_freq.new_empty(shape)


@rope.register_fake
def _(x, cos, sin, heads_axis):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@causal_mask.register_fake
def _(like, window):
    return like.new_empty((1, 1, like.shape[0], like.shape[0]), dtype=torch.bool)


@attention.register_fake
def _(q, k, v, mask, scale, window):
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@dataclass
class Recorder:
    """What the patched functions note while a model is traced."""

    ropes: dict[str, RopeTable] = field(default_factory=dict)
    masks: list[tuple[Callable, int]] = field(default_factory=list)  # mask function, claimed window

    def rope_key(self, table: RopeTable) -> str:
        """The key of a table; equal tables share one."""
        for key, known in self.ropes.items():
            if known == table:
                return key
        key = f"rope{len(self.ropes)}"
        self.ropes[key] = table
        return key

    def check_masks(self, model_class: str, max_context: int) -> None:
        """Raises UnsupportedError if a mask is not the causal one, with the window, that it passed for."""
        for function, window in self.masks:
            if not probe.is_causal_mask(function, window, max_context):
                raise UnsupportedError(
                    f"{model_class}: its attention mask is neither causal nor a causal sliding window; "
                    "chunked, bidirectional and prefix masks cannot be compiled"
                )


@contextmanager
def registered_attention() -> Iterator[Recorder]:
    """Lets models be made and run with attn_implementation=ATTENTION while the context lasts."""
    recorder = Recorder()
    AttentionInterface.register(ATTENTION, _attention_forward)
    AttentionMaskInterface.register(ATTENTION, functools.partial(_mask_forward, recorder))
    try:
        yield recorder
    finally:
        AttentionInterface._global_mapping.pop(ATTENTION, None)
        AttentionMaskInterface._global_mapping.pop(ATTENTION, None)


@contextmanager
def patched(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Replaces norms, activations and rotary embeddings of a model while the context lasts.

    The model's buffers must be real; its parameters need shapes only.
    """
    with ExitStack() as stack:
        for module in model.modules():
            forward = _replacement(module, recorder)
            if forward is not None:
                stack.enter_context(mock.patch.object(module, "forward", forward))
        for file in {type(module).__module__: None for module in model.modules()}:
            namespace = sys.modules[file]
            function = getattr(namespace, "apply_rotary_pos_emb", None)
            if function is not None:
                opaque_function = _opaque_apply_rotary(function)
                stack.enter_context(mock.patch.object(namespace, "apply_rotary_pos_emb", opaque_function))
        # Positions that restart would mean several packed sequences. Ours never restart, and the check for it
        # would put data-dependent operators into every mask.
        packed = "find_packed_sequence_indices"
        if hasattr(transformers.masking_utils, packed):
            stack.enter_context(mock.patch.object(transformers.masking_utils, packed, lambda position_ids: None))
        yield


def _replacement(module: nn.Module, recorder: Recorder) -> Callable | None:
    """The opaque forward of a module, or None to leave it as it is."""
    norm = probe.as_rms_norm(module)
    if norm is not None:
        eps, weight_offset = norm
        return lambda x: torch.ops.gqsa.rms_norm(x, module.weight, eps, weight_offset)
    activation = probe.as_activation(module)
    if activation is not None:
        return activation
    if probe.is_rotary(module):
        return functools.partial(_rotary_forward, module, probe.rope_tables(module), recorder)
    return None


def _rotary_forward(module, tables, recorder, x, position_ids, layer_type=None):
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    table = tables[name]
    if isinstance(table, str):
        raise UnsupportedError(table)
    key = recorder.rope_key(table)
    return torch.ops.gqsa.rope_table(position_ids, getattr(module, name), table.scaling, key)


def _opaque_apply_rotary(original: Callable) -> Callable:
    signature = inspect.signature(original)
    form = probe.rotation_form(original)

    @functools.wraps(original)
    def apply_rotary_pos_emb(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        partial = form != "none" and given["cos"].shape[-1] < given["q"].shape[-1]
        if form == "none" or (partial and form != "partial"):
            raise UnsupportedError(
                f"{original.__module__} rotates queries and keys otherwise than by halves (i, i + rotary_dim / 2); "
                "only that form of rotary position embedding can be compiled"
            )
        axis = given.get("unsqueeze_dim", 1)
        return tuple(torch.ops.gqsa.rope(given[name], given["cos"], given["sin"], axis) for name in ("q", "k"))

    return apply_rotary_pos_emb


def _mask_forward(recorder: Recorder, *args, mask_function: Callable, local_size: int | None = None, **kwargs):
    n_tokens = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]
    window = local_size or 0
    recorder.masks.append((mask_function, window))
    return torch.ops.gqsa.causal_mask(torch.zeros(n_tokens), window)


def _attention_forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
    where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    window = kwargs.pop("sliding_window", None) or 0
    is_causal = kwargs.pop("is_causal", None)
    for name, value_given in kwargs.items():
        if name not in _HARMLESS and value_given is not None and value_given is not False:
            raise UnsupportedError(
                f"{where} needs attention with {name!r}, which is not supported: only plain causal attention, "
                "with or without a sliding window, can be compiled"
            )
    if query.shape[-1] != value.shape[-1] or key.shape[-1] != value.shape[-1]:
        raise UnsupportedError(
            f"{where} has queries, keys and values of {query.shape[-1]}, {key.shape[-1]} and {value.shape[-1]} "
            "features a head; only equal widths can be compiled"
        )
    if attention_mask is None:
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise UnsupportedError(f"{where} looks ahead (it is not causal); only causal attention can be compiled")
        attention_mask = torch.ops.gqsa.causal_mask(torch.zeros(query.shape[2]), window)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return torch.ops.gqsa.attention(query, key, value, attention_mask, scale, window), None
