"""What the tests of training share: texts, calls of `main`, and processes to stop at will.

Importing PyTorch takes seconds. A test that kills a run fifty times cannot wait for that, so this
file is also a program: it imports train_model once, runs nothing, and forks a process for every
run that a test asks for (class Forks). Such a process is like `python train_model.py` in all
but its start, and it can be made to halt at a given step or file operation (SIGSTOP), where the
test then does what it likes: send a signal, take the folder away, fill the disk, kill it.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
POSIX = os.name == "posix"
DEADLINE = 120  # seconds; far more than anything here takes

# A model that trains in a tenth of a second: 9 steps an epoch over the text below, the last of
# them with a single window.
SIZES = "--n_embd 16 --n_head 2 --n_layer 1 --block_size 16 --batch_size 8".split()
STEPS = 9
FILES = "--input text.txt --checkpoint model.pth --log log.csv".split()
TINY = [*FILES, *SIZES, "--epochs", "2"]


def make_text(length: int = 1_180, seed: int = 0) -> str:
    """Words of a language with a vocabulary of forty, all of them letters of the first eight."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(40)]
    text = " ".join(rng.choices(words, k=length // 3))
    assert len(text) >= length
    return text[:length]


def write_text(folder: Path, length: int = 1_180, seed: int = 0) -> Path:
    """The text of `make_text` as the file text.txt of `folder`."""
    path = folder / "text.txt"
    path.write_text(make_text(length, seed), encoding="utf-8")
    return path


def contents(folder: Path) -> Dict[str, Optional[bytes]]:
    """Every file in `folder` with its bytes, every folder in it with None."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = None if path.is_dir() else path.read_bytes()
    return found


def log_losses(path: Path) -> List[List[str]]:
    """The rows of a training log without the seconds, which no two runs share."""
    header, *rows = path.read_text(encoding="ascii").splitlines()
    assert header == "epoch,step,train_loss,val_loss,seconds"
    return [row.split(",")[:4] for row in rows]


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


def call(main: Any, argv: List[str], stdin: bytes = b"") -> Outcome:
    """`main(argv)` with its output caught; SystemExit is an exit status, nothing else is caught."""
    out, err, old_stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdin = old_stdin
    return Outcome(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def signal_after(steps: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Inside, this very process gets the signal when an optimizer has taken that many steps."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    taken = 0

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == steps:
            signal.raise_signal(number)

    handle = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        handle.remove()


def environment(**more: str) -> Dict[str, str]:
    """For a process: one thread, as here, so that sums have the same last digit."""
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    return {**plain, **quiet, **more}


def python(*command: str, folder: Path, **more: str) -> subprocess.Popen:
    """Start `python COMMAND` in `folder`, with `more` in its environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def outcome(process: subprocess.Popen) -> Outcome:
    """Wait for the process; if it hangs, kill it and all that it started."""
    try:
        out, err = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.terminate()  # as torchrun needs it, to end the processes that it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()
        raise
    return Outcome(process.returncode, out.decode("utf-8"), err.decode("utf-8"))


# ---- Processes to stop at will -----------------------------------------------------------------


class Forks:
    """Runs of train_model.py, each forked from one process that has only imported it."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.outputs = tempfile.TemporaryDirectory()

    def ask(self, **order: Any) -> Any:
        """Send an order to the forking process; return its answer."""
        self.server.stdin.write(json.dumps(order).encode() + b"\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, folder: Path, *argv: str, **faults: Any) -> "Forked":
        """Start a run in `folder`; the faults are those that `suffer` knows."""
        output = tempfile.mkdtemp(dir=self.outputs.name)
        for name in ("out", "err"):  # there even if it is killed before it writes
            Path(output, name).touch()
        order = {"folder": str(folder), "argv": argv, "output": output, "faults": faults}
        return Forked(self, self.ask(**order), Path(output))

    def run(self, folder: Path, *argv: str, **faults: Any) -> Outcome:
        """Run to the end."""
        return self.start(folder, *argv, **faults).end()

    def close(self) -> None:
        """End the forking process, which kills what is left of its children."""
        self.server.stdin.close()
        self.server.wait(DEADLINE)
        self.server.stdout.close()
        self.outputs.cleanup()


@functools.lru_cache(None)
def forks() -> Forks:
    """The one forking process that all tests share, started when the first of them asks."""
    one = Forks()
    atexit.register(one.close)
    return one


class Forked:
    """One run of train_model.py."""

    def __init__(self, forks: Forks, pid: int, output: Path) -> None:
        self.forks, self.pid, self.output = forks, pid, output
        self.status: Optional[int] = None

    def halted(self) -> bool:
        """Wait until it halts where it was told to; False if it ended instead."""
        answer = self.forks.ask(wait=self.pid)
        self.status = answer
        return answer is None

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def go_on(self) -> None:
        """Let it continue where it halted."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> Outcome:
        """Wait for its end; a status below zero is the signal that killed it."""
        halted = self.halted()
        assert not halted, "it should have ended, not halted"
        return Outcome(self.status, self.written("out"), self.written("err"))

    def written(self, name: str) -> str:
        """What it has written so far to its "out" or "err"."""
        return (self.output / name).read_bytes().decode("utf-8")


def serve() -> None:
    """Fork a process for every order on stdin, until it ends; runs no PyTorch itself."""
    sys.path.insert(0, str(ROOT))
    import torch._dynamo

    import train_model

    assert train_model and torch._dynamo  # its first optimizer would spend a second on importing it
    children = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = wait(order["wait"])
            children -= {order["wait"]} if answer is not None else set()
        else:
            answer = os.fork()
            if answer == 0:
                be_run(order)
            children.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def wait(pid: int) -> Optional[int]:
    """The exit status of a child, or None as soon as it is halted. Kills what hangs."""
    give_up = time.monotonic() + DEADLINE
    while True:
        found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        if found and os.WIFSTOPPED(status):
            return None
        if found:
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if time.monotonic() > give_up:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def be_run(order: Dict[str, Any]) -> None:
    """In the forked process: `python train_model.py ARGV`, then the end, whatever happens."""
    status = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(os.path.join(order["output"], name), os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(file, number)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(order["folder"])
        sys.argv = ["train_model.py", *order["argv"]]
        suffer(order["folder"], **order["faults"])
        runpy.run_path(str(ROOT / "train_model.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def suffer(
    folder: str,
    halt_at_steps: Any = (),
    halt_at_file: int = 0,
    largest_file: int = 0,
    die_at_byte: int = 0,
    memory: int = 0,
    ignore: Any = (),
) -> None:
    """Arrange the faults of this process.

    It halts after each of the optimizer steps named (twice if one is named twice), and before the
    file operation of that number in `folder` (opening to write, renaming, removing). No file
    may become larger than `largest_file` bytes: writing fails as on a full disk; with `die_at_byte`
    the process dies instead, in the middle of writing. It may use `memory` bytes more than now.
    Signals in `ignore` are ignored from the start, as `nohup` does.
    """
    import resource

    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = operations = 0

    def count_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        for _one in range(list(halt_at_steps).count(steps)):
            os.kill(os.getpid(), signal.SIGSTOP)

    def count_operation(event: str, arguments: Any) -> None:
        nonlocal operations
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if event in ("open", "os.rename", "os.remove") and isinstance(arguments[0], str):
            path = os.path.realpath(arguments[0])
            operations += path.startswith(os.path.realpath(folder) + os.sep)
            if operations == halt_at_file:
                os.kill(os.getpid(), signal.SIGSTOP)

    # Unless told otherwise it ignores none, also when `nohup pytest` is what started all this.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number in ignore:
        signal.signal(number, signal.SIG_IGN)
    if halt_at_steps:
        register_optimizer_step_post_hook(count_step)
    if halt_at_file:
        sys.addaudithook(count_operation)
    if die_at_byte:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it: writing just fails
    if largest_file or die_at_byte:
        limit = largest_file or die_at_byte
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if memory:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))


if __name__ == "__main__":
    serve()
