"""What several tests of compression share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Waiting threads cost tiny models more than they gain, and the last bits of sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
