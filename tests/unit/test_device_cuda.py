"""The CUDA device over a driver of host memory: what it copies where before anything could run."""

import ctypes
import itertools
import json
import sys
import threading

import numpy as np
import pytest
from gqsa_runtime import cuda_errors, device_cuda
from gqsa_runtime.checked_tensors import CheckedTensors
from gqsa_runtime.engine import launch_state
from gqsa_runtime.errors import DeviceError, FormatError
from gqsa_runtime.model import Model
from gqsa_runtime.operators import state_elements
from gqsa_runtime.program import NUMPY_DTYPES, Rope
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.rope import rope_table
from gqsa_runtime.sampling import GREEDY, SamplingOptions, first_draw, next_draw
from gqsa_runtime.session import cache_shapes
from gqsa_runtime.tokenizer import Tokenizer

from benchmarks import steady_memory
from tests.format import tiny
from tests.format.tiny import CONTEXT
from tests.gpu import hostile_plans

driver = pytest.importorskip("cuda.bindings.driver")


class HostDriver:
    """The driver calls of device_cuda, with memory of the host for the GPU's. calls: names in order."""

    def __init__(self):
        self.calls: list[str] = []
        self.launched: list[tuple[int, ...]] = []  # the pointers of each kernel in a graph
        self._memory: dict[int, np.ndarray] = {}
        self._captured: list[tuple[int, ...] | None] | None = None  # copies of a graph, None for its kernels
        self.compute = lambda: None  # what a graph's kernels do
        self.fails: dict[str, str] = {}  # function -> status: from now on
        self.launches_left = sys.maxsize  # until a launch leaves every later call failed

    def __call__(self, function: str, *args):
        self.calls.append(function)
        if status := self.fails.get(function, self.fails.get("")):
            raise DeviceError(cuda_errors.explain(function, status))
        return getattr(self, function, self._nothing)(*args)

    def cuDeviceGetCount(self):
        return 1

    def _nothing(self, *args):
        return 1

    def cuDeviceGetName(self, *args):
        return b"Host GPU\0"

    def cuDeviceGetAttribute(self, attribute, device):
        return 9 if attribute.name.endswith("MAJOR") else 0

    def cuMemAlloc(self, n_bytes):
        memory = np.full(n_bytes + device_cuda.ALIGNMENT, 0xAA, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % device_cuda.ALIGNMENT
        self._memory[address] = memory
        return address

    cuMemAllocHost = cuMemAlloc

    def cuMemFree(self, address):
        del self._memory[address]

    cuMemFreeHost = cuMemFree

    def cuMemGetInfo(self):
        return (1 << 33) - sum(memory.nbytes for memory in self._memory.values()), 1 << 33

    def cuMemsetD8Async(self, address, value, count, stream):
        ctypes.memset(address, value, count)

    def cuStreamBeginCapture(self, stream, mode):
        self._captured = []

    def cuStreamEndCapture(self, stream):
        copies, self._captured = tuple(self._captured), None
        return copies

    def cuGraphInstantiate(self, graph, flags):
        return graph

    def cuGraphLaunch(self, graph, stream):
        self._one_launch()
        self.copied = {copy[0] for copy in graph if copy}
        for copy in graph:
            ctypes.memmove(*copy) if copy else self.compute()

    def cuMemcpyHtoDAsync(self, target, source, n_bytes, stream):
        if self._captured is None:
            ctypes.memmove(target, source, n_bytes)
        else:
            self._captured.append((target, source, n_bytes))

    cuMemcpyDtoHAsync = cuMemcpyHtoDAsync

    def _one_launch(self):
        self.launches_left -= 1
        if self.launches_left == 0:
            self.fails[""] = "CUDA_ERROR_ILLEGAL_ADDRESS"

    def cuEventElapsedTime(self, start, end):
        return 3.2  # milliseconds

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        self.launched.append(arguments[0])
        if self._captured is None:
            self._one_launch()
            return
        if not self._captured or self._captured[-1] is not None:
            self._captured.append(None)


@pytest.fixture
def host(monkeypatch):
    host = HostDriver()
    monkeypatch.setattr(device_cuda, "call", host)
    return host


def open_file(tmp_path, change=lambda data: None, arrays=None, **changes) -> ArtifactFile:
    plan = tiny.cuda_plan()
    kernels = {kernel.name: (index, 1) for index, kernel in enumerate(plan.kernels)}
    program = tiny.program(plans={"cuda": plan}, binaries=(tiny.binary("sm_90", "cubin", kernels),), **changes)
    data = bytearray(tiny.file_bytes(program, arrays))
    change(data)
    path = tmp_path / "cuda.gqsa"
    path.write_bytes(data)
    return ArtifactFile.open(path)


def make_device(file: ArtifactFile, slots: int = 1) -> device_cuda.CudaDevice:
    with CheckedTensors(file, [name for name in file.tensors if name != "binary.cpu"]) as tensors:
        return device_cuda.CudaDevice(file.program, tensors, file.code, CONTEXT, slots=slots)


def captured_steps(program):
    """All that a device launches into graphs, in order: phases, bodies of prompts with the last token's logits, decode
    steps with given tokens, and twice ahead of them."""
    phases = dict(program.plans["cuda"].phases)
    decode = phases.pop("decode")
    bodies = [*phases["few_body"], *phases["last_logits"], *phases["prefill_body"], *phases["last_logits"]]
    return [*itertools.chain.from_iterable(phases.values()), *bodies, *decode * 3]


def at(address: int, like: np.ndarray) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * like.nbytes).from_address(address), like.dtype).reshape(like.shape)


def test_kernels_point_to_the_weights_that_the_file_holds(tmp_path, host):
    arrays = tiny.tensors()
    rope = rope_table(arrays["inv_freq"], 1.0, CONTEXT)
    with open_file(tmp_path) as file:
        device = make_device(file, slots=2)
        cache = np.zeros((2, CONTEXT, 1, 16), np.float32)
        steps = captured_steps(file.program)
        assert len(host.launched) == len(steps)
        seen, checked = {}, set()
        for step, pointers in zip(steps, host.launched, strict=True):
            for arg, address in zip(step.args, pointers, strict=True):
                if arg.name == "tokens" and address == device._buffers["argmax"][0]:
                    continue  # of a step that follows another one
                assert seen.setdefault((arg.kind, arg.name, arg.offset), address) == address
                expected = {"tensor": arrays.get(arg.name), "rope": rope, "k_cache": cache, "v_cache": cache}.get(
                    arg.kind
                )
                if expected is not None:
                    assert address % device_cuda.ALIGNMENT == 0
                    np.testing.assert_array_equal(at(address, expected), expected)
                    checked.add(arg.name)
        assert checked == {*arrays, "main", 0} - {"inv_freq", "binary.cpu"}
        device.close()
        device.close()
    assert host.calls.count("cuMemFree") == host.calls.count("cuMemFreeHost") == 1


def test_for_memcheck_everything_has_memory_of_its_own(tmp_path, host, monkeypatch):
    for name in ("_allocate", "close"):  # put back afterwards
        monkeypatch.setattr(device_cuda.CudaDevice, name, getattr(device_cuda.CudaDevice, name))
    hostile_plans.allocate_apart()
    arrays = tiny.tensors()
    with open_file(tmp_path) as file:
        device = make_device(file)
        assert set(device._addresses.values()) <= host._memory.keys()
        assert len(set(device._addresses.values())) == len(device._addresses)
        np.testing.assert_array_equal(
            at(device._addresses["tensor", "q.values"], arrays["q.values"]), arrays["q.values"]
        )
        arena = device._buffers["tokens"][0] - file.program.plans["cuda"].buffers[0].offset
        own = {*device._addresses.values(), *range(arena, arena + file.program.plans["cuda"].arena_bytes)}
        assert own >= {pointer for launched in host.launched for pointer in launched if pointer}
        device.close()
        device.close()
    assert host.calls.count("cuMemFree") == host.calls.count("cuMemAlloc") == 2 + len(device._addresses)


def test_rotary_tables_are_made_anew_in_their_place(tmp_path, host):
    arrays = {**tiny.tensors(), "long": np.array([0.5, 0.01], np.float32)}
    ropes = {"main": Rope("inv_freq", 4, 1.5, "long", 8)}
    with open_file(tmp_path, arrays=arrays, ropes=ropes) as file:
        device = make_device(file)
        tables = {name: rope_table(arrays[name], 1.5, CONTEXT) for name in ("inv_freq", "long")}
        places = [
            address
            for step, pointers in zip(captured_steps(file.program), host.launched, strict=True)
            for arg, address in zip(step.args, pointers, strict=True)
            if arg.kind == "rope"
        ]
        assert places
        for long, name in ((None, "inv_freq"), ({"main"}, "long"), (set(), "inv_freq")):
            if long is not None:
                device.fill_ropes(frozenset(long))
            for address in places:
                np.testing.assert_array_equal(at(address, tables[name]), tables[name])
        device.close()


def test_nothing_runs_before_all_weights_are_checked(tmp_path, host):
    weights = tiny.tensors()["q.crow_indices"].tobytes()

    def damage(data):
        data[data.index(weights) + 4] ^= 1

    with open_file(tmp_path, damage) as file, pytest.raises(FormatError, match="'q.crow_indices' is damaged"):
        make_device(file)
    assert "cuGraphLaunch" not in host.calls and "cuLaunchKernel" not in host.calls
    assert "cuMemcpyHtoDAsync" in host.calls and "cuMemFree" in host.calls


def test_steps_are_timed_kernel_by_kernel(tmp_path, host):
    with open_file(tmp_path) as file:
        device = make_device(file)
        phase = file.program.plans["cuda"].phases["decode"]
        captured = len(host.launched)
        seconds = device.step_seconds("decode", repeats=3)
        # Each kernel once, 32 times over in its own graph.
        assert seconds == pytest.approx([3.2e-3 / 32] * len(phase))
        timed = host.launched[captured:]
        assert len(timed) == 32 * len(phase)
        assert len(set(timed)) == len(phase) and set(timed) <= set(host.launched[:captured])
        assert host.calls.count("cuGraphExecDestroy") == len(phase)
        assert device.bandwidth() == pytest.approx(2 * 2**29 / 3.2e-3)
        device.close()
        assert host.calls.count("cuEventCreate") == host.calls.count("cuEventDestroy")


def test_rows_of_the_cache_come_and_go(tmp_path, host):
    with open_file(tmp_path) as file:
        device = make_device(file, slots=2)
        rng = np.random.default_rng(0)
        shapes, dtype = cache_shapes(file.program), NUMPY_DTYPES[file.program.kv_element]
        held = {(cache, layer): rng.standard_normal((5, width)).astype(dtype) for cache, layer, width in shapes}
        for place, rows in held.items():
            device.upload_rows(*place, rows)
        for place, rows in held.items():
            np.testing.assert_array_equal(device.download_rows(*place, 3), rows[:3])
            np.testing.assert_array_equal(device.download_rows(*place, 7)[5:], 0)
            assert device.download_rows(*place, 0).shape == (0, rows.shape[1])


def on_device(device, buffer: str, count: int) -> list[int]:
    """The beginning of a buffer in the memory that stands for the GPU's."""
    address, dtype, _ = device._buffers[buffer]
    return at(address, np.zeros(count, NUMPY_DTYPES[dtype])).tolist()


def test_inputs_reach_whatever_phase_they_are_for(tmp_path, host):
    with open_file(tmp_path) as file:
        device = make_device(file)
        device.upload("tokens", np.array([7]))
        state = launch_state(CONTEXT, 0, [3])
        device.upload("state", state)
        host.calls.clear()
        device.launch("decode")
        assert "cuMemcpyHtoDAsync" not in host.calls
        assert on_device(device, "tokens", 1) == [7] and on_device(device, "state", len(state)) == state.tolist()
        device.upload("tokens", np.array([9]))
        device.launch("last_logits")
        assert on_device(device, "tokens", 1) == [9]
        device.upload("tokens", np.array([4, 5]))
        device.launch("prefill_body")
        assert on_device(device, "tokens", 2) == [4, 5]
        device.launch("decode")
        assert on_device(device, "tokens", 2) == [4, 5]
        device.close()


class Chooser:
    """A model by arithmetic: the next token from the last one and its position."""

    def __init__(self, host, device):
        self.host, self.device, self.steps, self.draws = host, device, [], []
        host.compute = self

    @staticmethod
    def after(token: int, position: int) -> int:
        return (31 * token + 7 * position + 5) % 97

    def __call__(self):
        # A step that is given no token goes on with the last one chosen.
        given = self.device._buffers["tokens"][0] in self.host.copied
        (token,) = on_device(self.device, "tokens" if given else "argmax", 1)
        (n_tokens, context, *draw), (slot, position) = np.split(
            on_device(self.device, "state", state_elements(1)), [-2]
        )
        assert (n_tokens, context, slot) == (1, CONTEXT, 0) and position < CONTEXT
        self.steps.append((token, position))
        self.draws.append(np.array(draw, np.int32))
        at(self.device._buffers["argmax"][0], np.zeros(1, np.int32))[:] = self.after(token, position)

    def run(self, token: int, position: int, draw: np.ndarray = GREEDY) -> int:
        self.device.upload("tokens", np.array([token]))
        self.device.upload("state", launch_state(CONTEXT, 0, [position], draw))
        self.device.launch("decode")
        chosen = int(self.device.download("argmax", 1)[0])
        assert chosen == self.after(token, position) == self.device.download("argmax", 1)[0]
        return chosen


def test_steps_that_follow_one_another_start_ahead(tmp_path, host):
    with open_file(tmp_path) as file:
        device = make_device(file)
        model, token = Chooser(host, device), 3
        for position in range(6):
            token = model.run(token, position)
        # The second step shows that they follow one another; from then on one is always ahead.
        assert [position for _, position in model.steps] == [0, 1, 2, 3, 4, 5, 6]
        token = model.run(50, 4)  # elsewhere: what was ahead is dropped
        assert model.steps[-1] == (50, 4)
        token = model.run(token, 5)
        assert [position for _, position in model.steps[-2:]] == [5, 6]
        device.launch("last_logits")  # the cache may change: what was ahead counts no more
        before = len(model.steps)
        model.run(token, 6)
        assert len(model.steps) == before + 1
        for position in range(CONTEXT - 4, CONTEXT):  # none is ahead of the last position
            token = model.run(token, position)
        assert model.steps[-1][1] == CONTEXT - 1
        device.close()


def test_steps_ahead_draw_as_the_next_token_will_be(tmp_path, host):
    with open_file(tmp_path) as file:
        device = make_device(file)
        model, token = Chooser(host, device), 3
        draws = [first_draw(SamplingOptions(temperature=0.7, top_k=5), seed=2)]
        for position in range(5):
            token = model.run(token, position, draws[-1])
            draws.append(next_draw(draws[-1]))
        assert [position for _, position in model.steps] == [0, 1, 2, 3, 4, 5]
        np.testing.assert_array_equal(model.draws, draws)
        assert len({draw.tobytes() for draw in draws}) == 6
        model.run(token, 5, draws[3])  # another draw than was expected: what was ahead is dropped
        assert model.steps[-1] == (token, 5) and (model.draws[-1] == draws[3]).all()
        device.close()


def test_no_token_is_told_and_nothing_goes_on_with_it(tmp_path, host):
    with open_file(tmp_path) as file:
        device = make_device(file)
        model = Chooser(host, device)
        token = model.run(model.run(3, 0), 1)
        model.after = lambda token, position: -1
        device.upload("tokens", np.array([token]))
        device.upload("state", launch_state(CONTEXT, 0, [2]))
        device.launch("decode")
        device.download("argmax", 1)  # of the step that was ahead already
        model.run(5, 3)
        model.run(-1, 4)
        device.close()


PAIRS = {
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRelease", "cuStreamCreate": "cuStreamDestroy",
    "cuMemAlloc": "cuMemFree", "cuMemAllocHost": "cuMemFreeHost", "cuModuleLoadData": "cuModuleUnload",
    "cuGraphInstantiate": "cuGraphExecDestroy", "cuEventCreate": "cuEventDestroy",
}  # fmt: skip


@pytest.mark.parametrize(
    "function",
    ["cuStreamCreate", "cuMemAlloc", "cuMemAllocHost", "cuModuleLoadData", "cuGraphInstantiate", "cuMemcpyHtoDAsync"],
)
def test_memory_that_runs_out_while_it_opens_is_given_back(tmp_path, host, function):
    host.fails[function] = "CUDA_ERROR_OUT_OF_MEMORY"
    with open_file(tmp_path) as file, pytest.raises(DeviceError, match=f"{function} .* out of memory; use a smaller"):
        make_device(file)
    for made, freed in PAIRS.items():
        assert host.calls.count(freed) == host.calls.count(made) - (made == function), made


@pytest.fixture
def model(tmp_path, host):
    """A model over the host's driver that writes for ever, in graphs of its own."""
    with open_file(tmp_path) as file:
        device = make_device(file)
        address = device._buffers["argmax"][0]
        host.compute = lambda: at(address, np.zeros(1, np.int32)).fill(65)
        yield Model(file.program, Tokenizer(tiny.tokenizer_json()), device, CONTEXT)


def test_a_gpu_that_fails_ends_every_call_and_closes(model, host):
    host.launches_left = 5
    errors, began = [], threading.Barrier(3)

    def generate():
        began.wait()
        with pytest.raises(DeviceError) as error:
            list(model.generate("Once", max_new_tokens=20))
        errors.append(str(error.value))

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    first, *others = sorted(errors, key=len)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS: a kernel left its memory" in first and "GQSA_CUDA_STEPWISE=1" in first
    assert others == [f"the device failed before, and nothing runs on it any more: {first}"] * 2
    launches = host.calls.count("cuGraphLaunch")
    with pytest.raises(DeviceError, match="failed before"):
        model.score("Once more")
    assert host.calls.count("cuGraphLaunch") == launches
    model.close()
    for made, freed in PAIRS.items():
        assert host.calls.count(freed) >= (host.calls.count(made) if made != "cuEventCreate" else 0), made


def test_step_by_step_the_kernel_that_failed_is_named(tmp_path, host, monkeypatch):
    monkeypatch.setenv(device_cuda.STEPWISE_VARIABLE, "1")
    with open_file(tmp_path) as file:
        device = make_device(file)
        assert not {"cuGraphInstantiate", "cuStreamBeginCapture"} & set(host.calls)
        steps = file.program.plans["cuda"].phases["prefill_body"]
        device.upload("tokens", np.array([4, 5]))
        device.launch("prefill_body")
        assert on_device(device, "tokens", 2) == [4, 5] and len(host.launched) == len(steps)
        host.launches_left = 3
        with pytest.raises(DeviceError, match=f"^kernel {steps[2].kernel}: cuStreamSynchronize failed"):
            device.launch("prefill_body")
        device.close()


def test_memory_that_a_model_keeps_is_seen(tmp_path, host, monkeypatch, capsys):
    """`benchmarks/steady_memory.py`, where the GPU's memory is given back and where it is not."""
    open_file(tmp_path).close()
    arguments = ("--device", "cuda", "--warm-up", "1", "--opens", "3", "--generations", "2")
    monkeypatch.setattr(sys, "argv", ["steady_memory", str(tmp_path / "cuda.gqsa"), *arguments])
    assert steady_memory.main() == 0
    rows = json.loads(capsys.readouterr().out)["found"]
    assert [row["device_grown_mb"] for row in rows] == [0, 0]
    monkeypatch.setattr(HostDriver, "cuMemFree", lambda self, address: None)
    assert steady_memory.main() == 1
    rows = json.loads(capsys.readouterr().out)["found"]
    assert [row["device_grown_percent"] > 100 for row in rows] == [True, False]
