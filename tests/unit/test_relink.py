"""Kernels made anew from a file's launch plan: to relink it, to run it without its code, and to compare."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
from gqsa_runtime import Model, device_cuda, load, verify
from gqsa_runtime import rebuild as asked
from gqsa_runtime.errors import DeviceError, FormatError, InputError
from gqsa_runtime.reader import ArtifactFile

from gqsac import __version__
from gqsac.compiler import rebuild
from gqsac.compiler.passes import compile_cpu, compile_cuda
from gqsac.compiler.passes.compile import CPU_TARGETS, CUDA_TARGETS
from gqsac.compiler.passes.compile_cuda import CudaBinary
from gqsac.compiler.pipeline import BuildOptions, build
from gqsac.compiler.relink import relink
from gqsac.rounding import Rounding
from gqsac.sign import Signer
from tests.e2e.command import gqsac, refusal, succeed
from tests.format import gguf_bytes, tiny
from tests.format.other_code import with_code
from tests.format.signing import save_key
from tests.unit.compress_models import save_model

ALL = CUDA_TARGETS + CPU_TARGETS


def _compare(path):
    with ArtifactFile.open(path) as file:
        return rebuild.compare(file)


@contextlib.contextmanager
def fake_compilers(zig="zig 1", nvrtc="12.9", salt=""):
    """Compilers whose code is a digest of all that they are given, and a cache without real ones' code."""

    def code(*given) -> bytes:
        return hashlib.sha256(repr((salt, *given)).encode()).hexdigest().encode()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("GQSAC_CACHE", cache)
        patch.setattr(compile_cuda, "compile_cuda", lambda *given: CudaBinary(code(*given), "", 1, 0, 0, 0))
        patch.setattr(compile_cpu, "compile_cpu", lambda sources, target, stopped: code(sources, target))
        patch.setattr(compile_cuda, "nvrtc_version", lambda: nvrtc)
        patch.setattr(compile_cpu, "compiler_version", lambda: zig)
        yield


@pytest.fixture(autouse=True)
def compilers():
    with fake_compilers():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", "qwen2")


@pytest.fixture(scope="module")
def built(tmp_path_factory, source):
    """A file for all targets; its linears are of every layout."""
    file = tmp_path_factory.mktemp("built") / "all.gqsa"
    with fake_compilers():
        made(source, file, *ALL)
    return file


def made(source, file, *targets):
    build(source, file, BuildOptions(targets=targets, rounding=Rounding(4, 32, 0.0), cache=False))
    return file


def edited(built, path, change=lambda program: program, arrays=lambda arrays: arrays, **metadata):
    """A copy of a file with changes in its plan, its tensors and its metadata; digests are made anew."""
    with ArtifactFile.open(built) as file:
        held = arrays({name: file.read(name) for name in file.tensors})
        texts = {**file.metadata, "gqsa.program": change(file.program).to_json(), **metadata}
    path.write_bytes(gguf_bytes.gguf({key: text for key, text in texts.items() if text is not None}, held))
    return path


def relinked(built, folder, *targets):
    """A file for fewer targets."""
    relink(built, folder / f"{'-'.join(targets)}.gqsa", targets, cache=False)
    return folder / f"{'-'.join(targets)}.gqsa"


def rename_kernel(program):
    """The program with another name for the first kernel of its plan for CPUs."""
    plan = program.plans["cpu"]
    old, new = plan.kernels[0].name, "other_name"
    kernels = (dataclasses.replace(plan.kernels[0], name=new), *plan.kernels[1:])
    phases = {
        phase: tuple(dataclasses.replace(step, kernel=new) if step.kernel == old else step for step in steps)
        for phase, steps in plan.phases.items()
    }
    return replace_plan(program, "cpu", kernels=kernels, phases=phases)


def replace_launch(program):
    """The program with another block for the first kernel of its plan for GPUs."""
    first, *others = program.plans["cuda"].kernels
    launches = {target: dataclasses.replace(launch, block=64) for target, launch in first.launches.items()}
    return replace_plan(program, "cuda", kernels=(dataclasses.replace(first, launches=launches), *others))


def replace_plan(program, family, **changes):
    plans = {**program.plans, family: dataclasses.replace(program.plans[family], **changes)}
    return dataclasses.replace(program, plans=plans)


def test_the_same_targets_are_the_same_bytes(built, tmp_path):
    told = []
    done = relink(built, tmp_path / "again.gqsa", cache=False, progress=lambda *stage: told.append(stage))
    assert (tmp_path / "again.gqsa").read_bytes() == built.read_bytes()
    assert done.targets == ALL and done.file_bytes == built.stat().st_size and done.n_cached == 0
    assert {stage for stage, _, _ in told} == {"compile", "write"} and told[-1][1] == told[-1][2]


@pytest.mark.parametrize("targets", [("x86_64_v3",), ("sm_90", "compute_80"), ("sm_80", "aarch64")])
def test_fewer_targets_are_the_bytes_of_a_build_for_them(built, source, tmp_path, targets):
    relink(built, tmp_path / "fewer.gqsa", targets, cache=False)
    made(source, tmp_path / "built.gqsa", *targets)
    assert (tmp_path / "fewer.gqsa").read_bytes() == (tmp_path / "built.gqsa").read_bytes()


def test_more_targets_and_in_place(built, tmp_path):
    file = tmp_path / "file.gqsa"
    relink(built, file, ("sm_90", "x86_64_v3"), cache=False)
    relink(file, file, ALL, cache=False)
    assert file.read_bytes() == built.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["file.gqsa"]


@pytest.mark.parametrize("target", ["sm_90", "aarch64"])
def test_a_plan_for_the_other_family_is_made_from_the_one_there_is(built, tmp_path, target):
    one = relinked(built, tmp_path, target)
    relink(one, tmp_path / "both.gqsa", ALL, cache=False)
    assert (tmp_path / "both.gqsa").read_bytes() == built.read_bytes()


def test_another_compiler_is_recorded(built, tmp_path):
    with fake_compilers(zig="zig 2", salt="2"):
        relink(built, tmp_path / "newer.gqsa", ("aarch64",), cache=False)
    with ArtifactFile.open(tmp_path / "newer.gqsa") as file, ArtifactFile.open(built) as before:
        recorded, first = json.loads(file.metadata["gqsa.compiler"]), json.loads(before.metadata["gqsa.compiler"])
        assert recorded == {**first, "zig": "zig 2", "nvrtc": None, "targets": ["aarch64"]}
        assert (file.read("binary.aarch64") != before.read("binary.aarch64")).any()
        weights = [name for name in before.tensors if not name.startswith("binary.")]
        assert [name for name in file.tensors if not name.startswith("binary.")] == weights
        assert all((file.read(name) == before.read(name)).all() for name in weights)


def test_names_and_launches_are_made_anew(built, tmp_path):
    older = edited(built, tmp_path / "older.gqsa", lambda program: replace_launch(rename_kernel(program)))
    relink(older, tmp_path / "anew.gqsa", cache=False)
    assert (tmp_path / "anew.gqsa").read_bytes() == built.read_bytes()


def test_what_relink_refuses(built, tmp_path):
    def refused(message, file=built, targets=(), error=InputError, **metadata):
        path = edited(built, tmp_path / "changed.gqsa", **metadata) if metadata else file
        with pytest.raises(error, match=message):
            relink(path, tmp_path / "out.gqsa", targets, cache=False)
        assert not list(tmp_path.glob("*out.gqsa*"))

    cpu = edited(relinked(built, tmp_path, "aarch64"), tmp_path / "cpu.gqsa", rename_kernel)
    refused("plan for cpu.*other_name.*so that none for cuda can be made", cpu, ("sm_90",), FormatError)
    tiny_file = tmp_path / "tiny.gqsa"
    tiny_file.write_bytes(tiny.file_bytes())
    refused("plan for cpu.* so that none for cuda can be made from it", tiny_file, ("sm_90",), FormatError)
    refused("unknown target 'sm_91'", targets=("sm_91",))
    refused("no such file", tmp_path / "nowhere.gqsa")
    refused("metadata key 'more', which gqsac never writes", more=1)
    refused("'tokenizer.chat_template' without a value", **{"tokenizer.chat_template": ""})
    for text in ("[]", "{", "[" * 100_000):
        refused("'gqsa.compiler' is no JSON object", error=FormatError, **{"gqsa.compiler": text})
    refused("'gqsa.compiler' is missing", error=FormatError, **{"gqsa.compiler": None})
    with pytest.raises(InputError, match="which is a folder"):
        relink(built, tmp_path, cache=False)
    damaged = tmp_path / "damaged.gqsa"
    with ArtifactFile.open(built) as file:
        info = next(info for name, info in file.tensors.items() if name.endswith(".records"))
    data = bytearray(built.read_bytes())
    data[info.offset] ^= 1
    damaged.write_bytes(data)
    refused("damaged.gqsa: tensor .* is damaged", damaged, error=FormatError)


@pytest.mark.parametrize("target", ["cpu", "sm_90", "riscv64"])
def test_targets_that_cannot_be_made_here(built, tmp_path, target):
    one = relinked(built, tmp_path, "aarch64")

    def rename(program):
        return dataclasses.replace(program, binaries=(dataclasses.replace(program.binaries[0], target=target),))

    odd = edited(one, tmp_path / "odd.gqsa", rename)
    message = f"odd.gqsa: the file has a shared_object for '{target}', which gqsac .* does not make"
    with pytest.raises(FormatError, match=message):
        relink(odd, tmp_path / "out.gqsa", cache=False)
    with pytest.raises(FormatError, match=message):
        _compare(odd)
    relink(odd, tmp_path / "out.gqsa", ("aarch64",), cache=False)
    assert (tmp_path / "out.gqsa").read_bytes() == one.read_bytes()


def test_weights_in_the_place_of_kernels(built, tmp_path):
    odd = edited(
        relinked(built, tmp_path, "aarch64"),
        tmp_path / "odd.gqsa",
        arrays=lambda held: {**held, "binary.x86_64_v3": np.zeros(3, np.int16)},
    )
    relink(odd, tmp_path / "out.gqsa", ("aarch64",), cache=False)  # it is kept, whatever it is for
    assert (tmp_path / "out.gqsa").read_bytes() == odd.read_bytes()
    with pytest.raises(InputError, match="odd.gqsa keeps weights in 'binary.x86_64_v3', the place of kernels"):
        relink(odd, tmp_path / "out.gqsa", ("x86_64_v3",), cache=False)


def test_relink_as_a_command(built, tmp_path):
    args = ("relink", built, "-o", tmp_path / "out.gqsa", "--target", "aarch64", "--no-cache")
    assert json.loads(succeed(*args, "--json").stdout)["targets"] == ["aarch64"]
    assert "1 binaries compiled, 0 from the cache" in succeed(*args).stderr
    assert "unknown target 'arm'" in refusal(gqsac("relink", built, "-o", tmp_path / "no.gqsa", "--target", "arm"))


# Comparing the code of a file.


def test_every_kernel_is_compared(built):
    found = _compare(built)
    assert found.same and found.n_differing == 0
    assert found.recorded == found.installed == f"gqsac {__version__}, nvrtc 12.9, zig 1"
    with ArtifactFile.open(built) as file:
        expected = [(binary.target, name) for binary in file.program.binaries for name in binary.kernels]
    assert sorted((row.target, row.kernel) for row in found.kernels) == sorted(expected)
    assert all(row.verdict == asked.SAME and row.in_file == row.made_here for row in found.kernels)


def flip(place):
    def change(code):
        code[place] ^= 1
        return code

    return change


def test_changed_code_is_found(built, tmp_path):
    with ArtifactFile.open(built) as file:
        binary = next(binary for binary in file.program.binaries if binary.target == "sm_90")
    name, (offset, _) = sorted(binary.kernels.items())[2]
    changed = with_code(built, tmp_path / "changed.gqsa", "sm_90", flip(offset))
    found = _compare(changed)
    differing = [row for row in found.kernels if row.verdict != asked.SAME]
    assert [(row.target, row.kernel, row.verdict) for row in differing] == [("sm_90", name, asked.DIFFERENT)]
    assert differing[0].in_file != differing[0].made_here
    result = gqsac("verify", changed, "--rebuild")
    n = len(found.kernels)
    assert result.exit_code == 1 and f"1 of {n} kernels differ from those that gqsac" in result.stderr
    assert ["sm_90", name, "different"] in [line.split() for line in result.stdout.splitlines()]
    facts = json.loads(gqsac("verify", changed, "--rebuild", "--json").stdout)
    assert not facts["ok"] and sum(row["verdict"] == "different" for row in facts["rebuilt"]["kernels"]) == 1
    assert succeed("verify", changed).exit_code == 0  # digests alone do not tell


def test_what_is_compared_is_what_is_signed(built, tmp_path, monkeypatch):
    """Another file takes the name of the signed one as soon as that is verified."""
    _, public = save_key(tmp_path / "maker.pem")
    file, other = tmp_path / "file.gqsa", with_code(built, tmp_path / "other.gqsa", "sm_90", flip(0))
    shutil.copy(built, file)
    Signer(tmp_path / "maker.pem").sign(file)
    verify_open = verify.verify_open

    def swap(*given):
        found = verify_open(*given)
        os.replace(other, file)
        return found

    monkeypatch.setattr(verify, "verify_open", swap)
    succeed("verify", file, "--rebuild", "--require-signature", public)
    message = refusal(gqsac("verify", file, "--rebuild", "--require-signature", public))
    assert f"{file}: its SHA-256 is" in message
    message = refusal(gqsac("run", file, "-p", "Hi", "--rebuild-kernels", "--require-signature", public))
    assert f"{file}: its SHA-256 is" in message


def test_a_signature_is_asked_for_and_made_anew(built, tmp_path):
    """Other targets are other bytes, which the old signature does not vouch for."""
    key, public = save_key(tmp_path / "maker.pem")
    file, made = tmp_path / "file.gqsa", tmp_path / "made.gqsa"
    shutil.copy(built, file)
    asked = ("relink", file, "-o", made, "--target", "sm_90", "--require-signature", public)
    assert "cannot be read" in refusal(gqsac(*asked)) and not made.exists()
    Signer(key).sign(file)
    for command in (["inspect"], ["doctor"], ["check"], ["verify"]):
        succeed(*command, file, "--require-signature", public)
    assert "note" not in succeed(*asked).stderr
    assert f"signed: {made}.sig" in succeed(*asked, "--sign", key).stderr
    succeed("inspect", made, "--require-signature", public)
    # The file itself, with the same bytes and with others.
    over = ("relink", file, "-o", file)
    assert "note" not in succeed(*over).stderr
    note = succeed(*over, "--target", "sm_90").stderr
    assert f"note: {file}.sig is the signature of other bytes" in note
    for command in ("inspect", "doctor"):
        assert "its SHA-256 is" in refusal(gqsac(command, file, "--require-signature", public))
    assert gqsac("doctor", "--require-signature", public).exit_code == 2
    assert gqsac("inspect", file, "--signature", f"{file}.sig").exit_code == 2


def test_code_between_the_kernels_is_found(built, tmp_path):
    longer = with_code(built, tmp_path / "longer.gqsa", "aarch64", lambda code: code + b"\1")
    found = _compare(longer)
    differing = [(row.target, row.kernel, row.verdict) for row in found.kernels if row.verdict != asked.SAME]
    assert differing == [("aarch64", "(between kernels)", asked.DIFFERENT)]


def test_another_compiler_is_told_apart_and_is_no_pass(built):
    with fake_compilers(zig="zig 2", salt="2"):
        found = _compare(built)
    verdicts = {row.target: row.verdict for row in found.kernels}
    assert verdicts["aarch64"] == asked.DIFFERENT_COMPILER and verdicts["sm_90"] == asked.DIFFERENT
    assert not found.same and "zig 2" in found.installed and "zig 1" in found.recorded
    with fake_compilers(zig="zig 2"):  # that makes the same code
        assert _compare(built).same


def test_verify_names_the_compilers(built):
    result = succeed("verify", built, "--rebuild")
    assert "kernels made anew by gqsac" in result.stdout and "the file says gqsac" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["aarch64", "all", "same"] in lines and sum(line[:1] == ["sm_90"] for line in lines) > 20


def test_a_comparison_that_cannot_be_made_is_an_error(built, tmp_path, monkeypatch):
    other = edited(built, tmp_path / "other.gqsa", rename_kernel)
    message = refusal_after_sound(gqsac("verify", other, "--rebuild"))
    assert "plan for cpu, by gqsac '0.1.0' as the file says, is not one that gqsac" in message
    assert "the kernel other_name would have another name" in message and "gqsac build" in message
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_cpu, "compiler_version", no_compiler)
        assert "no zig here" in refusal_after_sound(gqsac("verify", built, "--rebuild"))
    monkeypatch.setitem(sys.modules, "gqsac.compiler.rebuild", None)
    monkeypatch.delattr("gqsac.compiler.rebuild")
    assert "needs the compiler, the package gqsac" in refusal(gqsac("verify", built, "--rebuild"))


def test_a_record_of_the_compiler_that_cannot_be_printed(built, tmp_path):
    with ArtifactFile.open(built) as file:
        record = json.loads(file.metadata["gqsa.compiler"])
    odd = edited(
        built, tmp_path / "odd.gqsa", **{"gqsa.compiler": json.dumps({**record, "gqsac": "\33[2J", "zig": [1]})}
    )
    found = _compare(odd)
    assert found.recorded == repr("gqsac \33[2J, nvrtc 12.9") and found.same


def no_compiler():
    raise DeviceError("no zig here")


def refusal_after_sound(result) -> str:
    assert result.exit_code == 1 and "is sound" in result.stdout and "same" not in result.stdout
    return result.stderr


# Running a file without its code.


@pytest.fixture
def opened(monkeypatch):
    """Stands in for devices: what each was given."""
    given = []

    def open_fake(kind, ordinal, program, tensors, binaries, context, threads, clock):
        (binary,) = program.binaries
        given.append((binary, binaries(binary)))
        raise DeviceError("far enough")

    monkeypatch.setattr(load, "_open", open_fake)
    monkeypatch.setattr(load.device_cpu, "supported_targets", lambda: ("x86_64_v4", "x86_64_v3"))
    return given


def test_no_code_of_the_file_is_read(built, tmp_path, opened, monkeypatch):
    with ArtifactFile.open(built) as file:
        expected = file.code(next(held for held in file.program.binaries if held.target == "x86_64_v4"))
    foreign = relinked(built, tmp_path, "aarch64")  # has kernels for another machine alone: they are not asked for
    read = ArtifactFile.read
    monkeypatch.setattr(
        ArtifactFile, "read", lambda file, name: pytest.fail(name) if "binary" in name else read(file, name)
    )
    for path in (built, foreign):
        with pytest.raises(DeviceError, match="far enough"):
            Model.open(path, "cpu", kernels="rebuild")
        binary, code = opened.pop()
        assert (binary.target, binary.kernels, code) == ("x86_64_v4", {"": (0, len(expected))}, expected)


@pytest.mark.parametrize(("minor", "target"), [(0, "sm_80"), (7, "sm_86"), (9, "sm_89")])
def test_a_gpu_gets_the_best_kernels_that_can_be_made_for_it(built, tmp_path, opened, monkeypatch, minor, target):
    gpu = SimpleNamespace(name="Fake GPU", major=8, minor=minor, arch=f"sm_8{minor}")
    monkeypatch.setattr(device_cuda, "Gpu", lambda ordinal: gpu)
    monkeypatch.setattr(device_cuda, "free_bytes", lambda ordinal: contextlib.nullcontext(1 << 40))
    with pytest.raises(DeviceError, match="far enough"):
        Model.open(relinked(built, tmp_path, "sm_120"), "cuda", kernels="rebuild")
    binary, code = opened.pop()
    with ArtifactFile.open(built) as file:
        (expected,) = (held for held in file.program.binaries if held.target == target)
        assert binary == expected and code == file.code(expected)


def test_what_rebuilding_refuses(built, tmp_path, opened, monkeypatch):
    other = edited(built, tmp_path / "other.gqsa", rename_kernel)
    with pytest.raises(
        FormatError, match="other.gqsa: the launch plan for cpu.* is not one that gqsac .* other_name would"
    ):
        Model.open(other, "cpu", kernels="rebuild")
    with pytest.raises(InputError, match="kernels is 'none', expected 'file' or 'rebuild'"):
        Model.open(built, kernels="none")
    cuda = relinked(built, tmp_path, "sm_90")
    with pytest.raises(DeviceError, match="its CPU targets are none"):
        Model.open(cuda, "cpu", kernels="rebuild")
    monkeypatch.setitem(sys.modules, "gqsac.compiler.rebuild", None)
    monkeypatch.delattr("gqsac.compiler.rebuild")
    for command in ("run", "bench"):
        message = refusal(gqsac(command, built, "--rebuild-kernels", *(["-p", "x"] if command == "run" else [])))
        assert "making kernels anew needs the compiler, the package gqsac" in message and "pip install" in message
    assert opened == []
