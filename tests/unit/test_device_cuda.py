"""The CUDA device over a driver of host memory: what it copies where before anything could run."""

import ctypes

import numpy as np
import pytest
from gqsa_runtime import device_cuda
from gqsa_runtime.checked_tensors import CheckedTensors
from gqsa_runtime.errors import FormatError
from gqsa_runtime.program import NUMPY_DTYPES, Binary
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.rope import rope_table
from gqsa_runtime.session import cache_shapes

from tests.format import tiny
from tests.format.tiny import CONTEXT

driver = pytest.importorskip("cuda.bindings.driver")


class HostDriver:
    """The driver calls of device_cuda, with memory of the host for the GPU's. calls: names in order."""

    def __init__(self):
        self.calls: list[str] = []
        self.launched: list[tuple[int, ...]] = []  # the pointers of each kernel in a graph
        self._memory: dict[int, np.ndarray] = {}

    def __call__(self, function: str, *args):
        self.calls.append(function)
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

    def cuMemsetD8Async(self, address, value, count, stream):
        ctypes.memset(address, value, count)

    def cuMemcpyHtoDAsync(self, target, source, n_bytes, stream):
        ctypes.memmove(target, source, n_bytes)

    def cuMemcpyDtoHAsync(self, target, source, n_bytes, stream):
        ctypes.memmove(target, source, n_bytes)

    def cuEventElapsedTime(self, start, end):
        return 3.2  # milliseconds

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        self.launched.append(arguments[0])


@pytest.fixture
def host(monkeypatch):
    host = HostDriver()
    monkeypatch.setattr(device_cuda, "call", host)
    return host


def open_file(tmp_path, change=lambda data: None) -> ArtifactFile:
    plan = tiny.cuda_plan()
    kernels = {kernel.name: (index, 1) for index, kernel in enumerate(plan.kernels)}
    program = tiny.program(plans={"cuda": plan}, binaries=(Binary("sm_90", "cubin", "binary.cpu", kernels),))
    data = bytearray(tiny.file_bytes(program))
    change(data)
    path = tmp_path / "cuda.gqsa"
    path.write_bytes(data)
    return ArtifactFile.open(path)


def make_device(file: ArtifactFile, slots: int = 1) -> device_cuda.CudaDevice:
    with CheckedTensors(file, [name for name in file.tensors if name != "binary.cpu"]) as tensors:
        code = file.read("binary.cpu").tobytes()
        return device_cuda.CudaDevice(file.program, tensors, lambda binary: code, CONTEXT, slots=slots)


def at(address: int, like: np.ndarray) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * like.nbytes).from_address(address), like.dtype).reshape(like.shape)


def test_kernels_point_to_the_weights_that_the_file_holds(tmp_path, host):
    arrays = tiny.tensors()
    rope = rope_table(arrays["inv_freq"], 1.0, CONTEXT)
    with open_file(tmp_path) as file:
        device = make_device(file, slots=2)
        cache = np.zeros((2, CONTEXT, 1, 16), np.float32)
        steps = list(file.program.plans["cuda"].steps())
        assert len(host.launched) == len(steps)
        seen, checked = {}, set()
        for step, pointers in zip(steps, host.launched, strict=True):
            for arg, address in zip(step.args, pointers, strict=True):
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
        assert host.calls.count("cuEventCreate") == host.calls.count("cuEventDestroy")
        device.close()


def test_rows_of_the_cache_come_and_go(tmp_path, host):
    with open_file(tmp_path) as file:
        device = make_device(file, slots=2)
        rng = np.random.default_rng(0)
        shapes, dtype = cache_shapes(file.program), NUMPY_DTYPES[file.program.kv_dtype]
        held = {(cache, layer): rng.standard_normal((5, width)).astype(dtype) for cache, layer, width in shapes}
        for place, rows in held.items():
            device.upload_rows(*place, rows)
        for place, rows in held.items():
            np.testing.assert_array_equal(device.download_rows(*place, 3), rows[:3])
            np.testing.assert_array_equal(device.download_rows(*place, 7)[5:], 0)
            assert device.download_rows(*place, 0).shape == (0, rows.shape[1])
