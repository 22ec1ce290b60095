"""What several test files share: texts, models, calls of `main`, processes, faults on demand."""

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_model
from hyperparameters import end_with_a_sentence
from model_architecture import TinyGPT

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:  # then the tests that need it are skipped

    def given(*_, **__):
        return pytest.mark.skip("needs hypothesis")

    settings, st = mock.MagicMock(return_value=lambda test: test), mock.MagicMock()

__all__ = ["given", "settings", "st"]  # what others take from here without its being used here

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 120  # seconds; far more than anything here takes
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")

# On a CPU the same run has the same bits, and a process that has trained can fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

LETTERS = "\n !Eabcdelnorst"  # 15, the vocabulary of a model that only writes

# A model that trains in a tenth of a second, in 9 steps an epoch over the text below.
SIZES = "--n_embd 16 --n_head 2 --n_layer 1 --block_size 16 --batch_size 8".split()
SIZES += ["--sample_characters", "0"]
STEPS = 9
FILES = "--input text.txt --checkpoint model.pth --training_log log.csv".split()
TINY = [*FILES, *SIZES, "--epochs", "2"]
RESUME = [*FILES, "--resume"]


def make_text(length=1_180):
    """Words of a language with a vocabulary of forty, all of them letters of the first eight."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(40)]
    return " ".join(rng.choices(words, k=length // 3))[:length]


def tiny_model(vocab_size=15, **sizes):
    """A small TinyGPT in eval mode, every parameter random: untrained, a block does nothing, all
    scores are equal, and what is wrong in it could not be seen.
    """
    sizes = {"block_size": 8, "n_embd": 16, "n_head": 2, "n_layer": 2, "dropout": 0.0, **sizes}
    model, generator = TinyGPT(vocab_size, **sizes), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    model.sizes = sizes
    return model.eval()


def close(one, other, tolerance=1e-5):
    """Whether two tensors have one shape, and numbers that hardly differ."""
    return one.shape == other.shape and bool(((one - other).abs() <= tolerance).all())


def write_checkpoint(path, model, vocabulary, **training):
    """Save as train_model.py does: the finished model, or beside it what a run left behind."""
    contents = {"format": 2, "sizes": model.sizes, "vocabulary": vocabulary, **training}
    torch.save({**contents, "parameters": dict(model.state_dict())}, str(path))


@contextlib.contextmanager
def working_in(folder):
    """Inside, `folder` is the current directory, with a text in it."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(make_text(), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder)
        yield folder


def contents(folder="."):
    """Every file in `folder` with its bytes, every folder in it with None."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*"))}
    return {name: None if path.is_dir() else path.read_bytes() for name, path in paths.items()}


def restore(files):
    """Put back into the current directory what `contents` found there, and take away all else."""
    now = contents()
    for name in set(now) - set(files):
        os.remove(name)
    for name, data in files.items():
        if now.get(name) != data:
            Path(name).write_bytes(data)


def log_rows(path="log.csv"):
    """The rows of a training log without the seconds, which no two runs share."""
    header, *rows = Path(path).read_text(encoding="ascii").splitlines()
    assert header == "epoch,step,train_loss,val_loss,seconds"
    return [row.split(",")[:4] for row in rows]


def results(checkpoint="model.pth", training_log="log.csv"):
    """What a run leaves: the bytes of its checkpoint, the rows of its log."""
    return Path(checkpoint).read_bytes(), log_rows(training_log)


class Outcome(NamedTuple):
    """What a call or a process left: its exit status, and what it wrote."""

    status: int
    out: str
    err: str

    def sentence(self):
        """The one ASCII line that must be all of stderr when the status is 2."""
        assert self.status == 2 and self.err.isascii() and self.err.startswith("error: "), self
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self
        return self.err[:-1]


def call(main, argv=(), stdin=b""):
    """`main(argv)` as its script would call it, in this process, with its output caught."""
    out, err = io.StringIO(), io.StringIO()
    typed = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with mock.patch("sys.stdin", typed):
                status = end_with_a_sentence(main, list(argv), lower="the settings")
    except SystemExit as end:
        status = end.code or 0
    return Outcome(status, out.getvalue(), err.getvalue())


def refusal(function, *arguments, **named):
    """The sentence with which a function refuses what it was given."""
    return call(lambda _: function(*arguments, **named)).sentence()


def train(*argv):
    """Train in this process."""
    return call(train_model.main, argv)


def learn(*argv):
    """A run that must succeed."""
    done = train(*argv)
    assert (done.status, done.err) == (0, ""), done
    return done


def refused(*argv):
    """The sentence with which a run is refused; nothing was done before."""
    before = contents()
    done = train(*argv)
    assert done.out == "" and contents() == before, argv
    return done.sentence()


def stopped_at(step, *argv, number=signal.SIGINT):
    """A run that gets the signal when it has taken that many steps in this session."""
    with at_step(step, number):
        return train(*argv)


def python(*command, **environment):
    """Start `python COMMAND` here, with one thread: so sums have the same last digit."""
    files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **files)


def outcome(process):
    """Wait for the process to end; end it if it hangs."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun ends the processes that it started
        raise
    return Outcome(process.returncode, out.decode("utf-8"), err.decode("utf-8"))


def fork(action):
    """Start a copy of this process, which calls `action` for its exit status."""
    exits = {"target": lambda: sys.exit(action()), "daemon": True}
    process = multiprocessing.get_context("fork").Process(**exits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy's threads, which wait for nothing
        process.start()
    return process


def ended(process):
    """The exit status of a copy; below zero, the signal that killed it; None if it hangs."""
    process.join(DEADLINE)
    return process.exitcode


def fork_script(name, *argv, out, err=None, before=lambda: None):
    """Start a script in a copy: as `python NAME ARGV`, but without seconds of imports.

    `out` and `err` are files by name or number; without `err`, all goes to `out`.
    """

    def run():
        sys.argv = [name, *map(str, argv)]
        for number, stream, file in ((1, "stdout", out), (2, "stderr", err or out)):
            opened = file if isinstance(file, int) else os.open(file, os.O_CREAT | os.O_WRONLY)
            os.dup2(opened, number)
            setattr(sys, stream, open(number, "w", closefd=False))
        before()
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()  # as Python does at its end
            return end.code

    return fork(run)


@contextlib.contextmanager
def at_step(number, *actions):
    """Inside, after that many optimizer steps, actions are called and signals raised."""

    def count(*_):
        for action in actions if next(steps) == number else ():
            action() if callable(action) else signal.raise_signal(action)

    steps = itertools.count(1)
    with contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_post_hook(count).remove)
        yield


@contextlib.contextmanager
def limited(kind, size):
    """Inside, this process may write files of `size` bytes (kind "FSIZE"): one that grows larger
    fails as on a full disk. Or it may use `size` bytes more than now ("AS", on Linux only).
    """
    if kind == "AS" and sys.platform != "linux":
        yield
        return
    import resource

    if kind == "AS":
        size += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    kind = getattr(resource, f"RLIMIT_{kind}")
    before = resource.getrlimit(kind)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, kind, before)
        resource.setrlimit(kind, (size, before[1]))
        yield
