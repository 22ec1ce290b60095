"""What holds for every test."""

import signal

import helpers
import pytest
import torch

# The same examples every time: a failure that one machine sees can be seen on every other.
helpers.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
helpers.settings.load_profile("tests")
# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # more threads only get in each other's way with models this small


@pytest.fixture
def here(tmp_path):
    """An empty working directory but for text.txt."""
    with helpers.working_in(tmp_path / "here") as folder:
        yield folder


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a tiny random model that writes LETTERS."""
    helpers.write_checkpoint(tmp_path / "tiny.pth", helpers.tiny_model(), helpers.LETTERS)
    return tmp_path / "tiny.pth"
