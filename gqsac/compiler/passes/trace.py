"""Trace: runs a model's own Hugging Face code under torch.export and keeps the graph of its operators.

No weights are needed and none are made: parameters have shapes only, so that a 70B model traces in
seconds and a few hundred megabytes. Buffers (rotary frequencies, embedding scales) keep their values.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import transformers
from gqsa_runtime.errors import GqsaError, ModelError, UnsupportedError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from gqsac.compiler import opaque
from gqsac.compiler.ir import RopeTable

# Tokens in the traced sequence. More than one, so that the token axis shows in every value.
N_TOKENS = 3

# Config fields that count the experts of a mixture.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


MAX_LAYERS = 1000  # more than any model has; a config that says a million would be traced for hours


@dataclass(frozen=True)
class Traced:
    """An exported model.

    graph: aten and gqsa operators over f32 [1, N_TOKENS, ...]; its one output is the logits.
    parameters: placeholder name -> state-dict name, for the parameters.
    constants: placeholder name -> value, for buffers, literal tensors and position ids 0, 1, ...
    tokens: name of the placeholder of the token ids.
    ropes: rotary tables by the key that gqsa.rope_table carries.
    aliases: parameter name -> the name of the parameter that it is tied to.
    has_window: whether the config names a sliding window.
    """

    model_class: str
    graph: torch.fx.Graph
    parameters: dict[str, str]
    constants: dict[str, Tensor]
    tokens: str
    ropes: dict[str, RopeTable]
    aliases: dict[str, str]
    n_layers: int
    max_context: int
    has_window: bool


def trace(config: dict | PretrainedConfig) -> Traced:
    """Exports the causal language model of a config (the content of config.json, or the object).

    The config is left as it was. Raises ModelError if transformers does not know the architecture or
    the config is broken, UnsupportedError if the model does what cannot be compiled.
    """
    config = _prepare(config)
    text = config.get_text_config()
    n_layers = getattr(text, "num_hidden_layers", None)
    max_context = getattr(text, "max_position_embeddings", None)
    for name, value, most in (
        ("num_hidden_layers", n_layers, MAX_LAYERS),
        ("max_position_embeddings", max_context, 2**31 - 1),
    ):
        if isinstance(value, int) and value > most:
            raise ModelError(f"{name} of the {config.model_type} config is {value}, expected 1 to {most}")
    with opaque.registered_attention() as recorder:
        model = _build(config)
        aliases = _untie_and_fake(model)
        if not n_layers or not max_context:
            raise ModelError(f"the {config.model_type} config has no num_hidden_layers or no max_position_embeddings")
        inputs = {"input_ids": torch.zeros(1, N_TOKENS, dtype=torch.long)}
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = torch.arange(N_TOKENS)[None]
        buffers = dict(model.named_buffers())
        exported = _export(model, inputs, recorder)
    recorder.check_masks(type(model).__name__, max_context)
    signature = exported.graph_signature
    constants = {key: buffers[_strip(name)] for key, name in signature.inputs_to_buffers.items()}
    for key, name in signature.inputs_to_lifted_tensor_constants.items():
        constants[key] = exported.constants[name]
    tokens, *positions = signature.user_inputs
    for key in positions:
        constants[key] = inputs["position_ids"]
    return Traced(
        model_class=type(model).__name__,
        graph=exported.graph,
        parameters={key: _strip(name) for key, name in signature.inputs_to_parameters.items()},
        constants=constants,
        tokens=tokens,
        ropes=recorder.ropes,
        aliases=aliases,
        n_layers=n_layers,
        max_context=max_context,
        has_window=getattr(text, "sliding_window", None) is not None,
    )


def _export(model: nn.Module, inputs: dict[str, Tensor], recorder: opaque.Recorder) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), opaque.patched(model, recorder):
            return torch.export.export(_Logits(model), (), inputs, strict=False)
    except Exception as error:
        refusal = _refusal_within(error)
        if refusal is not None:
            raise refusal from None
        raise UnsupportedError(
            f"{type(model).__name__} cannot be traced: its code depends on values that are known only when it runs, "
            f"or does not work with transformers {transformers.__version__} ({_in_one_line(error)})"
        ) from error


def _strip(name: str) -> str:
    return name.removeprefix("model.")  # the wrapper's


class _Logits(nn.Module):
    """Takes the logits out of the model's output, without a KV cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs, use_cache=False, return_dict=True).logits


def _prepare(config: dict | PretrainedConfig) -> PretrainedConfig:
    """A config of our own: from_config and its models write into the one that they are given."""
    if isinstance(config, dict):
        fields = copy.deepcopy(config)
        model_type = fields.pop("model_type", None)
        if not isinstance(model_type, str):
            raise ModelError("the config has no model_type, so it is not a Hugging Face model config")
        if model_type not in CONFIG_MAPPING:
            raise ModelError(
                f"transformers {transformers.__version__} knows no model_type {model_type!r}; a newer version may, "
                "but models that bring their own code cannot be compiled"
            )
        _translate_rope_parameters(fields)
        try:
            config = AutoConfig.for_model(model_type, **fields)
        except Exception as error:
            raise ModelError(f"the {model_type} config is broken: {_in_one_line(error)}") from error
    else:
        config = copy.deepcopy(config)
    # The quantisation is ours, and the traced graph is that of the dense model.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in _EXPERT_COUNTS:
        if (getattr(config.get_text_config(), name, None) or 0) > 1:
            raise UnsupportedError(
                f"{config.model_type} is a mixture of experts ({name} = {getattr(config.get_text_config(), name)}); "
                "only dense models can be compiled"
            )
    return config


def _translate_rope_parameters(fields: dict) -> None:
    """Config files of transformers 5 keep rope_theta inside rope_parameters, which 4.x would not see."""
    rope = fields.get("rope_parameters")
    if int(transformers.__version__.split(".")[0]) >= 5 or not isinstance(rope, dict):
        return
    if "rope_theta" not in rope:
        raise ModelError(
            f"the config's rope_parameters need transformers 5 (this is {transformers.__version__}): "
            "they differ from layer to layer"
        )
    rope = dict(rope)
    fields.setdefault("rope_theta", rope.pop("rope_theta"))
    if "partial_rotary_factor" in rope:
        fields.setdefault("partial_rotary_factor", rope.pop("partial_rotary_factor"))
    if rope.get("rope_type", "default") != "default":
        fields.setdefault("rope_scaling", rope)


def _build(config: PretrainedConfig) -> nn.Module:
    """The model in f32 and evaluation mode, parameters on meta, buffers real."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"transformers has no causal language model of the architecture {config.model_type!r}")
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=opaque.ATTENTION)
            model.tie_weights()
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (opaque.ATTENTION,):
            raise UnsupportedError(
                f"{config.model_type} chooses among attention classes of its own, past transformers' attention "
                f"interface (in version {transformers.__version__}), and cannot be compiled"
            ) from None
        raise ModelError(
            f"the {config.model_type} config is broken: no model can be made from it ({_in_one_line(error)})"
        ) from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New parameters are moved to meta as soon as a module gets them, and are never initialised.

    Building under torch.device("meta") would be simpler, but would lose the values of the buffers.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module, name, parameter):
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "register_parameter", register_on_meta))
        for name in dir(nn.init):
            if name.endswith("_") and not name.startswith("_") and callable(getattr(nn.init, name)):
                stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *args, **kwargs: tensor))
        yield


def _untie_and_fake(model: nn.Module) -> dict[str, str]:
    """Gives every parameter name its own fake CPU parameter and returns the ties that there were."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    first_names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))  # also keeps ids from being used again
    for name, parameter in named:
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            aliases[name] = first
        owner, _, attribute = name.rpartition(".")
        with fake:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    return aliases


def _refusal_within(error: BaseException) -> GqsaError | None:
    """The error of ours that torch.export wrapped, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, GqsaError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _in_one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200] or 'no message'}"
