"""What several tests of compression and of the runtime share."""

import pytest
import torch

from tests.format import tiny


@pytest.fixture(scope="module")
def one_thread():
    """Waiting threads cost tiny models more than they gain, and the last bits of sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(tmp_path):
    """Of a file of a tiny model, sound and with a plan for CPUs."""
    file = tmp_path / "model.gqsa"
    file.write_bytes(tiny.file_bytes())
    return str(file)
