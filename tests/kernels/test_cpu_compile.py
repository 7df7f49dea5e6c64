"""compile_cpu: what it builds, that it always builds the same, and what it says when it cannot."""

import ctypes
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gqsa_runtime.device_cpu import _load_library, supported_targets
from gqsa_runtime.errors import DeviceError

from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes import compile_cpu as module
from gqsac.compiler.passes.compile_cpu import TARGETS, compile_cpu, host_targets
from gqsac.compiler.passes.render import render

SPEC = KernelSpec.make("last_row", width=5, x_stride=7)
SOURCES = {"last_row_n5": render("cpu", SPEC, "last_row_n5")}
ELF_MACHINE = {"x86_64": 62, "aarch64": 183}

# Applies a function of vmath.h to 64 floats.
APPLY = """
#include "vmath.h"
EXPORT void NAME(void *const *args, int share, int n_shares) {
    (void)share, (void)n_shares;
    for (int i = 0; i < 64; i += VW) store((float *)args[1] + i, CALL(load((const float *)args[0] + i)));
}
"""
FUNCTIONS = {
    "exp": ("exp_v", np.exp, -86.0, 88.0),
    "erf": ("erf_v", np.vectorize(math.erf), -6.0, 6.0),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_builds_from_any_machine(target):
    data = compile_cpu(SOURCES, target)
    assert data[:4] == b"\x7fELF"
    assert (
        int.from_bytes(data[18:20], "little")
        == ELF_MACHINE[next(family for family in ELF_MACHINE if target.startswith(family))]
    )
    for name in (b"last_row_n5", b"gqsa_pool_create", b"gqsa_pool_destroy", b"gqsa_run"):
        assert b"\0" + name + b"\0" in data


def test_bytes_do_not_depend_on_folder_or_cache(tmp_path, monkeypatch):
    first = compile_cpu(SOURCES, "x86_64_v3")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    assert compile_cpu(SOURCES, "x86_64_v3") == first
    assert str(tmp_path).encode() not in first and b"gqsac-" not in first
    assert (tmp_path / "cache" / "gqsac" / "zig").is_dir()


@pytest.mark.skipif(not supported_targets(), reason="this CPU runs no gqsac kernels")
@pytest.mark.parametrize("target", supported_targets())
def test_exp_and_erf_are_as_good_as_libm(target):
    sources = {
        f"apply_{name}": APPLY.replace("NAME", f"apply_{name}").replace("CALL", f[0]) for name, f in FUNCTIONS.items()
    }
    library = _load_library(compile_cpu(sources, target))
    for name, (_, exact, low, high) in FUNCTIONS.items():
        x = np.concatenate([np.linspace(low, high, 4032), np.geomspace(1e-7, 1, 64)]).astype(np.float32)
        y = np.empty_like(x)
        for start in range(0, len(x), 64):
            args = (ctypes.c_void_p * 2)(x.ctypes.data + 4 * start, y.ctypes.data + 4 * start)
            getattr(library, f"apply_{name}")(args, 0, 1)
        expected = exact(x.astype(np.float64))
        ulp = np.abs(y - expected) / np.spacing(np.abs(expected).astype(np.float32))
        assert ulp.max() < 2, (name, x[ulp.argmax()])
    special = np.array([-np.inf, -1e30, -88, 0, 88.8, 1e30, np.inf, np.nan] * 8, np.float32)
    out = np.empty_like(special)
    library.apply_exp((ctypes.c_void_p * 2)(special.ctypes.data, out.ctypes.data), 0, 1)
    np.testing.assert_array_equal(out[:8], np.array([0, 0, 0, 1, np.inf, np.inf, np.inf, np.nan], np.float32))


def test_host_targets_are_of_the_machine(monkeypatch):
    x86 = ("x86_64_v3", "x86_64_v3_vnni", "x86_64_v4", "x86_64_v4_vnni")
    arm = ("aarch64", "aarch64_dotprod")
    for machine, targets in (
        ("x86_64", x86),
        ("AMD64", x86),
        ("aarch64", arm),
        ("arm64", arm),
        ("riscv64", ()),
        ("", ()),
    ):
        monkeypatch.setattr(module.platform, "machine", lambda machine=machine: machine)
        assert host_targets() == targets


def test_unknown_target_is_named():
    with pytest.raises(DeviceError, match="'sparc'.*x86_64_v3, x86_64_v3_vnni, .*, aarch64, aarch64_dotprod"):
        compile_cpu(SOURCES, "sparc")


def test_missing_ziglang_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="pip install ziglang"):
        compile_cpu(SOURCES, "x86_64_v3")


def test_source_that_does_not_compile_shows_the_compilers_words():
    with pytest.raises(DeviceError, match="undeclared"):
        compile_cpu({"broken": "int broken(void) { return nothing; }"}, "x86_64_v3")


def test_a_compiler_that_runs_ends_when_the_build_is_stopped(monkeypatch, tmp_path):
    # As after Ctrl-C: a thread had not started the compiler yet when the signal came.
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(compiler))
    stopped = threading.Event()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(compile_cpu, SOURCES, "x86_64_v3", stopped)
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        stopped.set()
        with pytest.raises(DeviceError, match="stopped"):
            running.result(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    (tmp_path / "pid").unlink()
    with pytest.raises(DeviceError, match="stopped"):
        compile_cpu(SOURCES, "x86_64_v3", stopped)
