"""No night of training is lost: runs that are interrupted, killed, and deprived of their disk.

All for real. `TINYGPT_KILLS=500 pytest tests/test_interruptions.py` kills more often than usual.
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial

import helpers
import pytest
import torch
from helpers import RESUME, STEPS, TINY, at_step, contents, limited, log_rows, results, train
from tqdm import tqdm

import generate_text
import train_model
from model_architecture import load_checkpoint

KILLS = int(os.environ.get("TINYGPT_KILLS", 50))
EPOCHS = 3
RUN = [*TINY, "--dropout", "0.2", "--epochs", str(EPOCHS)]
INSIDE = ["--checkpoint", "out/model.pth", "--training_log", "out/log.csv"]
pytestmark = [helpers.needs_posix, pytest.mark.usefixtures("here")]
tqdm.monitor_interval = 0  # its thread might hold a lock while a test forks
tqdm.set_lock(threading.RLock())  # its own is for all processes: one killed with it blocks the rest


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The results of a run that nothing interrupts."""
    with helpers.working_in(tmp_path_factory.mktemp("straight")):
        assert train(*RUN).status == 0
        return results()


def stopped_at(step, *argv, number=signal.SIGINT):
    """A run that gets the signal when it has taken that many steps in this session."""
    with at_step(step, number):
        return train(*argv)


def forked(argv, fault=lambda: None):
    """The status of a run in a process of its own; below zero, the signal that killed it."""
    return helpers.ended(helpers.fork(lambda: fault() or train(*argv).status))


# ---- Signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 1, EPOCHS * STEPS])
def test_resuming_gives_the_same_bits_wherever_a_run_was_interrupted(here, straight, step):
    assert stopped_at(step, *RUN).status == 130
    assert load_checkpoint("model.pth")[2]["step"] == step
    assert train(*RESUME).status == 0
    assert results() == straight
    assert set(contents(here)) == {"text.txt", "model.pth", "log.csv"}


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_the_same_command_with_resume_continues(straight, name, status):
    odd = "it's a \u00e9 $HOME"
    os.rename("text.txt", f"{odd}.txt")
    names = ["--input", f"{odd}.txt", "--checkpoint", f"{odd}.pth", f"--training_log=-{odd}.csv"]
    done = stopped_at(STEPS + 2, *RUN, *names, number=getattr(signal, name))
    assert (done.status, done.err) == (status, "")
    assert "--resume" in done.out.splitlines()[-1]
    assert train(*RUN, *names, "--resume").status == 0
    assert results(f"{odd}.pth", f"-{odd}.csv") == straight


def test_a_second_signal_quits_at_once(here):
    for number in (signal.SIGINT, signal.SIGTERM):
        with at_step(5, number, number):
            assert forked(RUN) in (-number, 128 + number)
        assert list(contents(here)) == ["text.txt"]


def test_an_interrupt_before_the_first_step_leaves_everything_as_it_was(here, monkeypatch):
    monkeypatch.setattr(train_model, "load_text", lambda _: signal.raise_signal(signal.SIGINT))
    assert train(*RUN)[::2] == (130, "")
    assert list(contents(here)) == ["text.txt"]


def test_a_long_epoch_is_saved_now_and_then(monkeypatch):
    clock, steps = itertools.count(), []
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))  # a second at every look
    with at_step(STEPS - 1, lambda: steps.append(load_checkpoint("model.pth")[2]["step"])):
        assert train(*RUN, "--save_minutes", "0.05").status == 0
    assert 1 <= steps[0] < STEPS - 1


# ---- Two runs ------------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_goes_on(here, straight):
    def meanwhile():
        before = contents(here)
        with torch.random.fork_rng():
            mixed = ["--checkpoint", "out/../model.pth", "--training_log", "out/log.csv"]
            for argv in (RUN, RESUME, [*RUN, *mixed], [*RUN, "--checkpoint", "out/model.pth"]):
                assert "another run" in train(*argv).sentence()
            assert helpers.call(generate_text.main, ["--checkpoint", "model.pth"]).status == 0
            assert contents(here) == before
            assert train(*RUN, *INSIDE).status == 0

    os.mkdir("out")
    with at_step(STEPS + 1, meanwhile):
        assert train(*RUN).status == 0
    assert results() == results("out/model.pth", "out/log.csv") == straight


def test_without_locks_a_run_trains_all_the_same(here, straight, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(here / "nowhere"))
    assert train(*RUN).status == 0
    assert results() == straight


# ---- kill -9: each next run also shows that no lock stays behind ---------------------------------


def die_at_file(number, later=0.0):
    """From now on: die at that file operation (opening to write, renaming, removing), or after."""
    seen, folder = 0, os.path.realpath(".") + os.sep

    def count(event, arguments):
        nonlocal seen
        if event in ("os.rename", "os.remove") or event == "open" and arguments[2] & os.O_WRONLY:
            seen += os.path.realpath(arguments[0]).startswith(folder)
            if seen == number:
                die_after(later) if later else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def die_after(seconds):
    """The system ends the process then, whatever it is doing."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def die_at_byte(number):
    """Die in the middle of writing a file that large."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it: writing just fails
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def test_killed_anywhere_a_run_ends_in_the_same_bits(here):
    rng, run, kills = random.Random(2024), [*RUN, "--epochs", "6"], 0
    assert train(*run).status == 0
    whole, rows = results()
    while kills < KILLS:
        for path in here.glob("*.[cp]*"):
            path.unlink()
        status = -1
        while status < 0:
            after = partial(die_at_file, rng.randint(1, 30), rng.uniform(0, 0.004))
            byte = partial(die_at_byte, rng.randint(1, 60_000))
            moment = partial(die_after, rng.uniform(0, 0.3))
            exact = partial(die_at_file, rng.randint(1, 30))
            fault = rng.choice([exact, after, after, byte, moment])
            argv = RESUME if os.path.exists("model.pth") else run
            status = forked(argv, fault if kills < KILLS else lambda: None)
            kills += status < 0
            if os.path.exists("model.pth"):
                load_checkpoint("model.pth")  # whole, at any moment
            if os.path.exists("log.csv"):
                assert log_rows() == rows[: len(log_rows())]
        assert status == 0
        assert results() == (whole, rows)
        assert set(contents(here)) <= {"text.txt", "model.pth", "log.csv", "log.previous.csv"}


def killed_at_every_file_operation(folder, argv):
    """Yield the status and what is left, for one operation after the other."""
    before = contents(folder)
    for operation in range(1, 40):
        for path in folder.iterdir():
            path.unlink()
        for name, data in before.items():
            (folder / name).write_bytes(data)
        yield forked(argv, partial(die_at_file, operation)), contents(folder)
    raise AssertionError("it never ends")


def test_killed_at_every_file_operation_of_the_last_save(here, straight):
    """A run that is killed between writing its log and its checkpoint has each row all the same."""
    assert stopped_at(EPOCHS * STEPS, *RUN).status == 130
    deaths = 0
    for status, _ in killed_at_every_file_operation(here, RESUME):
        assert train(*RESUME).status == 0
        assert results() == straight
        if status == 0:
            break
        deaths += 1
    assert deaths >= 5


def test_killed_at_every_file_operation_a_fresh_run_keeps_the_older_files(here):
    assert train(*TINY).status == 0
    older = contents(here)
    for status, now in killed_at_every_file_operation(here, RUN):
        assert status == -signal.SIGKILL
        assert older["model.pth"] in (now["model.pth"], now.get("model.previous.pth"))
        assert older["log.csv"] in (now["log.csv"], now.get("log.previous.csv"))
        if now["model.pth"] != older["model.pth"]:
            break


# ---- Disks ---------------------------------------------------------------------------------------


def check_trained_but_not_saved(done, folder, before, reason):
    """The run came to its last epoch, said why it could not save, and harmed nothing."""
    assert reason in done.sentence()
    assert f"epoch {EPOCHS}/{EPOCHS}" in done.out
    assert reason in next(line for line in done.out.splitlines() if "warning: not saved" in line)
    assert contents(folder) == before


def test_a_file_that_cannot_be_written_ends_neither_the_run_nor_the_old_checkpoint(here):
    assert train(*TINY).status == 0
    before = contents(here)
    with limited(file=len(before["model.pth"]) // 2):
        check_trained_but_not_saved(train(*RUN), here, before, "File too large")
        stopped = stopped_at(4, *RUN)
    assert "saved" in stopped.sentence() and "--resume" not in stopped.out
    assert contents(here) == before


def test_what_can_be_saved_later_is_saved_later(here, straight):
    """What resuming needs is too large for this disk, what generation needs is not."""
    assert train(*TINY).status == 0
    before = results()
    with limited(file=len(straight[0]) + 5_000):
        done = train(*RUN)
    assert done[::2] == (0, "") and done.out.count("warning: not saved") == EPOCHS - 1
    assert results() == straight
    assert results("model.previous.pth", "log.previous.csv") == before
    assert len(contents(here)) == 5


def test_a_folder_that_vanishes_in_mid_run_may_come_back_in_time(here, straight):
    os.mkdir("out")
    with at_step(2, lambda: os.rename("out", "gone")):
        with at_step(2 * STEPS + 1, lambda: os.rename("gone", "out")):
            done = train(*RUN, *INSIDE)
    assert (done.status, done.out.count("warning: not saved")) == (0, 2)
    assert results("out/model.pth", "out/log.csv") == straight

    with at_step(STEPS + 1, lambda: shutil.rmtree("out")):
        done = train(*RUN, *INSIDE)
    check_trained_but_not_saved(done, here, {"text.txt": contents(here)["text.txt"]}, "out/")


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 256 kB, in memory, as the working directory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tinygpt", str(folder)]
    if not sys.platform.startswith("linux") or os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("only root on Linux can make a disk, where it is allowed to")
    with helpers.working_in(folder):
        yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(disk, straight):
    assert train(*TINY).status == 0
    space = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 8_192))
    before = contents(disk)
    check_trained_but_not_saved(train(*RUN), disk, before, "No space left on device")

    with at_step(2 * STEPS + 1, (disk / "filler").unlink):  # the user makes room
        done = train(*RUN)
    assert (done.status, done.out.count("No space left on device")) == (0, 2)
    assert results() == straight
    assert contents(disk)["model.previous.pth"] == before["model.pth"]


def check_found_before_training(folder, reason):
    """A run is refused, and has done nothing."""
    before = contents(folder)
    done = train(*RUN)
    assert reason in done.sentence() and done.out == "" and contents(folder) == before


def test_a_read_only_disk(disk):
    def fail():  # as a system does after a disk's error
        before.update(contents(disk))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    before = {}
    with at_step(STEPS + 1, fail):
        done = train(*RUN)
    check_trained_but_not_saved(done, disk, before, "Read-only file system")
    assert set(before) == {"text.txt", "model.pth", "log.csv"}
    check_found_before_training(disk, "Read-only file system")


def test_a_folder_that_cannot_be_written(here):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; see the read-only disk")
    here.chmod(0o555)
    check_found_before_training(here, "model.pth")
    here.chmod(0o755)
