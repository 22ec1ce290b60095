"""Nothing is lost: runs that are interrupted, killed, and deprived of their disk, all for real.

The runs are processes that halt where a test wants them to (helpers.py). `TINYGPT_KILLS=500 pytest
tests/test_interruptions.py` kills more often.
"""
# ruff: noqa: D103

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import FILES, POSIX, SIZES, STEPS, contents, forks, log_losses, write_text

from model_architecture import load_checkpoint

KILLS = int(os.environ.get("TINYGPT_KILLS", 50))
pytestmark = pytest.mark.skipif(not POSIX, reason="needs signals and fork")
EPOCHS = 3
RUN = [*FILES, *SIZES, "--dropout", "0.2", "--epochs", str(EPOCHS)]
RESUME = [*FILES, "--resume"]


@pytest.fixture
def here(tmp_path):
    """A folder with a text in it."""
    write_text(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What a run leaves that nothing interrupts: the checkpoint's bytes and the log's rows."""
    folder = tmp_path_factory.mktemp("straight")
    write_text(folder)
    done = forks().run(folder, *RUN)
    assert (done.status, done.err) == (0, ""), done
    return contents(folder)["model.pth"], log_losses(folder / "log.csv")


def check_equal(here, straight):
    """The folder holds what the straight run left, and nothing else."""
    assert contents(here)["model.pth"] == straight[0]
    assert log_losses(here / "log.csv") == straight[1]
    assert set(contents(here)) == {"text.txt", "model.pth", "log.csv"}


def stop_at(here, step, number, *argv):
    """Send a run the signal when it has just taken that step (of this session); return its end."""
    run = forks().start(here, *argv, halt_at_steps=[step])
    assert run.halted()
    run.send(number)
    run.go_on()
    return run.end()


# ---- Signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 1, EPOCHS * STEPS])
def test_resuming_gives_the_same_bits_wherever_a_run_was_interrupted(here, straight, step):
    assert stop_at(here, step, signal.SIGINT, *RUN).status == 130
    assert load_checkpoint(str(here / "model.pth"))[2]["step"] == step
    done = forks().run(here, *RESUME)
    assert (done.status, done.err) == (0, "")
    check_equal(here, straight)


@pytest.mark.parametrize("seed", [1, 2])
def test_resuming_again_and_again_gives_the_same_bits(here, straight, seed):
    rng = random.Random(seed)
    step, argv = 0, RUN
    while True:
        more = rng.randint(1, STEPS)
        step += more
        if step > EPOCHS * STEPS:
            break
        assert stop_at(here, more, signal.SIGINT, *argv).status == 130
        argv = RESUME
    assert forks().run(here, *argv).status == 0
    check_equal(here, straight)


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_prints_the_command_that_resumes(here, straight, name, status):
    odd = "it's a \u00e9 $HOME"
    (here / "text.txt").rename(here / f"{odd}.txt")
    paths = ["--input", f"{odd}.txt", "--checkpoint", f"{odd}.pth", f"--log=-{odd}.csv"]
    argv = [*paths, *RUN[len(FILES) :]]
    done = stop_at(here, STEPS + 2, getattr(signal, name), *argv)
    assert (done.status, done.err) == (status, "")
    line = done.out.splitlines()[-1]
    python, script, *again = shlex.split(line[line.index("python ") :])
    assert (python, script) == ("python", "train_model.py")
    assert forks().run(here, *again).status == 0
    assert contents(here)[f"{odd}.pth"] == straight[0]
    assert log_losses(here / f"-{odd}.csv") == straight[1]


def test_a_second_signal_quits_at_once(here):
    run = forks().start(here, *RUN, halt_at_steps=[5, 5])
    for _ in range(2):  # it halts twice after the same step, and knows the first signal then
        assert run.halted()
        run.send(signal.SIGINT)
        run.go_on()
    done = run.end()
    assert done.status in (-signal.SIGINT, 130)
    assert "Traceback" not in done.err
    assert list(contents(here)) == ["text.txt"]


def test_an_ignored_hangup_stays_ignored(here, straight):
    """`nohup` means that the run outlives its terminal."""
    run = forks().start(here, *RUN, halt_at_steps=[3], ignore=[signal.SIGHUP])
    assert run.halted()
    run.send(signal.SIGHUP)
    run.go_on()
    assert run.end().status == 0
    check_equal(here, straight)


def test_an_interrupt_before_the_first_step_leaves_everything_as_it_was(here):
    run = forks().start(here, *RUN, halt_at_file=1)  # the check that the folder can be written
    assert run.halted()
    run.send(signal.SIGINT)
    run.go_on()
    done = run.end()
    assert done.status == 130
    assert "Traceback" not in done.err
    assert list(contents(here)) == ["text.txt"]


@pytest.fixture
def finished(here):
    """The folder with a finished run in it, whose files must survive."""
    assert forks().run(here, *FILES, *SIZES, "--epochs", "1").status == 0
    return here


# ---- kill -9 -----------------------------------------------------------------------------------


def new_file(here):
    """Whether something lies in the folder that is being written at this moment."""
    names = {"text.txt", "model.pth", "log.csv", "log.previous.csv", "model.previous.pth"}
    return bool(set(os.listdir(here)) - names)


def kill_somewhere(here, argv, rng):
    """Kill a run, most likely while it saves; return False if it ended before that."""
    kind = rng.choice(["operation", "operation", "byte", "seen", "seen", "moment"])
    if kind == "byte":  # dies in the middle of writing
        return forks().run(here, *argv, die_at_byte=rng.randint(1, 60_000)).status < 0
    if kind == "operation":  # before some file is opened to be written, or renamed
        run = forks().start(here, *argv, halt_at_file=rng.randint(1, 14))
        run.halted()
    else:
        run = forks().start(here, *argv)
        if kind == "seen":
            give_up = time.monotonic() + rng.choice([0.5, 1.0])
            saves = rng.randint(1, 4)
            while saves and time.monotonic() < give_up:
                saves -= new_file(here)
        else:
            time.sleep(rng.uniform(0, 0.3))
    if run.status is not None:
        return False
    run.send(signal.SIGKILL)
    return run.end().status == -signal.SIGKILL


def test_killed_anywhere_a_run_ends_in_the_same_bits(tmp_path):
    rng = random.Random(2024)
    sizes = [*SIZES, "--dropout", "0.2", "--save_minutes", "0.01", "--epochs", "12"]
    straight = tmp_path / "straight"
    straight.mkdir()
    write_text(straight)
    assert forks().run(straight, *FILES, *sizes).status == 0
    rows = log_losses(straight / "log.csv")

    kills = 0
    while kills < KILLS:
        here = tmp_path / f"killed{kills}"
        here.mkdir()
        write_text(here)
        alive = True
        while alive and kills < KILLS:
            fresh = not (here / "model.pth").exists()
            alive = kill_somewhere(here, [*FILES, *sizes] if fresh else RESUME, rng)
            kills += alive
            if (here / "model.pth").exists():
                load_checkpoint(str(here / "model.pth"))  # whole, at any moment
            if (here / "log.csv").exists():
                found = log_losses(here / "log.csv")
                assert found == rows[: len(found)]
        argv = RESUME if (here / "model.pth").exists() else [*FILES, *sizes]
        done = forks().run(here, *argv)
        assert (done.status, done.err) == (0, ""), done
        assert contents(here)["model.pth"] == contents(straight)["model.pth"]
        assert log_losses(here / "log.csv") == rows
        assert set(contents(here)) <= {"text.txt", "model.pth", "log.csv", "log.previous.csv"}


def test_killed_at_every_file_operation_of_the_last_save(here, straight):
    """A run that is killed between writing its log and its checkpoint has each row all the same."""
    assert stop_at(here, EPOCHS * STEPS, signal.SIGINT, *RUN).status == 130
    before = contents(here)
    for operation in range(1, 30):
        for name, data in before.items():
            (here / name).write_bytes(data)
        run = forks().start(here, *RESUME, halt_at_file=operation)
        if not run.halted():
            break
        run.send(signal.SIGKILL)
        assert run.end().status == -signal.SIGKILL
        done = forks().run(here, *RESUME)
        assert (done.status, done.err) == (0, ""), operation
        check_equal(here, straight)
    assert 5 <= operation < 29


def test_killed_at_every_file_operation_a_fresh_run_keeps_the_older_files(finished):
    older = contents(finished)
    for operation in range(1, 40):
        for path in finished.iterdir():
            path.unlink()
        for name, data in older.items():
            (finished / name).write_bytes(data)
        run = forks().start(finished, *RUN, halt_at_file=operation, halt_at_steps=[STEPS + 1])
        assert run.halted()
        run.send(signal.SIGKILL)
        run.end()
        present = contents(finished)
        assert older["model.pth"] in (present["model.pth"], present.get("model.previous.pth"))
        assert older["log.csv"] in (present["log.csv"], present.get("log.previous.csv"))
        if present["model.pth"] != older["model.pth"]:
            break
    assert 5 <= operation < 39


# ---- Disks -------------------------------------------------------------------------------------


def is_trained(done):
    """Whether the run came to its last epoch, whatever it could not save."""
    return f"epoch {EPOCHS}/{EPOCHS}" in done.out


def test_a_file_that_cannot_be_written_ends_neither_the_run_nor_the_old_checkpoint(finished):
    before = contents(finished)
    done = forks().run(finished, *RUN, largest_file=len(before["model.pth"]) // 2)
    assert is_trained(done)
    assert "MB" in done.sentence()
    assert done.out.count("warning: not saved") == EPOCHS
    assert contents(finished) == before


def test_what_can_be_saved_later_is_saved_later(finished, straight):
    """What resuming needs is too large for this disk, what generation needs is not."""
    before = contents(finished)
    done = forks().run(finished, *RUN, largest_file=len(straight[0]) + 5_000)
    assert (done.status, done.err) == (0, "")
    assert done.out.count("warning: not saved") == EPOCHS - 1
    after = contents(finished)
    assert after["model.pth"] == straight[0]
    assert after["model.previous.pth"] == before["model.pth"]
    assert after["log.previous.csv"] == before["log.csv"]
    assert log_losses(finished / "log.csv") == straight[1]


def test_an_interrupt_that_cannot_save_says_so(finished):
    before = contents(finished)
    run = forks().start(finished, *RUN, halt_at_steps=[4], largest_file=8_000)  # bytes
    assert run.halted()
    run.send(signal.SIGINT)
    run.go_on()
    done = run.end()
    assert "saved" in done.sentence()
    assert "continue with" not in done.out
    assert contents(finished) == before


def test_a_folder_that_vanishes_in_mid_run(here):
    (here / "out").mkdir()
    paths = ["--input", "text.txt", "--checkpoint", "out/model.pth", "--log", "out/log.csv"]
    run = forks().start(here, *paths, *RUN[len(FILES) :], halt_at_steps=[STEPS + 1])
    assert run.halted()
    assert set(contents(here / "out")) == {"model.pth", "log.csv"}
    shutil.rmtree(here / "out")
    run.go_on()
    done = run.end()
    assert is_trained(done)
    assert "model.pth" in done.sentence() or "log.csv" in done.err
    assert list(contents(here)) == ["text.txt"]


def test_a_folder_that_comes_back_in_time(here, straight):
    (here / "out").mkdir()
    paths = ["--input", "text.txt", "--checkpoint", "out/model.pth", "--log", "out/log.csv"]
    argv = [*paths, *RUN[len(FILES) :]]
    run = forks().start(here, *argv, halt_at_steps=[2, 2 * STEPS + 1])
    assert run.halted()
    (here / "out").rename(here / "gone")
    run.go_on()
    assert run.halted()
    assert run.written("out").count("warning: not saved") == 2
    (here / "gone").rename(here / "out")
    run.go_on()
    assert run.end().status == 0
    assert contents(here)["out/model.pth"] == straight[0]
    assert log_losses(here / "out" / "log.csv") == straight[1]


def test_a_folder_that_cannot_be_written_is_found_before_training(here):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; see the test of a real disk")
    here.chmod(0o555)
    done = forks().run(here, *RUN)
    here.chmod(0o755)
    assert "model.pth" in done.sentence()
    assert done.out == ""
    assert list(contents(here)) == ["text.txt"]


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 256 kB, in memory; None where it cannot be had."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tinygpt", str(folder)]
    if not sys.platform.startswith("linux") or os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root on Linux can make a disk")
    if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no disk can be made here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk):
    """Leave 8 kB of the disk free."""
    space = os.statvfs(disk)
    with open(disk / "filler", "wb") as file:
        file.write(bytes(space.f_bavail * space.f_frsize - 8_192))


def test_a_full_disk(disk, straight):
    write_text(disk)
    assert forks().run(disk, *FILES, *SIZES, "--epochs", "1").status == 0
    fill(disk)
    before = contents(disk)
    done = forks().run(disk, *RUN)
    assert is_trained(done)
    assert "No space left on device" in done.sentence()
    assert "MB are needed" in done.err
    assert contents(disk) == before

    run = forks().start(disk, *RUN, halt_at_steps=[2 * STEPS + 1])
    assert run.halted()
    assert run.written("out").count("No space left on device") == 2
    assert contents(disk) == before
    (disk / "filler").unlink()  # the user makes room
    run.go_on()
    assert run.end().status == 0
    after = contents(disk)
    assert after["model.pth"] == straight[0]
    assert after["model.previous.pth"] == before["model.pth"]


def test_a_read_only_disk(disk):
    write_text(disk)
    run = forks().start(disk, *RUN, halt_at_steps=[STEPS + 1])
    assert run.halted()
    before = contents(disk)
    assert set(before) == {"text.txt", "model.pth", "log.csv"}
    remount = ["mount", "-o", "remount,ro", str(disk)]
    subprocess.run(remount, check=True)  # as a system does after a disk's error
    run.go_on()
    done = run.end()
    assert is_trained(done)
    assert "Read-only file system" in done.sentence()
    assert contents(disk) == before

    done = forks().run(disk, *RUN)  # and this is found before anything is trained
    assert "Read-only file system" in done.sentence()
    assert done.out == ""
    assert contents(disk) == before
