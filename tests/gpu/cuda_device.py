"""Runs kernels on the machine's GPU through the CUDA driver alone: no toolkit, no PyTorch."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gqsa_runtime.program import Launch

from gqsac.compiler.cuda_launch import launch
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.compile_cuda import compile_cuda
from gqsac.compiler.passes.render import headers, render

_ALIGNMENT = 256  # of device allocations


def _checked(result):
    """The values of a driver call. Raises RuntimeError with the driver's name of the error."""
    code, *values = result
    if code != 0:
        raise RuntimeError(f"the CUDA driver answered {code.name}")
    return values[0] if len(values) == 1 else values


class Gpu:
    """The first GPU, through its primary context."""

    def __init__(self):
        from cuda.bindings import driver

        self.driver = driver
        _checked(driver.cuInit(0))
        self.device = _checked(driver.cuDeviceGet(0))
        _checked(driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(self.device))))

    def attribute(self, name: str) -> int:
        """A CU_DEVICE_ATTRIBUTE_ by its name."""
        attribute = getattr(self.driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return _checked(self.driver.cuDeviceGetAttribute(attribute, self.device))

    @property
    def target(self) -> str:
        """Such as "sm_90"."""
        return f"sm_{self.attribute('COMPUTE_CAPABILITY_MAJOR')}{self.attribute('COMPUTE_CAPABILITY_MINOR')}"

    def load(self, data: bytes, name: str, shared_bytes: int):
        """A function of a cubin or PTX, allowed its dynamic shared memory. The module stays loaded."""
        module = _checked(self.driver.cuModuleLoadData(data))
        function = _checked(self.driver.cuModuleGetFunction(module, name.encode()))
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(self.driver.cuFuncSetAttribute(function, attribute, shared_bytes))
        # All kernels of a chain must split the L1 alike, or the next one cannot start early.
        carveout = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _checked(self.driver.cuFuncSetAttribute(function, carveout, 100))
        return function

    def allocate(self, nbytes: int) -> int:
        return int(_checked(self.driver.cuMemAlloc(max(nbytes, 1))))  # none of 0 bytes

    def free(self, address: int) -> None:
        _checked(self.driver.cuMemFree(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        _checked(self.driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))

    def download(self, array: np.ndarray, address: int) -> None:
        _checked(self.driver.cuMemcpyDtoH(array.ctypes.data, address, array.nbytes))

    def launch(self, function, launch: Launch, pointers: list, stream=0, dependent=False) -> None:
        """Pointers are device addresses or None. dependent: programmatic dependent launch, sm_90 and later."""
        driver = self.driver
        arguments = (tuple(p or 0 for p in pointers), (ctypes.c_void_p,) * len(pointers))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared_bytes, driver.CUstream(int(stream))
        if dependent:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        _checked(driver.cuLaunchKernelEx(config, function, arguments, 0))

    def synchronize(self) -> None:
        _checked(self.driver.cuCtxSynchronize())


class GpuKernels:
    """Kernels compiled for one target: "sm_XX" (a cubin) or "compute_XX" (PTX, assembled by the driver)."""

    def __init__(self, gpu: Gpu, kernels: dict[KernelSpec, str], target: str, change=lambda text: text):
        """change: of the headers' texts, to measure what a part of a kernel costs."""
        self._gpu, self._target = gpu, target
        texts = {name: change(text) for name, text in headers("cuda").items()}

        def compile_one(item):
            spec, name = item
            return compile_cuda(render("cuda", spec, name), target, name, texts).data

        with ThreadPoolExecutor() as pool:
            binaries = list(pool.map(compile_one, kernels.items()))
        self._functions = {
            spec: gpu.load(data, name, launch(spec, 1, target).shared_bytes)
            for (spec, name), data in zip(kernels.items(), binaries, strict=True)
        }

    def function(self, spec: KernelSpec):
        """What Gpu.launch takes."""
        return self._functions[spec]

    def run(self, problem, max_tokens: int) -> None:
        """Runs a cases.Problem: its arguments change in place. Overlapping arguments overlap there too."""
        gpu, copies = self._gpu, []
        for root in problem.roots():
            allocation = gpu.allocate(root.nbytes + _ALIGNMENT)
            address = allocation + root.ctypes.data % _ALIGNMENT  # so that every view is aligned as here
            gpu.upload(address, root)
            copies.append((root, allocation, address))
        pointers = [None if a is None else self._locate(a, copies) for a in problem.arguments]
        gpu.launch(self._functions[problem.spec], launch(problem.spec, max_tokens, self._target), pointers)
        gpu.synchronize()
        for root, allocation, address in copies:
            gpu.download(root, address)
            gpu.free(allocation)

    @staticmethod
    def _locate(array, copies) -> int:
        for root, _, address in copies:
            offset = array.ctypes.data - root.ctypes.data
            if 0 <= offset < root.nbytes:
                return address + offset
        raise ValueError("an argument lies in none of the roots")
