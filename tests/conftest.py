"""What several test files share: a tiny model, its checkpoint, and a way to run the scripts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optional_hypothesis import settings

from model_architecture import TinyGPT, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
LETTERS = "\n !Eabcdelnorst"

# The same examples every time: a failure that one machine sees can be seen on every other.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")
# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # more threads only get in each other's way with models this small


@pytest.fixture(scope="session")
def tiny_model():
    """Call it to get a small TinyGPT in eval mode, every parameter random.

    An untrained TinyGPT has zeros wherever a result is written: each block changes nothing and
    all scores are equal. What should be wrong in it could not be seen.
    """

    def make(vocab_size=None, seed=0, **sizes) -> TinyGPT:
        sizes = {"block_size": 8, "n_embd": 16, "n_head": 2, "n_layer": 2, **sizes}
        model = TinyGPT(vocab_size or len(LETTERS), **sizes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def letters() -> str:
    """The vocabulary of the checkpoint below."""
    return LETTERS


@pytest.fixture
def checkpoint(tmp_path, tiny_model) -> Path:
    """A checkpoint of a tiny random model that writes LETTERS."""
    path = tmp_path / "tiny.pth"
    save_checkpoint(str(path), tiny_model(), LETTERS)
    return path


@pytest.fixture
def start(tmp_path):
    """Call it to start a script of this project as a process, from a directory of its own."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    started = []

    def run(*command: str, stdin=subprocess.DEVNULL, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with process:  # closes its pipes and waits for its end
            process.kill()
