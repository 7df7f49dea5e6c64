"""The distributions as a user installs them: wheels with their templates, and a runtime that stays thin."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from gqsa_runtime.device_cpu import supported_targets

from tests.e2e.checkpoints import save_checkpoint
from tests.e2e.command import ROOT, TARGET, succeed

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")

TEMPLATES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "templates").rglob("*") if path.is_file())
MAX_RUNTIME_BYTES = 200e6  # of everything that the runtime needs beside Python itself


def run(*command, **options) -> subprocess.CompletedProcess:
    """Runs a command in an environment that knows nothing of the checkout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [str(part) for part in command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def checkout(copy: Path) -> Path:
    """A copy of what the distributions are made of."""
    for name in ("gqsac", "templates", "runtime"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(copy: Path, folder: Path, *targets: str) -> None:
    """Makes both distributions of a checkout."""
    for project in (copy, copy / "runtime"):
        for target in targets:
            made = run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder, cwd=project)
            assert made.returncode == 0, made.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheels of both, and the sdists, made from a copy of the checkout's own files."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheels; install the extra 'dev'")
    folder = tmp_path_factory.mktemp("dist")
    build(checkout(tmp_path_factory.mktemp("checkout")), folder, "wheel", "sdist")
    return folder


def test_the_same_files_make_the_same_wheels(distributions, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy = checkout(tmp_path / "elsewhere")
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)  # as another umask leaves them
        os.utime(path, (1_000_000_000, 1_000_000_000))
    build(copy, tmp_path / "again", "wheel")
    made = sorted((tmp_path / "again").iterdir())
    assert len(made) == 2
    for path in made:
        assert path.read_bytes() == (distributions / path.name).read_bytes(), path.name


def wheel(distributions: Path, name: str) -> Path:
    (found,) = distributions.glob(f"{name}-*.whl")
    return found


def test_the_archives_hold_what_they_should(distributions):
    assert len(TEMPLATES) > 30
    with zipfile.ZipFile(wheel(distributions, "gqsac")) as archive:
        names = archive.namelist()
    assert {f"gqsac/{name}" for name in TEMPLATES} <= set(names)
    assert {"gqsac/data/calibration.txt", "gqsac/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"gqsac"}
    with zipfile.ZipFile(wheel(distributions, "gqsa_runtime")) as archive:
        names = archive.namelist()
    assert "gqsa_runtime/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"gqsa_runtime"}
    (sdist,) = distributions.glob("gqsac-*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert set(TEMPLATES) | {"pyproject.toml", "LICENSE", "gqsac/data/calibration.txt"} <= inside
    assert not any(name.startswith((".", "tests", "benchmarks")) for name in inside - {".gitignore"})


@pytest.fixture(scope="module")
def compiler(tmp_path_factory, distributions):
    """Python of a fresh environment with both wheels; other packages are borrowed from this one."""
    folder = tmp_path_factory.mktemp("compiler")
    python = new_environment(folder)
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    done = run(*install, wheel(distributions, "gqsac"), wheel(distributions, "gqsa_runtime"))
    assert done.returncode == 0, done.stderr
    # NVRTC is looked for in the environment's own folder.
    (site_packages(folder) / "nvidia").symlink_to(Path(sysconfig.get_path("purelib")) / "nvidia")
    # A plain path line: the .pth files of editable installs in the borrowed folder are not read.
    (site_packages(folder) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def new_environment(folder: Path) -> Path:
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def site_packages(folder: Path) -> Path:
    (found,) = folder.glob("lib/python3*/site-packages")
    return found


def test_an_installed_compiler_builds(compiler, tmp_path):
    where = "import gqsac, gqsa_runtime; print(gqsac.__file__); print(gqsa_runtime.__file__)"
    for line in run(compiler, "-c", where, cwd=tmp_path).stdout.splitlines():
        assert line.startswith(str(site_packages(compiler.parents[1]))), line
    source = save_checkpoint(tmp_path / "source", "llama")
    gqsac = compiler.parent / "gqsac"
    build = (gqsac, "build", source, "-o", "out.gqsa", "--bits", 4, "--target", TARGET, "--target", "sm_90", "--json")
    built = run(*build, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["file_bytes"] == (tmp_path / "out.gqsa").stat().st_size
    answered = run(gqsac, "run", "out.gqsa", "--raw", "-p", "Hi", "--max-new-tokens", 4, cwd=tmp_path)
    assert answered.returncode == 0 and answered.stdout.endswith("\n"), answered.stderr
    # The same bytes as from the checkout: nothing depends on where the package lies.
    succeed("build", source, "-o", tmp_path / "here.gqsa", "--bits", 4, "--target", TARGET, "--target", "sm_90")
    assert (tmp_path / "here.gqsa").read_bytes() == (tmp_path / "out.gqsa").read_bytes()


@pytest.fixture(scope="module")
def thin(tmp_path_factory, distributions):
    """Folder of a fresh environment with gqsa-runtime and, from the package index, what it needs."""
    folder = tmp_path_factory.mktemp("thin")
    python = new_environment(folder)
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--retries", 1, "--timeout", 15,
               "--no-compile", wheel(distributions, "gqsa_runtime"))  # fmt: skip
    if done.returncode and ("No matching distribution" in done.stderr or "onnection" in done.stderr):
        pytest.skip(f"pip reaches no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_runtime_alone_answers(thin, tmp_path):
    source = save_checkpoint(tmp_path / "source", "llama")
    succeed("build", source, "-o", tmp_path / "m.gqsa", "--bits", 4, "--target", TARGET)
    gqsa = thin / "bin" / "gqsa"
    answered = run(gqsa, "run", "m.gqsa", "--raw", "-p", "Hi", "--max-new-tokens", 4, "--device", "cpu", cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    same = succeed("run", tmp_path / "m.gqsa", "--raw", "-p", "Hi", "--max-new-tokens", 4, "--device", "cpu")
    assert answered.stdout == same.stdout != "\n"
    for verb in (("inspect", "m.gqsa"), ("verify", "m.gqsa"), ("doctor",)):
        done = run(gqsa, *verb, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for module in ("torch", "transformers", "gqsac"):
        assert "ModuleNotFoundError" in run(thin / "bin" / "python", "-c", f"import {module}", cwd=tmp_path).stderr


def test_the_runtime_is_small(thin, record_property):
    sizes = {}
    for path in site_packages(thin).rglob("*"):
        package = path.relative_to(site_packages(thin)).parts[0]
        if path.is_file() and "__pycache__" not in path.parts:
            sizes[package] = sizes.get(package, 0) + path.stat().st_size
    assert not {"pip", "setuptools"} & set(sizes)
    total = sum(sizes.values())
    record_property("runtime_megabytes", round(total / 1e6, 1))
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    listed = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in largest)
    print(f"the runtime and what it needs take {total / 1e6:.0f} MB: {listed}")
    assert 10e6 < total < MAX_RUNTIME_BYTES, listed
