"""Tensors that threads read ahead: nothing is handed out unchecked, in whatever order, and nobody waits for ever."""

import os
import threading

import numpy as np
import pytest
from gqsa_runtime import checked_tensors, reader
from gqsa_runtime.checked_tensors import CheckedTensors
from gqsa_runtime.errors import FormatError
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.stopwatch import Stopwatch

from tests.format import records_program, tiny

ARRAYS = records_program.tensors()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead") / "records.gqsa"
    path.write_bytes(tiny.file_bytes(records_program.program(), ARRAYS))
    return path


@pytest.fixture(params=["one after another", "as many as fit"])
def room(request, monkeypatch):
    """With no room ahead, readers hold one tensor at a time."""
    if request.param == "one after another":
        monkeypatch.setattr(checked_tensors, "AHEAD_BYTES", 0)
    monkeypatch.setattr(checked_tensors, "default_threads", lambda: 4)


@pytest.mark.parametrize("order", [1, -1])
def test_any_order_of_asking(path, room, order):
    clock, told = Stopwatch(), []
    with ArtifactFile.open(path) as file:
        names = list(file.tensors)
        with CheckedTensors(file, names, lambda *counts: told.append(counts), clock) as tensors:
            for name in names[::order]:
                np.testing.assert_array_equal(tensors[name], ARRAYS[name])
    total = sum(array.nbytes for array in ARRAYS.values())
    assert told == sorted(told) and told[-1] == (total, total)
    assert set(clock.seconds) == {"read", "check", "wait"}


def test_each_tensor_is_read_once(path, room, monkeypatch):
    read, really_read = [], ArtifactFile.read

    def counted(file, name):
        read.append(name)
        return really_read(file, name)

    monkeypatch.setattr(ArtifactFile, "read", counted)
    with ArtifactFile.open(path) as file, CheckedTensors(file, file.tensors) as tensors:
        held = [tensors[name] for name in file.tensors]
    assert sorted(read) == sorted(file.tensors) and len(held) == len(read)


def test_who_asks_for_nothing_waits_for_nothing(path, room):
    with ArtifactFile.open(path) as file:
        with pytest.raises(KeyError), CheckedTensors(file, file.tensors) as tensors:
            tensors["no such tensor"]
        with CheckedTensors(file, file.tensors) as tensors:
            pass
        np.testing.assert_array_equal(tensors["norm"], ARRAYS["norm"])  # afterwards as well
    assert not any(thread.name == "gqsa-reader" for thread in threading.enumerate())


def test_damage_is_told_to_who_asks(tmp_path, path, room):
    data = bytearray(path.read_bytes())
    data[data.index(ARRAYS["norm"].tobytes()) + 1] ^= 1
    damaged = tmp_path / "damaged.gqsa"
    damaged.write_bytes(data)
    with ArtifactFile.open(damaged) as file, CheckedTensors(file, file.tensors) as tensors:
        for name in reversed(file.tensors):
            if name != "norm":
                tensors[name]
        for _ in range(2):
            with pytest.raises(FormatError, match="tensor 'norm' is damaged"):
                tensors["norm"]


def test_a_rule_is_broken_by_what_another_tensor_says(tmp_path, room):
    arrays = records_program.tensors()
    sizes = np.diff(arrays["gate.starts"])
    smaller = int(np.flatnonzero(sizes[1:] < sizes.max())[0]) + 1
    arrays["gate.starts"][smaller] -= 1  # the numbers rise as they should, but the headers say otherwise
    path = tmp_path / "broken.gqsa"
    path.write_bytes(tiny.file_bytes(records_program.program(), arrays))
    with ArtifactFile.open(path) as file, CheckedTensors(file, file.tensors) as tensors:
        with pytest.raises(FormatError, match="'gate.records' holds"):
            tensors["gate.records"]
        assert len(tensors["gate.starts"]) == len(arrays["gate.starts"])


def test_threads_read_at_places_of_their_own(path, monkeypatch):
    names = list(ARRAYS) * 20
    wrong = []

    def read_all(file, part):
        for name in names[part::4]:
            if not np.array_equal(file.read(name), ARRAYS[name]):
                wrong.append(name)

    for missing in ([], ["preadv"]):  # as on Windows
        for function in missing:
            monkeypatch.delattr(reader.os, function)
        with ArtifactFile.open(path) as file:
            threads = [threading.Thread(target=read_all, args=(file, part)) for part in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong and not hasattr(os, "preadv")
