"""The cache of machine code: what its key covers, and what happens to entries that are damaged or unwritable."""

import threading

import pytest

from gqsac.compiler.passes import compile as compiling
from gqsac.compiler.passes import compile_cpu, compile_cuda
from gqsac.compiler.passes.compile import Compiled, compile_all, default_cache_dir
from gqsac.compiler.passes.compile_cuda import CudaBinary
from gqsac.errors import DeviceError

SOURCES = {"cuda": {"one": "text of one", "two": "text of two"}, "cpu": {"one": "C of one", "two": "C of two"}}
HEADERS = {"cuda": {"a.cuh": "header a"}, "cpu": {"a.h": "header a"}}


@pytest.fixture
def compilers(monkeypatch):
    """Stands in for both compilers; calls lists what they were asked for."""
    calls, lock = [], threading.Lock()

    def cuda(source, target, name, headers):
        with lock:
            calls.append((target, name))
        return CudaBinary(f"{target} {name} {source} {headers}".encode(), f"log of {name}", 32, 4, 8, 16)

    def cpu(sources, target, stopped):
        with lock:
            calls.append((target, ""))
        return f"{target} {sources}".encode()

    monkeypatch.setattr(compile_cuda, "compile_cuda", cuda)
    monkeypatch.setattr(compile_cpu, "compile_cpu", cpu)
    monkeypatch.setattr(compile_cuda, "nvrtc_version", lambda: "12.9")
    monkeypatch.setattr(compile_cpu, "compiler_version", lambda: "zig 1")
    monkeypatch.setattr(compiling, "headers", lambda family: HEADERS[family])
    return calls


def compiled(cache, sources=SOURCES, targets=("sm_90", "x86_64_v3"), jobs=2) -> list[Compiled]:
    return compile_all(sources, targets, jobs, cache)


def files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_a_second_build_compiles_nothing_and_says_the_same(tmp_path, compilers):
    first = compiled(tmp_path)
    assert len(compilers) == 3 and not any(item.cached for item in first)
    second = compiled(tmp_path)
    assert len(compilers) == 3 and all(item.cached for item in second)
    for before, after in zip(first, second, strict=True):
        fields = ("target", "kernel", "data", "report", "log")
        assert [getattr(before, field) for field in fields] == [getattr(after, field) for field in fields]
    assert first[0].report == {"registers": 32, "spill_bytes": 4, "stack_bytes": 8, "shared_bytes": 16}
    assert first[0].log == "log of one" and first[2].report == {}
    assert len(files(tmp_path)) == 3  # and no temporary ones


def test_results_come_in_the_order_of_targets_then_kernels(tmp_path, compilers):
    targets = ("sm_80", "sm_90", "x86_64_v3", "x86_64_v4")
    seen = []
    made = compile_all(SOURCES, targets, 3, None, lambda *told: seen.append(told))
    expected = [("sm_80", "one"), ("sm_80", "two"), ("sm_90", "one"), ("sm_90", "two"), ("x86_64_v3", ""),
                ("x86_64_v4", "")]  # fmt: skip
    assert [(item.target, item.kernel) for item in made] == expected
    assert sorted(seen) == [("compile", done, 6) for done in range(1, 7)]


def test_no_cache_compiles_anew_and_writes_nothing(tmp_path, compilers, monkeypatch):
    monkeypatch.setenv("GQSAC_CACHE", str(tmp_path))
    compiled(None)
    assert not any(item.cached for item in compiled(None))
    assert len(compilers) == 6 and files(tmp_path) == []


CHANGES = {
    "cuda source": lambda patch: patch.setitem(SOURCES["cuda"], "one", "other text"),
    "cuda header": lambda patch: patch.setitem(HEADERS["cuda"], "a.cuh", "other header"),
    "cuda header name": lambda patch: patch.setitem(HEADERS, "cuda", {"b.cuh": "header a"}),
    "cuda options": lambda patch: patch.setattr(compile_cuda, "OPTIONS", (*compile_cuda.OPTIONS, "--use_fast_math")),
    "nvrtc": lambda patch: patch.setattr(compile_cuda, "nvrtc_version", lambda: "12.8"),
    "cpu source": lambda patch: patch.setitem(SOURCES["cpu"], "one", "other C"),
    "cpu header": lambda patch: patch.setitem(HEADERS["cpu"], "a.h", "other header"),
    "cpu header name": lambda patch: patch.setitem(HEADERS, "cpu", {"b.h": "header a"}),
    "cpu flags": lambda patch: patch.setattr(compile_cpu, "FLAGS", (*compile_cpu.FLAGS, "-ffast-math")),
    "cpu triple": lambda patch: patch.setitem(compile_cpu.TARGETS, "x86_64_v3", ("x86_64-linux-musl", "x86_64_v3")),
    "zig": lambda patch: patch.setattr(compile_cpu, "compiler_version", lambda: "zig 2"),
    "a kernel more": lambda patch: patch.setitem(SOURCES["cpu"], "three", "C of three"),
    "a source that became a header": lambda patch: (
        patch.setitem(SOURCES, "cpu", {"one": "C of one"}),
        patch.setitem(HEADERS, "cpu", {"two": "C of two", "a.h": "header a"}),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_everything_that_changes_the_code_is_in_the_key(tmp_path, compilers, monkeypatch, change):
    compiled(tmp_path)
    before = len(compilers)
    with monkeypatch.context() as patch:
        CHANGES[change](patch)
        made = compiled(tmp_path)
        family = "cpu" if change.startswith(("cpu", "zig", "a ")) else "cuda"
        for item in made:
            if family == "cpu":
                assert item.cached == (item.kernel != "")
            elif "source" in change:
                assert item.cached == (item.kernel != "one")
            else:
                assert item.cached == (item.kernel == "")
        assert len(compilers) > before
    assert all(item.cached for item in compiled(tmp_path))  # what it was before is still there


def test_targets_and_kernels_do_not_share_entries(tmp_path, compilers):
    sources = {"cuda": {"one": "text", "two": "text"}, "cpu": {"one": "C"}}
    made = compiled(tmp_path, sources, ("sm_80", "sm_90", "x86_64_v3", "x86_64_v4"))
    assert len(compilers) == 6 and len({item.data for item in made}) == 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b"registers", b"registerz"),
        lambda data: b"\0" * len(data),
    ],
)
def test_a_damaged_entry_is_compiled_again_and_replaced(tmp_path, compilers, damage):
    good = compiled(tmp_path, targets=("sm_90",))
    sound = {path: path.read_bytes() for path in files(tmp_path)}
    for path, data in sound.items():
        path.write_bytes(damage(data))
    again = compiled(tmp_path, targets=("sm_90",))
    assert not any(item.cached for item in again) and [i.data for i in again] == [i.data for i in good]
    assert {path: path.read_bytes() for path in files(tmp_path)} == sound


def test_a_cache_that_cannot_be_written_fails_no_build(tmp_path, compilers):
    (tmp_path / "file").write_text("in the way")
    made = compiled(tmp_path / "file" / "cache")
    assert [item.cached for item in made] == [False] * 3
    assert [item.data for item in compiled(tmp_path / "file" / "cache")] == [item.data for item in made]


def test_a_full_disk_leaves_no_temporary_file_in_the_cache(tmp_path, compilers, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compiling.os, "replace", fail)
        assert len(compiled(tmp_path)) == 3
    assert files(tmp_path) == []


def test_an_entry_is_a_folder_or_unreadable(tmp_path, compilers):
    compiled(tmp_path, targets=("sm_90",))
    for path in files(tmp_path):
        path.unlink()
        path.mkdir()
    assert not any(item.cached for item in compiled(tmp_path, targets=("sm_90",)))


def test_the_first_error_ends_the_build(tmp_path, compilers, monkeypatch):
    def refuse(source, target, name, headers):
        raise DeviceError(f"{name} does not compile")

    monkeypatch.setattr(compile_cuda, "compile_cuda", refuse)
    with pytest.raises(DeviceError, match="one does not compile"):
        compiled(tmp_path, targets=("sm_90",), jobs=1)
    assert files(tmp_path) == []


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("GQSAC_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("GQSAC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "gqsac" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "gqsac" / "kernels"
