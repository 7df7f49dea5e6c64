"""A training step as one CUDA graph, where it would otherwise wait for thousands of launches.

What a step reads must stay where it is and what it does must not depend on values: a step that is captured takes its
tokens from one place, and its gradients lie in another for good. Widths, masks, grids and learning rates may change in
place between steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gqsac.compress.compiled import compiles

_SWITCH = "GQSAC_CAPTURE"
_EAGER_STEPS = 3  # before the capture: they compile, and allocate what libraries keep
_CAUSAL = "gqsac-causal"


def captures(device: torch.device) -> bool:
    """Whether training steps on the device become graphs. GQSAC_CAPTURE=0 in the environment says no."""
    return compiles(device) and os.environ.get(_SWITCH, "1") != "0"


def attend_without_masks(model, seq_len: int) -> None:
    """Lets a model of plain causal attention call it without asking, in each pass, whether a batch is padded or packed.

    Training samples never are, and the answer waits for the GPU. Left as they are: models of which some layer sees less
    than seq_len tokens, and those that attend otherwise than by PyTorch's function.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if config._attn_implementation != "sdpa" or (window is not None and window < seq_len):
        return
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return
    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)  # transformers makes masks for names that it knows
    config._attn_implementation = _CAUSAL


class CapturedStep:
    """Calls a function of a batch's tokens, at first as it is and then as a graph.

    function: int64 [batch, seq_len] on the device -> a tensor on it. It must leave gradients in the parameters, which
    have none when it is called. graph: whether it has become one; None before that is tried.
    """

    def __init__(self, function: Callable, parameters: list[torch.Tensor], device: torch.device):
        self._function, self._parameters = function, parameters
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._left, self._graph, self._tokens, self._result = _EAGER_STEPS, None, None, None
        self.graph: bool | None = None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: int64 [batch, seq_len], always of one shape. The result holds until the next call."""
        if self._tokens is None:
            self._tokens = torch.empty_like(tokens, device=self._device)
        pinned = tokens if tokens.is_cuda else tokens.pin_memory()  # any other memory would be waited for
        self._tokens.copy_(pinned, non_blocking=True)
        if self.graph is None and self._left == 0:
            self._capture()
        if self.graph:
            self._graph.replay()
            return self._result
        self._left -= 1
        self._forget()
        if self.graph is False:
            return self._function(self._tokens)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._function(self._tokens)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _capture(self) -> None:
        self._forget()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._function(self._tokens)
        except RuntimeError as error:
            self.graph, self._result = False, None
            reason = str(error).splitlines()[0]
            print(
                f"warning: the training step could not be captured as a CUDA graph ({reason}); it goes on launch by "
                f"launch, which is slower ({_SWITCH}=0 leaves the attempt out)",
                file=sys.stderr,
                flush=True,
            )
            return
        self._graph, self.graph = graph, True
