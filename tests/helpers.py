"""What several test files share: texts, calls of `main`, processes, and faults at a given step."""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

from torch.optim.optimizer import register_optimizer_step_post_hook

import train_model
from hyperparameters import end_with_a_sentence

ROOT = Path(__file__).resolve().parent.parent
POSIX = os.name == "posix"
DEADLINE = 120  # seconds; far more than anything here takes

# On a CPU the same run has the same bits, and a process that has trained can fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A model that trains in a tenth of a second: 9 steps an epoch over the text below, the last of
# them with a single sequence.
SIZES = "--n_embd 16 --n_head 2 --n_layer 1 --block_size 16 --batch_size 8".split()
STEPS = 9
FILES = "--input text.txt --checkpoint model.pth --training_log log.csv".split()
TINY = [*FILES, *SIZES, "--epochs", "2"]
RESUME = [*FILES, "--resume"]


def make_text(length: int = 1_180, seed: int = 0) -> str:
    """Words of a language with a vocabulary of forty, all of them letters of the first eight."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(40)]
    return " ".join(rng.choices(words, k=length // 3))[:length]


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """Inside, `folder` is the current directory, with a text in it; locks are kept elsewhere."""
    before = os.getcwd()
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(make_text(), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        locks = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(tempfile, "tempdir", locks))
        stack.enter_context(mock.patch.dict(os.environ, TMPDIR=locks))
        stack.callback(os.chdir, before)
        os.chdir(folder)
        yield folder


def contents(folder: Path) -> Dict[str, Optional[bytes]]:
    """Every file in `folder` with its bytes, every folder in it with None."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: None if path.is_dir() else path.read_bytes() for name, path in paths.items()}


def log_rows(path: str = "log.csv") -> List[List[str]]:
    """The rows of a training log without the seconds, which no two runs share."""
    header, *rows = Path(path).read_text(encoding="ascii").splitlines()
    assert header == "epoch,step,train_loss,val_loss,seconds"
    return [row.split(",")[:4] for row in rows]


def results(checkpoint: str = "model.pth", training_log: str = "log.csv") -> Tuple[bytes, Any]:
    """What a run leaves: the bytes of its checkpoint, the rows of its log."""
    return Path(checkpoint).read_bytes(), log_rows(training_log)


class Outcome(NamedTuple):
    """What a call or a process left: its exit status, and what it wrote."""

    status: int
    out: str
    err: str

    def sentence(self) -> str:
        """The one ASCII line that must be all of stderr when the status is 2."""
        assert self.status == 2, self
        assert self.err.isascii(), self.err
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        return self.err[:-1]


def call(main: Callable, argv: List[str], stdin: bytes = b"") -> Outcome:
    """`main(argv)` as its script would call it, in this process, with its output caught."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = end_with_a_sentence(main, argv, lower="the settings")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdin = before
    return Outcome(status, out.getvalue(), err.getvalue())


def train(*argv: str) -> Outcome:
    """Train in this process."""
    return call(train_model.main, list(argv))


def python(
    *command: Any, folder: Path, stdin: Any = subprocess.DEVNULL, **environment: str
) -> subprocess.Popen:
    """Start `python COMMAND` in `folder`, with one thread: so sums have the same last digit."""
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**plain, **one, **environment},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def outcome(process: subprocess.Popen) -> Outcome:
    """Wait for the process to end; kill it if it hangs."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.terminate()  # as torchrun needs it, to end the processes that it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()
        raise
    return Outcome(process.returncode, out.decode("utf-8"), err.decode("utf-8"))


@contextlib.contextmanager
def at_step(number: int, *actions: Any) -> Iterator[None]:
    """Inside, after that many optimizer steps, actions are called and signals raised."""
    taken = 0

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1
        for action in actions if taken == number else ():
            action() if callable(action) else signal.raise_signal(action)

    handle = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def limited(memory: int = 0, file: int = 0) -> Iterator[None]:
    """Inside, this process may use `memory` bytes more than now, and write files of `file` bytes.

    A file that grows larger fails as on a full disk. Memory is limited on Linux only.
    """
    wanted = {"RLIMIT_FSIZE": file} if file else {}
    if memory and sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        wanted["RLIMIT_AS"] = pages * os.sysconf("SC_PAGE_SIZE") + memory
    with contextlib.ExitStack() as stack:
        for name, size in wanted.items():
            import resource

            kind = getattr(resource, name)
            before = resource.getrlimit(kind)
            stack.callback(resource.setrlimit, kind, before)
            resource.setrlimit(kind, (size, before[1]))
        yield
