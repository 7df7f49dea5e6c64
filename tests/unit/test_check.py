"""Whether a file runs here: what `check` says is what `Model.open` then does, and no weight is read for it."""

import contextlib
import dataclasses

import pytest
from gqsa_runtime import Check, Model, device_cuda, load, memory
from gqsa_runtime.errors import DeviceError, FormatError, InputError
from gqsa_runtime.reader import ArtifactFile

from tests.format import tiny
from tests.unit import fake_device

PLANS = {"cpu": tiny.plan(), "cuda": tiny.cuda_plan()}


@pytest.fixture
def both(tmp_path):
    """A file with plans for CPUs and GPUs."""
    kernels = {kernel.name: (0, 10) for kernel in PLANS["cuda"].kernels}
    binaries = (*tiny.program().binaries, tiny.binary("sm_90", "cubin", kernels))
    file = tmp_path / "both.gqsa"
    file.write_bytes(tiny.file_bytes(tiny.program(plans=PLANS, binaries=binaries)))
    return str(file)


@pytest.fixture
def machine(monkeypatch):
    """A machine whose devices have room for so many positions of a file, None for those that it lacks."""

    def make(path, cpu, cuda):
        with ArtifactFile.open(path) as file:
            a_token = memory.context_bytes(file.program, 1)
            free = {
                family: memory.needed_bytes(file.program, file.tensors, family, 0) + room * a_token
                for family, room in (("cpu", cpu), ("cuda", cuda))
                if room is not None
            }

        @contextlib.contextmanager
        def on_gpu(ordinal):
            yield free["cuda"] + memory.CUDA_HEADROOM_BYTES

        monkeypatch.setattr(load, "probe", lambda kind, program, ordinal: (kind in free, f"about {kind}"))
        monkeypatch.setattr(memory, "free_cpu_bytes", lambda: free["cpu"] + memory.CPU_HEADROOM_BYTES)
        monkeypatch.setattr(device_cuda, "free_bytes", on_gpu)
        monkeypatch.setattr(
            load, "_open", lambda k, o, program, t, b, context, *_: fake_device.FakeDevice(program, context)
        )

    return make


@pytest.mark.parametrize("context", [None, 10, 20, "auto"])
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
@pytest.mark.parametrize("room", [(99, 99), (15, None), (99, 15), (-1, 99), (99, 0), (None, None)])
def test_check_says_what_open_does(both, machine, device, context, room):
    machine(both, *room)
    found = Model.check(both, device, context)
    try:
        with Model.open(both, device, context) as model:
            assert found.runs
            assert (found.context, found.reason) == (model.context, model.device_reason)
            assert found.context_reason == model.context_reason
            assert found.device == {"cpu": "cpu", "cuda": device if ":" in device else "cuda:0"}[model.family]
            assert found.needed_bytes <= found.free_bytes and found.context <= found.largest_context
    except DeviceError as error:
        assert not found.runs and found.reason == str(error)
        assert found.context_reason is None


def test_a_gpu_that_is_too_small(both, machine):
    machine(both, 99, 15)
    found = Model.check(both, context=20)
    assert (found.runs, found.device, found.context, found.largest_context) == (False, "cuda:0", 20, 15)
    assert found.needed_bytes - found.free_bytes == 5 * (2 * 16 * 4 + 4 * 4)
    assert "a context of 15 fits" in found.reason
    gpu, cpu = found.devices
    assert (gpu.device, gpu.usable, gpu.free_bytes, gpu.largest_context) == ("cuda:0", True, found.free_bytes, 15)
    assert (cpu.device, cpu.usable, cpu.largest_context) == ("cpu", True, tiny.CONTEXT)
    assert [cost.context for cost in gpu.costs] == [tiny.CONTEXT] and gpu.costs[0].total > found.free_bytes
    assert Model.check(both).context == 15  # what nobody asked for is what fits
    machine(both, 99, -1)
    found = Model.check(both)
    assert not found.runs and found.largest_context == 0 and "not even one position fits" in found.reason


def test_a_gpu_whose_memory_cannot_be_had(both, machine, monkeypatch):
    machine(both, 99, 99)

    def fail(ordinal):
        raise DeviceError("the GPU is taken")

    monkeypatch.setattr(device_cuda, "free_bytes", fail)
    found = Model.check(both)
    assert (found.runs, found.reason, found.device, found.context) == (False, "the GPU is taken", "cuda:0", None)
    assert not found.devices[0].usable and found.devices[1].usable
    assert Model.check(both, "cpu").runs


def test_memory_that_the_system_does_not_tell(both, machine, monkeypatch):
    machine(both, 99, None)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: None)
    found = Model.check(both)
    assert found.runs and found.context == tiny.CONTEXT and found.free_bytes is found.largest_context is None


def test_the_header_alone_is_read(path, machine, monkeypatch):
    machine(path, 99, None)
    monkeypatch.setattr(ArtifactFile, "read", lambda *args: pytest.fail("read"))
    found = Model.check(path)
    assert found.runs and found.name == "tiny" and found.max_context == tiny.CONTEXT
    assert found.devices[0].costs == ()  # it has no plan for GPUs
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.runs = False
    assert isinstance(found, Check)


def test_what_check_refuses(tmp_path, path):
    wrong = tmp_path / "wrong.gqsa"
    wrong.write_bytes(tiny.file_bytes(tiny.program(plans={"cpu": tiny.plan(prefill_chunk=1000)})))
    with pytest.raises(FormatError, match="wrong.gqsa: the file's launch plan"):
        Model.check(wrong)
    wrong.write_bytes(tiny.file_bytes()[:1000])
    with pytest.raises(FormatError, match="wrong.gqsa: the file is truncated"):
        Model.check(wrong)
    with pytest.raises(InputError, match="no such file"):
        Model.check(tmp_path / "nowhere")
    with pytest.raises(InputError, match="the device is 'tpu'"):
        Model.check(path, "tpu")
    with pytest.raises(InputError, match="context is 33.*1 to 32"):
        Model.check(path, context=33)
