"""What several test files share: a tiny model and its checkpoint."""

import signal
from pathlib import Path
from typing import Any, Dict, Optional

import pytest
import torch
from optional_hypothesis import settings

from model_architecture import TinyGPT

LETTERS = "\n !Eabcdelnorst"

# The same examples every time: a failure that one machine sees can be seen on every other.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")
# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # more threads only get in each other's way with models this small


def write_checkpoint(
    path: Any, model: TinyGPT, vocabulary: str, training: Optional[Dict[str, Any]] = None
) -> None:
    """Save as train_model.py does: the finished model, or beside it what a run left behind."""
    sizes = {
        "block_size": model.block_size,
        "n_embd": model.embedding.embedding_dim,
        "n_head": model.blocks[0].attention.n_head,
        "n_layer": len(model.blocks),
        "dropout": model.blocks[0].dropout.p,
    }
    contents = {"format": 2, "sizes": sizes, "vocabulary": vocabulary}
    contents["parameters"] = dict(model.state_dict())
    torch.save({**contents, **({} if training is None else {"training": training})}, str(path))


@pytest.fixture(scope="session")
def tiny_model():
    """Call it to get a small TinyGPT in eval mode, every parameter random.

    An untrained TinyGPT has zeros wherever a result is written: each block changes nothing and
    all scores are equal. What should be wrong in it could not be seen.
    """

    def make(vocab_size: int = len(LETTERS), seed: int = 0, **sizes: Any) -> TinyGPT:
        sizes = {"block_size": 8, "n_embd": 16, "n_head": 2, "n_layer": 2, **sizes}
        model, generator = TinyGPT(vocab_size, **sizes), torch.Generator().manual_seed(seed)
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
    write_checkpoint(path, tiny_model(), LETTERS)
    return path
