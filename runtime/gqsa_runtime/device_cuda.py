"""The CUDA device: one arena, one stream, one captured graph per phase. Driver API only."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gqsa_runtime import cuda_errors
from gqsa_runtime.checked_tensors import CheckedTensors
from gqsa_runtime.errors import DeviceError
from gqsa_runtime.operators import state_elements
from gqsa_runtime.program import DTYPE_BYTES, NUMPY_DTYPES, Argument, Binary, Launch, Place, Program, Step
from gqsa_runtime.rope import RopeTables
from gqsa_runtime.steps_ahead import CHOSEN, ROW, STATE, TOKEN, StepsAhead
from gqsa_runtime.stopwatch import Stopwatch

STATIC_SHARED_LIMIT = 48 << 10  # above this a kernel must opt in to dynamic shared memory
ALIGNMENT = 256  # of everything in the arena, as cuMemAlloc aligns
# Chooses a binary by its target's name, e.g. compute_80 to run the PTX. For tests and comparisons.
TARGET_VARIABLE = "GQSA_CUDA_TARGET"
# Set to anything, each kernel is launched by itself and waited for, so that an error names it.
STEPWISE_VARIABLE = cuda_errors.STEPWISE_VARIABLE

_STEPS_TIMED = 32  # launches in a graph that times a kernel, at least

_BODIES = ("few_body", "prefill_body")  # phases that last_logits follows: one graph for both, without a gap between

# Elements of a decode step's inputs: they wait on the host for the launch, whose graph may take them along.
_STEP_INPUTS = {"tokens": 1, "state": state_elements(1)}

# Buffers that the host fills or reads between launches, beside the logits.
_HOST_BUFFERS = ("tokens", "targets", "state", "log_probs", "argmax")


def probe(program: Program, ordinal: int = 0) -> tuple[bool, str]:
    """Whether this machine's GPU can run the program, and the reason in a few words."""
    try:
        gpu = Gpu(ordinal)
        binary = choose_binary(program.binaries, gpu)
    except DeviceError as error:
        return False, str(error)
    return True, f"{gpu.name} runs {binary.target} kernels"


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            f"cuda-bindings cannot be imported ({error}); install it with `pip install cuda-bindings`"
        ) from error
    return driver


def call(function: str, *args: Any) -> Any:
    """Calls a driver function by name. Returns its value(s); raises DeviceError on any failure."""
    driver = _driver()
    try:
        status, *values = getattr(driver, function)(*args)
    except RuntimeError as error:  # the library itself is missing, or lacks the function
        raise DeviceError(cuda_errors.explain_unavailable(function, error)) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(cuda_errors.explain(function, status.name))
    return values[0] if len(values) == 1 else tuple(values)


class Gpu:
    """A GPU and its primary context."""

    def __init__(self, ordinal: int = 0) -> None:
        call("cuInit", 0)
        count = call("cuDeviceGetCount")
        if not 0 <= ordinal < count:
            raise DeviceError(f"GPU {ordinal} does not exist: the driver finds {count}; use --device cuda:N or cpu")
        attributes = _driver().CUdevice_attribute
        self.device = call("cuDeviceGet", ordinal)
        self.name = call("cuDeviceGetName", 128, self.device).partition(b"\0")[0].decode()
        self.major = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self.device)
        self.minor = call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self.device)
        self.driver_version = call("cuDriverGetVersion")

    @property
    def arch(self) -> str:
        """For example "sm_90"."""
        return f"sm_{self.major}{self.minor}"


@contextlib.contextmanager
def free_bytes(ordinal: int) -> Iterator[int]:
    """Free memory of a GPU. The GPU's context lives until the end of the block, so that opening the
    device inside it does not make the context a second time. Raises DeviceError without a GPU.
    """
    gpu = Gpu(ordinal)
    context = call("cuDevicePrimaryCtxRetain", gpu.device)
    try:
        call("cuCtxSetCurrent", context)
        yield int(call("cuMemGetInfo")[0])
    finally:
        call("cuDevicePrimaryCtxRelease", gpu.device)


def choose_binary(binaries: tuple[Binary, ...], gpu: Gpu) -> Binary:
    """The best binary for a GPU: a cubin of its major version and at most its minor one, else PTX.

    Raises DeviceError that names the GPU's and the file's targets and the command that rebuilds.
    """
    cuda = [binary for binary in binaries if binary.kind in ("cubin", "ptx")]
    wanted = os.environ.get(TARGET_VARIABLE)
    if wanted:
        cuda = [binary for binary in cuda if binary.target == wanted]
    best: tuple[int, Binary] | None = None
    for binary in cuda:
        version = int(binary.target.rpartition("_")[2])
        major, minor = divmod(version, 10)
        if binary.kind == "cubin" and (major != gpu.major or minor > gpu.minor):
            continue
        if binary.kind == "ptx" and (major, minor) > (gpu.major, gpu.minor):
            continue
        rank = version + (10_000 if binary.kind == "cubin" else 0)
        if best is None or rank > best[0]:
            best = (rank, binary)
    if best is None:
        held = ", ".join(binary.target for binary in cuda) or "none"
        asked = f" of {TARGET_VARIABLE}={wanted}" if wanted else ""
        raise DeviceError(
            f"the file has no kernels{asked} for {gpu.name} ({gpu.arch}): its CUDA targets are {held}; "
            f"make them with `gqsac relink FILE -o NEW --target {gpu.arch}`, or use --device cpu"
        )
    return best[1]


class CudaDevice:
    """Runs a program on one GPU. All memory is allocated when it is made; nothing after.

    tensors: asked for in the order of the file, and let go one by one. context: positions of a slot of the KV cache;
    slots: sequences that it holds. clock: gets the stages "modules", "graphs" and "upload".
    Raises DeviceError for a missing driver, GPU or binary, and where the driver runs out of memory.
    """

    def __init__(
        self,
        program: Program,
        tensors: CheckedTensors,
        binaries: Callable[[Binary], bytes],
        context: int,
        ordinal: int = 0,
        slots: int = 1,
        clock: Stopwatch | None = None,
    ):
        self._clock = clock or Stopwatch()
        self._program, self.plan = program, program.plans["cuda"]
        self._gpu = Gpu(ordinal)
        self.name = self._gpu.name
        self._binary = choose_binary(program.binaries, self._gpu)
        self.target = self._binary.target
        # Programmatic dependent launch: a kernel starts while the one before drains, and waits for its
        # results itself. Only code compiled for sm_90 and later has that wait.
        self._dependent_launch = self._binary.kind == "cubin" and self._gpu.major >= 9
        self._memory: Any = None  # what the driver gave, as long as it is held
        self._host_memory: Any = None
        self._stream: Any = None
        self._pinned: dict[str, np.ndarray] = {}  # host memory of the buffers that pass between launches
        self._on_their_way: set[str] = set()  # buffers whose pinned memory the stream may still read
        self._beginnings = {name: np.zeros(count, np.int32) for name, count in _STEP_INPUTS.items()}  # of buffers
        self._to_copy: set[str] = set()  # buffers whose beginning the device has not yet
        self._steps: StepsAhead | None = None  # where the plan chooses tokens
        self._stepwise = bool(os.environ.get(STEPWISE_VARIABLE))
        self._stepped = False  # whether the last launch was such a step
        self._modules: list[Any] = []
        self._graphs: dict[str, object] = {}
        self._context = call("cuDevicePrimaryCtxRetain", self._gpu.device)
        try:
            call("cuCtxSetCurrent", self._context)
            self._stream = call("cuStreamCreate", _driver().CUstream_flags.CU_STREAM_NON_BLOCKING)
            self._allocate(tensors, context, slots)
            # While tensors are read and checked ahead. Nothing of this runs before all of them are here.
            with self._clock.stage("modules"):
                self._functions = self._load(binaries(self._binary))
            self._configs = {
                kernel.name: self._launch_config(kernel.launch(self.target)) for kernel in self.plan.kernels
            }
            if not self._stepwise:
                with self._clock.stage("graphs"):
                    for phase, steps in self.plan.phases.items():
                        if phase != "decode" or not self.plan.chooses:
                            self._graphs[phase] = self._capture(steps)
                    for phase in _BODIES:
                        steps = self.plan.phases[phase] + self.plan.phases["last_logits"]
                        self._graphs[f"{phase}+last_logits"] = self._capture(steps)
                    if self.plan.chooses:
                        self._make_steps()
            self._fill(tensors, context)
        except BaseException:
            self.close()
            raise

    def upload(self, buffer: str, values: np.ndarray) -> None:
        """Copies values to the start of a buffer."""
        address, dtype, elements = self._buffers[buffer]
        values = np.ascontiguousarray(values, NUMPY_DTYPES[dtype])
        if values.size > elements:
            raise ValueError(f"{values.size} values do not fit buffer {buffer!r} of {elements}")
        if buffer in self._beginnings:
            beginning = self._beginnings[buffer]
            beginning[: values.size] = values[: beginning.size]
            if values.size <= beginning.size:
                self._to_copy.add(buffer)
                return
            self._to_copy.discard(buffer)
        self._set_current()
        if buffer in self._pinned and buffer not in self._on_their_way:
            # Pinned memory needs no copy by the driver, but must stay as it is until the stream has taken it.
            pinned = self._pinned[buffer][: values.size]
            pinned[:] = values
            values = pinned
            self._on_their_way.add(buffer)
        call("cuMemcpyHtoDAsync", address, values.ctypes.data, values.nbytes, self._stream)

    def launch(self, *phases: str) -> None:
        """Starts phases, one after another; the next download waits for them."""
        self._set_current()
        self._stepped = False
        if phases == ("decode",) and self._steps is not None:
            self._stepped = True
            self._to_copy.clear()
            self._steps.start(int(self._beginnings["tokens"][0]), self._beginnings["state"])
            return
        if self._steps is not None:
            self._steps.forget()
        self._copy_beginnings()
        if self._stepwise:
            for phase in phases:
                for step in self.plan.phases[phase]:
                    self._launch_step(step, wait=True)
        else:
            together = "+".join(phases)
            for name in (together,) if together in self._graphs else phases:
                call("cuGraphLaunch", self._graphs[name], self._stream)

    def _copy_beginnings(self) -> None:
        for buffer in self._to_copy:
            beginning = self._beginnings[buffer]
            call("cuMemcpyHtoDAsync", self._buffers[buffer][0], beginning.ctypes.data, beginning.nbytes, self._stream)
        self._to_copy.clear()

    def _synchronize(self) -> None:
        self._set_current()
        call("cuStreamSynchronize", self._stream)
        self._on_their_way.clear()

    def download(self, buffer: str, count: int) -> np.ndarray:
        """The first `count` elements of a buffer, after all work before has finished."""
        address, dtype, elements = self._buffers[buffer]
        if count > elements:
            raise ValueError(f"buffer {buffer!r} holds {elements} elements, not {count}")
        self._set_current()
        if self._stepped and self._steps is not None and buffer == "argmax" and count == 1:
            return np.array([self._steps.chosen()], np.int32)
        pinned = self._pinned.get(buffer, np.empty(0))[:count]
        values = pinned if len(pinned) == count else np.empty(count, NUMPY_DTYPES[dtype])
        call("cuMemcpyDtoHAsync", values.ctypes.data, address, values.nbytes, self._stream)
        self._synchronize()
        return values.copy() if values is pinned else values

    def download_rows(self, cache: str, layer: int, count: int) -> np.ndarray:
        """See engine.Device."""
        rows = np.empty((count, self._program.kv_row(layer)), NUMPY_DTYPES[self._program.kv_element])
        if rows.size:
            self._set_current()
            call("cuMemcpyDtoHAsync", rows.ctypes.data, self._addresses[cache, layer], rows.nbytes, self._stream)
            call("cuStreamSynchronize", self._stream)
        return rows

    def upload_rows(self, cache: str, layer: int, rows: np.ndarray) -> None:
        """See engine.Device."""
        if rows.size:
            self._set_current()
            if self._steps is not None:
                self._steps.forget()
            self._copy(self._addresses[cache, layer], np.ascontiguousarray(rows))

    def fill_ropes(self, long: frozenset[str]) -> None:
        """See engine.Device."""
        self._set_current()
        if self._steps is not None:
            self._steps.forget()
        for name, table in self._ropes.make(long):
            self._copy(self._addresses["rope", name], table)

    def bandwidth(self) -> float:
        """Bytes per second that a copy within the GPU's memory moves, read and written, the median of 20."""
        n_bytes = 1 << 29
        self._set_current()
        source, target = call("cuMemAlloc", n_bytes), call("cuMemAlloc", n_bytes)
        try:
            seconds = self._median_seconds(20, "cuMemcpyDtoDAsync", target, source, n_bytes)
        finally:
            call("cuMemFree", source)
            call("cuMemFree", target)
        return 2 * n_bytes / seconds

    def step_seconds(self, phase: str, repeats: int) -> list[float]:
        """Seconds of each step of a phase, by events. The steps of one kernel share their time: they run as one
        graph, with their own weights one after another, and are launched there as they are in the phase.
        """
        self._set_current()
        self._copy_beginnings()
        steps, seconds = self.plan.phases[phase], {}
        for name in dict.fromkeys(step.kernel for step in steps):
            same = [step for step in steps if step.kernel == name]
            same *= -(-_STEPS_TIMED // len(same))  # so many that the launch of the graph does not count
            graph = self._capture(tuple(same))
            try:
                seconds[name] = self._median_seconds(repeats, "cuGraphLaunch", graph) / len(same)
            finally:
                call("cuGraphExecDestroy", graph)
        return [seconds[step.kernel] for step in steps]

    def _median_seconds(self, repeats: int, function: str, *args: Any) -> float:
        """Of a driver function that works on the stream, after one untimed call."""
        call(function, *args, self._stream)
        events = [call("cuEventCreate", 0) for _ in range(repeats + 1)]
        try:
            call("cuEventRecord", events[0], self._stream)
            for event in events[1:]:
                call(function, *args, self._stream)
                call("cuEventRecord", event, self._stream)
            call("cuStreamSynchronize", self._stream)
            return 1e-3 * float(np.median([call("cuEventElapsedTime", *pair) for pair in itertools.pairwise(events)]))
        finally:
            for event in events:
                call("cuEventDestroy", event)

    def close(self) -> None:
        """Frees everything. Safe to call twice."""
        if self._context is None:
            return
        # A device that failed answers every call with its failure, which whoever met it was told.
        with contextlib.suppress(DeviceError):
            self._set_current()
        if self._steps is not None:
            with contextlib.suppress(DeviceError):
                self._steps.close()
        freed = [("cuGraphExecDestroy", graph) for graph in self._graphs.values()]
        freed += [("cuModuleUnload", module) for module in self._modules]
        freed += [("cuMemFree", self._memory), ("cuMemFreeHost", self._host_memory), ("cuStreamDestroy", self._stream)]
        self._pinned.clear()
        for function, held in [*freed, ("cuDevicePrimaryCtxRelease", self._gpu.device)]:
            if held is not None:
                with contextlib.suppress(DeviceError):
                    call(function, held)
        self._graphs, self._modules, self._steps = {}, [], None
        self._memory = self._host_memory = self._stream = self._context = None

    def _set_current(self) -> None:
        # A server's threads each have their own current context; setting it costs a microsecond.
        call("cuCtxSetCurrent", self._context)

    def _allocate(self, tensors: CheckedTensors, context: int, slots: int) -> None:
        program, plan = self._program, self.plan
        used = {arg.name for step in plan.steps() for arg in step.args if arg.kind == "tensor"}
        names = [name for name in tensors if name in used]
        weight_bytes = sum(_align(tensors.nbytes(name)) for name in names)
        rope_bytes = {name: context * rope.rotary_dim * DTYPE_BYTES["f32"] for name, rope in program.ropes.items()}
        total = weight_bytes + plan.arena_bytes + slots * program.kv_bytes(context)
        total += sum(rope_bytes.values())
        total += ALIGNMENT * (2 * len(program.kv_layers) + len(program.ropes) + 1)
        self._memory = call("cuMemAlloc", total)
        # Nothing may depend on what the memory held before; zeros make that so.
        call("cuMemsetD8Async", self._memory, 0, total, self._stream)
        cursor = int(self._memory)

        def take(size: int) -> int:
            nonlocal cursor
            address = cursor
            cursor += _align(size)
            return address

        arena = take(plan.arena_bytes)
        self._buffers = {b.name: (arena + b.offset, b.dtype, b.elements) for b in plan.buffers}
        self._pin({**{name: self._buffers[name][2] for name in _HOST_BUFFERS}, "logits": program.vocab_size})
        self._addresses: dict[Place, int] = {}
        for layer in range(len(program.kv_layers)):
            size = slots * program.slot_rows(layer, context) * program.kv_row_bytes(layer)
            self._addresses["k_cache", layer] = take(size)
            self._addresses["v_cache", layer] = take(size)
        for name, size in rope_bytes.items():
            self._addresses["rope", name] = take(size)
        for name in names:
            self._addresses["tensor", name] = take(tensors.nbytes(name))

    def _fill(self, tensors: CheckedTensors, context: int) -> None:
        """Copies weights and rotary tables to their places."""
        self._ropes = RopeTables(self._program.ropes, tensors, context)
        self.fill_ropes(frozenset())
        for (kind, name), address in self._addresses.items():
            if kind == "tensor":
                self._copy(address, tensors[str(name)])

    def _pin(self, elements: dict[str, int]) -> None:
        """Pinned host memory for the first elements of some buffers, and for decode steps."""
        sizes = {name: count * DTYPE_BYTES[self._buffers[name][1]] for name, count in elements.items()}
        step_bytes = 2 * ROW * 4
        self._host_memory = call("cuMemAllocHost", sum(map(_align, sizes.values())) + step_bytes)
        address = int(self._host_memory)
        for name, size in sizes.items():
            memory = (ctypes.c_ubyte * size).from_address(address)
            self._pinned[name] = np.frombuffer(memoryview(memory), NUMPY_DTYPES[self._buffers[name][1]])
            address += _align(size)
        rows = (ctypes.c_ubyte * step_bytes).from_address(address)
        self._step_memory = np.frombuffer(memoryview(rows), np.int32).reshape(2, ROW)

    def _make_steps(self) -> None:
        """The graphs of decode steps that take inputs from pinned memory and bring their choice there."""
        steps = self.plan.phases["decode"]
        (tokens, *_), (state, *_), (chosen, *_) = (self._buffers[name] for name in ("tokens", "state", "argmax"))

        # A step that follows reads its token where the last one chose it.
        def follow(arg: Argument) -> Argument:
            return replace(arg, name="argmax") if (arg.kind, arg.name) == ("buffer", "tokens") else arg

        following = tuple(replace(step, args=tuple(map(follow, step.args))) for step in steps)

        def make(row: np.ndarray, follows: bool) -> object:
            def begin() -> None:
                if not follows:
                    call("cuMemcpyHtoDAsync", tokens, row[TOKEN:].ctypes.data, 4, self._stream)
                call("cuMemcpyHtoDAsync", state, row[STATE].ctypes.data, row[STATE].nbytes, self._stream)

            def end() -> None:
                call("cuMemcpyDtoHAsync", row[CHOSEN:].ctypes.data, chosen, 4, self._stream)

            return self._capture(following if follows else steps, begin, end)

        first, second = self._step_memory
        made = {"given": make(first, False), "following": make(first, True), "following second": make(second, True)}
        self._graphs.update(made)
        given, *others = made.values()
        self._steps = StepsAhead(self._step_memory, given, others, self._stream, call)

    def _copy(self, address: int, array: np.ndarray) -> None:
        with self._clock.stage("upload"):
            call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._stream)
            call("cuStreamSynchronize", self._stream)

    def _load(self, data: bytes) -> dict[str, object]:
        """Loads the modules; the reader has checked their digest: a damaged cubin can kill the process."""
        attributes = _driver().CUfunction_attribute
        limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        functions = {}
        for kernel in self.plan.kernels:
            offset, size = self._binary.kernels[kernel.name]
            module = call("cuModuleLoadData", data[offset : offset + size] + b"\0")
            self._modules.append(module)
            function = call("cuModuleGetFunction", module, kernel.name.encode())
            shared_bytes = kernel.launch(self.target).shared_bytes
            if shared_bytes > STATIC_SHARED_LIMIT:
                call("cuFuncSetAttribute", function, limit, shared_bytes)
            # A kernel starts beside the one before it only where both split the L1 alike.
            call("cuFuncSetAttribute", function, carveout, 100)
            functions[kernel.name] = function
        return functions

    def _capture(
        self, steps: tuple[Step, ...], begin: Callable[[], object] = tuple, end: Callable[[], object] = tuple
    ) -> object:
        """A graph of the steps, one after another, between what `begin` and `end` put into the stream."""
        call("cuStreamBeginCapture", self._stream, _driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        begin()
        for step in steps:
            self._launch_step(step)
        end()
        graph = call("cuStreamEndCapture", self._stream)
        executable = call("cuGraphInstantiate", graph, 0)
        call("cuGraphDestroy", graph)
        return executable

    def _launch_step(self, step: Step, wait: bool = False) -> None:
        """Puts a step into the stream. Errors of the launch, and with `wait` those of its work, name the kernel."""
        values = tuple(self._address(arg) for arg in step.args)
        types = (ctypes.c_void_p,) * len(values)
        try:
            call("cuLaunchKernelEx", self._configs[step.kernel], self._functions[step.kernel], (values, types), 0)
            if wait:
                call("cuStreamSynchronize", self._stream)
        except DeviceError as error:
            raise DeviceError(f"kernel {step.kernel}: {error}") from error

    def _launch_config(self, launch: Launch) -> Any:
        driver = _driver()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared_bytes, self._stream
        if self._dependent_launch:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        return config

    def _address(self, arg: Argument) -> int:
        if arg.kind == "null":
            return 0
        if arg.kind == "buffer":
            address, dtype, _ = self._buffers[arg.named]
            return address + arg.offset * DTYPE_BYTES[dtype]
        return self._addresses[arg.kind, arg.name]


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
