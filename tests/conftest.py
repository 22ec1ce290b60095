"""What holds for every test."""

import os
import signal
import tempfile

import helpers
import pytest
import torch

# The same examples every time: a failure that one machine sees can be seen on every other.
helpers.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
helpers.settings.load_profile("tests")
# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, lambda *_: None)  # neither ignored, as under nohup, nor deadly
torch.set_num_threads(1)  # more threads only get in each other's way with models this small
os.fsync = lambda _: None  # nobody pulls the plug, and much of the time would be spent waiting


@pytest.fixture(scope="session", autouse=True)
def locks(tmp_path_factory):
    """Locks have a folder of their own, also those of other processes."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("locks"))


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
