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
from pathlib import Path
from unittest import mock

import helpers
import pytest
import torch
from helpers import RESUME, STEPS, TINY, at_step, contents, learn, results, stopped_at, train
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
tqdm.set_lock(threading.RLock())  # its own is shared with forks, and would outlive a killed one


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The results of a run that nothing interrupts."""
    with helpers.working_in(tmp_path_factory.mktemp("straight")):
        learn(*RUN)
        return results()


@pytest.mark.parametrize(
    "step, name", [(1, "SIGINT"), (8, "SIGTERM"), (9, "SIGHUP"), (10, "SIGINT"), (27, "SIGTERM")]
)
def test_resuming_gives_the_same_bits_wherever_a_signal_came(straight, step, name):
    odd, number = "it's a \u00e9 $HOME", getattr(signal, name)
    os.rename("text.txt", f"{odd}.txt")
    names = ["--input", f"{odd}.txt", "--checkpoint", f"{odd}.pth", f"--training_log=-{odd}.csv"]
    done = stopped_at(step, *RUN, *names, number=number)
    assert (done.status, done.err) == (128 + number, "")
    assert "--resume" in done.out.splitlines()[-1]
    assert load_checkpoint(f"{odd}.pth")[2]["step"] == step
    learn(*RUN, *names, "--resume")
    assert results(f"{odd}.pth", f"-{odd}.csv") == straight
    assert len(contents()) == 3


def test_a_later_signal_quits_at_once_as_does_one_before_the_first_step(monkeypatch):
    clock = itertools.count(step=2)  # every look at the clock is two seconds after the last
    for number in (signal.SIGINT, signal.SIGTERM):
        with at_step(5, number, number):
            late = partial(setattr, time, "monotonic", lambda: float(next(clock)))
            assert forked(RUN, late) in (-number, 128 + number)
    monkeypatch.setattr(train_model, "load_text", lambda _: signal.raise_signal(signal.SIGINT))
    assert train(*RUN)[::2] == (130, "")
    assert list(contents()) == ["text.txt"]


def test_neither_hangups_nor_missing_locks_end_a_run_badly(here, straight, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(here / "nowhere"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    status = stopped_at(3, *RUN, number=signal.SIGHUP).status
    signal.signal(signal.SIGHUP, before)
    with at_step(3, *2 * [signal.SIGTERM], *2 * [signal.SIGHUP]):  # one stop can send several
        assert forked([*RUN, *INSIDE[:1], "other.pth"]) == 129
    assert (status, results()) == (0, straight)


def test_a_long_epoch_is_saved_now_and_then_and_at_once_on_the_disk(monkeypatch):
    clock, steps, synced = itertools.count(), [], set()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))  # a second at every look
    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.stat(number).st_ino))
    again = itertools.cycle([PermissionError, mock.DEFAULT])  # as while a virus scanner looks at it
    monkeypatch.setattr(os, "replace", mock.Mock(wraps=os.replace, side_effect=again))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with at_step(STEPS - 1, lambda: steps.append(load_checkpoint("model.pth")[2]["step"])):
        learn(*RUN, "--save_minutes", "0.05")
    assert 1 <= steps[0] < STEPS - 1
    assert {os.stat(name).st_ino for name in ("model.pth", "log.csv")} <= synced


def test_the_first_save_keeps_what_was_there_and_a_link_stays_a_link():
    Path("elsewhere.pth").write_bytes(b"older")
    os.symlink("elsewhere.pth", "model.pth")
    assert stopped_at(2, *RUN).status == 130
    assert Path("model.previous.pth").read_bytes() == b"older" and os.path.islink("model.pth")
    load_checkpoint("elsewhere.pth")
    assert stopped_at(2, *RUN).status == 130  # nor do two false starts lose it
    assert Path("model.previous.pth").read_bytes() == b"older"
    load_checkpoint("model.previous1.pth")
    os.symlink("nowhere/model.pth", "lost.pth")
    done = train(*RUN, "--checkpoint", "lost.pth")
    assert "nowhere" in done.sentence() and done.out == ""  # before an epoch is spent


def test_a_second_run_is_refused_while_the_first_goes_on(straight):
    def meanwhile():
        before = contents()
        with torch.random.fork_rng():
            mixed = ["--checkpoint", "out/../model.pth", "--training_log", "out/log.csv"]
            for argv in (RUN, RESUME, [*RUN, *mixed], [*RUN, "--checkpoint", "out/model.pth"]):
                assert "another run" in train(*argv).sentence()
            assert helpers.call(generate_text.main, ["--checkpoint", "model.pth"]).status == 0
            assert contents() == before
            learn(*RUN, *INSIDE)

    os.mkdir("out")
    with at_step(STEPS + 1, meanwhile):
        learn(*RUN)
    assert results() == results("out/model.pth", "out/log.csv") == straight


def forked(argv, fault=lambda: None):
    """The status of a run in a process of its own; below zero, the signal that killed it."""
    return helpers.ended(helpers.fork(lambda: fault() or train(*argv).status))


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


def test_killed_anywhere_a_run_ends_in_the_same_bits_and_leaves_no_lock(straight):
    rng, kills, fresh = random.Random(2024), 0, contents()
    while kills < KILLS:
        helpers.restore(fresh)
        status = -1
        while status < 0:
            after = partial(die_at_file, rng.randint(1, 20), rng.uniform(0, 0.004))
            byte = partial(die_at_byte, rng.randint(1, 60_000))
            moment = partial(die_after, rng.uniform(0, 0.2))
            exact = partial(die_at_file, rng.randint(1, 20))
            fault = rng.choice([exact, after, after, byte, moment])
            argv = RESUME if os.path.exists("model.pth") else RUN
            status = forked(argv, fault if kills < KILLS else lambda: None)
            kills += status < 0
            if os.path.exists("model.pth"):
                load_checkpoint("model.pth")  # whole, at any moment
            if os.path.exists("log.csv"):
                rows = helpers.log_rows()
                assert rows == straight[1][: len(rows)]
        assert (status, results()) == (0, straight)
        assert {"model.pth"} == {name for name in contents() if name.endswith((".pth", ".part"))}


def test_killed_at_every_file_operation_of_the_last_save(straight):
    """A run that is killed between writing its log and its checkpoint has each row all the same."""
    assert stopped_at(EPOCHS * STEPS, *RUN).status == 130
    before, status, operation = contents(), -1, 0
    while status < 0:
        operation += 1
        helpers.restore(before)
        status = forked(RESUME, partial(die_at_file, operation))
        learn(*RESUME)
        assert results() == straight
    assert operation > 5


def test_killed_at_every_file_operation_a_fresh_run_keeps_the_older_files():
    learn(*TINY)
    before = contents()
    for operation in itertools.count(1):
        helpers.restore(before)
        assert forked(RUN, partial(die_at_file, operation)) == -signal.SIGKILL
        now = contents()
        assert before["model.pth"] in (now["model.pth"], now.get("model.previous.pth"))
        assert before["log.csv"] in (now["log.csv"], now.get("log.previous.csv"))
        if now["model.pth"] != before["model.pth"]:
            break


def check_trained_but_not_saved(done, before, reason):
    """The run came to its last epoch, said why it could not save, and harmed nothing."""
    assert reason in done.sentence() and f"epoch {EPOCHS}/{EPOCHS}" in done.out
    assert reason in next(line for line in done.out.splitlines() if "was not saved" in line)
    assert set(before.values()) <= set(contents().values())
    assert not any(name.endswith(".part") for name in contents())


def test_a_file_that_cannot_be_written_ends_neither_the_run_nor_the_old_checkpoint():
    learn(*TINY)
    before = contents()
    with helpers.limited("FSIZE", len(before["model.pth"]) // 2):
        check_trained_but_not_saved(train(*RUN), before, "File too large")
        stopped = stopped_at(4, *RUN)
    assert "saved" in stopped.sentence() and "--resume" not in stopped.out
    assert contents()["model.pth"] == before["model.pth"] and len(contents()) == 4


def test_what_can_be_saved_later_is_saved_later(straight):
    """What resuming needs is too large for this disk, what generation needs is not."""
    learn(*TINY)
    before = results()
    with helpers.limited("FSIZE", len(straight[0]) + 5_000):
        assert learn(*RUN).out.count("was not saved") == EPOCHS - 1
    assert results() == straight
    assert results("model.previous.pth", "log.previous.csv") == before
    assert len(contents()) == 5


def test_a_folder_that_vanishes_in_mid_run_may_come_back_in_time(straight):
    os.mkdir("out")
    with at_step(2, lambda: os.rename("out", "gone")):
        with at_step(2 * STEPS + 1, lambda: os.rename("gone", "out")):
            assert learn(*RUN, *INSIDE).out.count("was not saved") == 4
    assert results("out/model.pth", "out/log.csv") == straight

    with at_step(STEPS + 1, lambda: shutil.rmtree("out")):
        done = train(*RUN, *INSIDE[2:])
    check_trained_but_not_saved(done, {}, "out/")
    assert results("model.pth", done.sentence().split("'")[-2]) == straight  # kept elsewhere


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


def test_a_full_disk(disk):
    learn(*TINY)
    space = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 8_192))
    before = contents()
    check_trained_but_not_saved(train(*RUN), before, "No space left on device")


def test_a_read_only_disk(disk):
    def fail():  # as a system does after a disk's error
        before.update(contents())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    before = {}
    with at_step(STEPS + 1, fail):
        done = train(*RUN)
    check_trained_but_not_saved(done, before, "Read-only file system")
    assert set(before) == {"text.txt", "model.pth", "log.csv"}
    assert "Read-only file system" in helpers.refused(*RUN)


def test_a_folder_that_cannot_be_written(here):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; see the read-only disk")
    here.chmod(0o555)
    assert "model.pth" in helpers.refused(*RUN)
    here.chmod(0o755)
