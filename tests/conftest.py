"""What all tests share: a compile cache of their own, and the models that may lie beside the checkout."""

import signal
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

# A shell starts its background jobs with interrupts ignored, which the commands under test would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory):
    """The folder of compiled kernels: empty at first, shared by the session's builds, never the user's own."""
    folder = tmp_path_factory.mktemp("kernel-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GQSAC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared_model():
    """Path of a small trained model beside the checkout, by name; skips where there is none."""

    def find(name: str) -> Path:
        folder = SHARED / "models" / name
        if not folder.is_dir():
            pytest.skip(f"needs the model folder {name} of ../shared/models")
        return folder

    return find
