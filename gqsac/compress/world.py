"""Several processes that share the end-to-end stages, as `torchrun` starts them, each with a GPU of its own.

The first process does everything else by itself, and the others wait. In an end-to-end stage weights, gradients and
moments are spread over all of them (FSDP2), as is each batch; what every process has whole are the levels and masks of
frozen linears and a block's weights while it runs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from gqsa_runtime.errors import InputError
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from gqsac.compress.options import Options

_LONGEST_WAIT = timedelta(days=7)  # of the others, for what the first does by itself


@dataclass(frozen=True)
class World:
    """rank: of this process, from 0. size: how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, device: torch.device) -> World:
        """The processes that torchrun has started, or this one alone. device: whose type each of them uses."""
        if not distributed.is_torchelastic_launched():
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
            atexit.register(distributed.destroy_process_group)  # a second compression needs it again
        return cls(distributed.get_rank(), distributed.get_world_size())

    def device(self, device: torch.device) -> torch.device:
        """Of this process."""
        if self.size == 1 or device.type != "cuda":
            return device
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        return own

    def check(self, options: Options) -> None:
        """Raises InputError for what several processes cannot do together."""
        if self.size == 1:
            return
        if options.master_dtype != "float32":
            raise InputError(
                f"the master dtype is {options.master_dtype!r}, but {self.size} processes spread weights and scales "
                "together, which must be of one type; leave it out"
            )
        removes = "distill" in options.stages and options.removes_gradually("distill") and options.sparsity > 0
        if removes:
            raise InputError(f"{self.size} processes train masks that stay; give --removal at-once, or use one process")

    @contextlib.contextmanager
    def first_alone(self):
        """Runs the body in the first process, and then, where it will find what that has done, in the others."""
        if self.rank > 0:
            distributed.barrier()
        yield
        if self.rank == 0 and self.size > 1:
            distributed.barrier()

    def meet(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            distributed.barrier()

    def agreed(self, number: float, device: torch.device) -> float:
        """The first process's number, for what depends on a clock."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=device)
        distributed.broadcast(tensor, 0)
        return float(tensor)

    def mean(self, number: float, device: torch.device) -> float:
        """Over the numbers of all processes."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=device)
        distributed.all_reduce(tensor)
        return float(tensor) / self.size

    def first_has(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The first process's tensor, on the CPU, in all of them: what is decided must be the same everywhere."""
        if self.size == 1:
            return tensor
        there = tensor.to(device)
        distributed.broadcast(there, 0)
        return there.cpu()

    def spread(self, model: nn.Module, blocks, device: torch.device) -> None:
        """Spreads a model's parameters over the processes: a block at a time comes together to run."""
        if self.size == 1:
            return
        mesh = init_device_mesh(device.type, (self.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: all, or rows of one that is spread. It is the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(parameter: torch.Tensor) -> tuple[int, int]:
    """(the first row, how many) of what this process has of a parameter."""
    if not isinstance(parameter, DTensor):
        return 0, len(parameter)
    each = -(-len(parameter) // parameter.device_mesh.size())  # as torch.chunk divides them
    return min(len(parameter), parameter.device_mesh.get_rank() * each), len(parameter.to_local())


def whole_rows(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """All rows of something that was computed of each process's rows of a parameter: part is [its rows, n]."""
    if not isinstance(parameter, DTensor):
        return part
    shape = torch.Size((len(parameter), part.shape[1]))
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=(part.shape[1], 1)
    ).full_tensor()


def spread_like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A part of this process as a tensor that is spread as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


@contextlib.contextmanager
def together(module: nn.Module):
    """A block or a model with whole parameters, in every process."""
    spread = isinstance(module, FSDPModule)
    if spread:
        module.unshard()
    yield
    if spread:
        module.reshard()
