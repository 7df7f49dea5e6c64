"""The loop of the end-to-end stages: batches, losses, learning rates, checkpoints to resume from.

Given the same options and a number of steps, a run that was stopped at any moment gives the same result as
one that was not (on a GPU, up to the order in which its kernels add).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gqsa_runtime.errors import ModelError
from torch import nn

from gqsac.compress.captured import CapturedStep, captures
from gqsac.compress.choose_masks import MaskChooser
from gqsac.compress.choose_widths import WidthChooser
from gqsac.compress.clock import Clock, learning_rate_factor
from gqsac.compress.finite import first_not_finite
from gqsac.compress.losses import token_loss
from gqsac.compress.trainable import adamw, autocast, set_learning_rates
from gqsac.compress.world import World, own_part, spread_like, whole
from gqsac.compress.write import sync

_LOGITS_AT_ONCE = {"cuda": 1 << 30, "cpu": 1 << 28}  # elements of one micro-batch's logits
_INPUTS_AT_ONCE = 1 << 31  # bytes of a micro-batch's block inputs, all that blocks which run again keep
_READ_EVERY = 10  # steps between readings of the loss, each of which waits for the GPU
_SAVE_EVERY_S = 60.0
_SAVE_EVERY = 50  # steps; looked at only where the loss is read


@dataclass
class Training:
    """What an end-to-end stage trains and how.

    student: a model with trainable linears in it. teacher: the uncompressed model, needed if share > 0.
    tokens: int64 [samples, seq_len], on the CPU. groups: see trainable.parameter_groups. share: of the
    distillation in the loss. batch: samples a step. chooser: of groups or widths, or None. recomputed: how many blocks
    run again in the backward pass. choosing_s: seconds that the chooser took, of this process. captured: the step as a
    CUDA graph, where it is one. world: the processes that share it.
    """

    name: str
    student: nn.Module
    teacher: nn.Module | None
    tokens: torch.Tensor
    groups: list[dict]
    share: float
    batch: int
    steps: int | None
    seconds: float | None
    seed: int
    device: torch.device
    chooser: MaskChooser | WidthChooser | None = None
    recomputed: int = 0
    choosing_s: float = 0.0
    captured: CapturedStep | None = None
    world: World = World()
    history: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss of the steps before it)


def train(training: Training, file: Path, on_read=lambda step, loss, clock: None) -> Clock:
    """Trains to the end. file: the checkpoint, read if it is there. on_read: called after each reading.

    Raises ModelError that names the stage, the step and the layer when the loss or its gradient is not finite; no
    weights are changed by it, and the checkpoint holds an earlier state.
    """
    t = training
    optimizer = adamw(t.groups, t.device)
    parameters = [parameter for group in t.groups for parameter in group["params"]]
    step, spent_s = _restore(t, optimizer, file)
    clock = Clock(t.steps, t.seconds, spent_s)
    since, saved_at = torch.zeros((), device=t.device), time.monotonic()
    failed = torch.zeros((), dtype=torch.int64, device=t.device)  # the first step that was not finite
    counted = saved_step = step
    take = _step_of(t, parameters)
    while (fraction := _fraction(t, clock, step)) < 1:
        if t.chooser is not None:
            began = time.monotonic()
            t.chooser.step(step, fraction)
            t.choosing_s += time.monotonic() - began
        set_learning_rates(optimizer, learning_rate_factor(fraction))
        loss = take(batch_tokens(t, step))
        since += loss
        if t.chooser is not None:
            t.chooser.observe()
        norm = whole(nn.utils.clip_grad_norm_(parameters, 1.0))
        step += 1
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        failed += torch.where(bad & (failed == 0), step, 0)
        if t.device.type == "cuda" and t.world.size == 1:
            optimizer.found_inf = bad.float()  # its kernel then changes nothing; to read it here would wait for the GPU
        elif failed:
            raise ModelError(_diverged(t, step))
        optimizer.step()
        if step % _READ_EVERY == 0 or _fraction(t, clock, step) >= 1:
            loss = t.world.mean(float(since) / (step - counted), t.device)
            since.zero_()
            counted = step
            if failed:
                raise ModelError(_diverged(t, int(failed)))
            t.history.append((step, loss))
            on_read(step, loss, clock)
            due = step - saved_step >= _SAVE_EVERY and time.monotonic() - saved_at >= _SAVE_EVERY_S
            if t.world.agreed(due, t.device):
                _save(t, optimizer, file, step, clock.spent_s)
                saved_step, saved_at = step, time.monotonic()
    if t.chooser is not None and t.chooser.unfinished:
        t.chooser.choose(1.0)  # a clock of minutes may leap from the ramp to the end
    return clock


def _fraction(t: Training, clock: Clock, step: int) -> float:
    """Share of the training that lies behind, the same in all processes."""
    fraction = clock.fraction(step)
    return fraction if t.seconds is None else t.world.agreed(fraction, t.device)


def _step_of(t: Training, parameters) -> Callable[[torch.Tensor], torch.Tensor]:
    """A batch's tokens -> its loss, a scalar; its gradients are then in the parameters."""
    at_once = micro_batch(t.student, t.batch, t.tokens.shape[1], t.device, t.recomputed) == t.batch
    if captures(t.device) and at_once and not t.recomputed and t.world.size == 1:
        t.captured = CapturedStep(lambda tokens: _step(t, tokens, parameters), parameters, t.device)
        return t.captured

    def take(tokens):
        for parameter in parameters:
            parameter.grad = None
        return _step(t, tokens, parameters)

    return take


def _step(t: Training, tokens: torch.Tensor, parameters) -> torch.Tensor:
    tokens = tokens[t.world.rank :: t.world.size]
    at_once = micro_batch(t.student, len(tokens), t.tokens.shape[1], t.device, t.recomputed)
    total = torch.zeros((), device=t.device)
    for part in tokens.split(at_once):
        part = part.to(t.device, non_blocking=True)
        teacher_logits = None
        if t.share > 0:
            with torch.no_grad(), autocast(t.device):
                teacher_logits = t.teacher(part, use_cache=False).logits
        with autocast(t.device):
            logits = t.student(part, use_cache=False).logits
        loss, gradient = token_loss(logits, part, teacher_logits, t.share, len(part) / len(tokens))
        del teacher_logits
        # What is spread comes together as other tensors; what learns is what asks for a gradient there.
        logits.backward(gradient, inputs=parameters if t.world.size == 1 else None)
        del logits, gradient
        total += loss
    return total


def batch_tokens(t: Training, step: int) -> torch.Tensor:
    """Tokens of a step, int64 [batch, seq_len], on the CPU."""
    return t.tokens[torch.from_numpy(batch_rows(len(t.tokens), t.batch, step, t.seed))]


def micro_batch(model, batch: int, seq_len: int, device: torch.device, recomputed: int) -> int:
    """Samples that pass through a model at once in a step of `batch`. recomputed: how many blocks run again."""
    vocabulary, width = model.get_input_embeddings().weight.shape
    return min(batch, samples_at_once(seq_len, vocabulary, device, recomputed * width))


def samples_at_once(seq_len: int, vocabulary: int, device: torch.device, recomputed: int) -> int:
    """Samples of a micro-batch. recomputed: numbers in the inputs of all blocks that run again, for each token."""
    tokens = _LOGITS_AT_ONCE[device.type] // vocabulary
    if recomputed:
        tokens = min(tokens, _INPUTS_AT_ONCE // (4 * recomputed))
    return max(1, tokens // seq_len)


def batch_rows(samples: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Samples of a step, int64 [batch]: epochs of seeded permutations laid end to end, a function of the step alone."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = {epoch: np.random.default_rng((seed, epoch)).permutation(samples) for epoch in set(positions // samples)}
    return np.array([epochs[position // samples][position % samples] for position in positions], np.int64)


def _diverged(t: Training, step: int) -> str:
    """What to say of a step, counted from 1, whose loss was not finite."""
    at_once = micro_batch(t.student, t.batch, t.tokens.shape[1], t.device, t.recomputed)
    where = "though every layer's output is finite"
    if t.world.size > 1:
        where = "in which layer, a run of one process from the start tells"
    for tokens in batch_tokens(t, step - 1).split(at_once) if t.world.size == 1 else ():
        tokens = tokens.to(t.device)
        of_teacher = None if t.teacher is None else first_not_finite(t.teacher, tokens)
        path = of_teacher or first_not_finite(t.student, tokens)
        if path is not None:
            whose = " of the uncompressed model" if of_teacher else ""
            where = f"first in the output of {path}{whose}"
            break
    return (
        f"{t.name}: the loss or its gradient became NaN or infinite in step {step}, {where}; give the same command "
        "with a lower --weight-lr and --scale-lr to go on from the last good state"
    )


def _state(t: Training) -> dict:
    """What changes, by name: of this process."""
    learning = ((name, tensor) for name, tensor in t.student.named_parameters() if tensor.requires_grad)
    state = {f"student.{name}": own_part(tensor.detach()) for name, tensor in learning}
    if t.chooser is not None:
        state |= t.chooser.tensors()
    return state


def _save(t: Training, optimizer, file: Path, step: int, spent_s: float) -> None:
    moments = optimizer.state_dict()
    moments["state"] = {
        number: {name: own_part(value) if torch.is_tensor(value) else value for name, value in of.items()}
        for number, of in moments["state"].items()
    }
    saved = {"step": step, "spent_s": spent_s, "history": t.history, "optimizer": moments, "processes": t.world.size}
    state = _state(t)
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise ModelError(_diverged(t, step))
    saved["reached"] = t.chooser is not None and t.chooser.reached
    file = state_file(file, t.world)
    temporary = file.with_suffix(".tmp")
    torch.save({**saved, "tensors": state}, temporary)
    sync(temporary)
    t.world.meet()  # all of them are of one step
    os.replace(temporary, file)


def state_file(file: Path, world: World) -> Path:
    """Where this process keeps its state. file: where the first does."""
    return file if world.rank == 0 else file.with_name(f"{file.stem}-{world.rank}{file.suffix}")


def _restore(t: Training, optimizer, file: Path) -> tuple[int, float]:
    """Puts a saved state in place. (steps done, seconds spent); (0, 0) where there is none."""
    file = state_file(file, t.world)
    if not file.is_file():
        return 0, 0.0
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and EOF errors
        raise ModelError(f"{file} is damaged ({error}); delete it to begin this stage anew") from error
    if saved["processes"] != t.world.size:
        raise ModelError(
            f"{file} was saved by {saved['processes']} processes, and now there are {t.world.size}; start as many, or "
            "delete it and its like to begin this stage anew"
        )
    with torch.no_grad():
        for name, tensor in _state(t).items():
            tensor.copy_(saved["tensors"][name])
    peaks = [group["peak"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    for parameter, of in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            of[name] = spread_like(of[name], parameter)
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["peak"] = peak  # the rates of this call count, which may be lower
    t.history.extend(tuple(entry) for entry in saved["history"])
    if t.chooser is not None:
        t.chooser.reached = saved["reached"]
    return saved["step"], saved["spent_s"]
