"""Whatever the arguments, the text, the prompt and the checkpoint are: 0 or 2, and nothing is lost.

`TINYGPT_FUZZ_CASES=10000 pytest tests/test_fuzz.py` tries more than the usual 300.
"""

import contextlib
import copy
import io
import math
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import SIZES, STEPS, at_step, call, contents, limited, make_text, train, working_in
from optional_hypothesis import given, settings, st

import generate_text
from train_model import previous_name

CASES = int(os.environ.get("TINYGPT_FUZZ_CASES", 300))
HEADER = b"epoch,step,train_loss,val_loss,seconds\n"
RUN = [*SIZES, "--epochs", "2", "--dropout", "0.1"]


def fuzz(percent):
    """So many of all cases, the same ones every time."""
    return settings(max_examples=max(CASES * percent // 100, 1), derandomize=True, deadline=None)


class Files(dict):
    """Names and bytes of files, which a failing test need not print."""

    def __repr__(self):
        return f"Files of {list(self)}"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The files that lie around in every case: a text, two checkpoints, and what is not ours."""
    with working_in(tmp_path_factory.mktemp("template")) as folder:
        (folder / "text.txt").write_text(make_text(600), encoding="utf-8")
        for name, step, status in (("finished", 10**9, 0), ("unfinished", STEPS - 3, 130)):
            names = ["--checkpoint", f"{name}.pth", "--training_log", f"{name}.csv"]
            with at_step(step, 2):  # SIGINT
                assert train("--input", "text.txt", *names, *RUN).status == status
        (folder / "empty.txt").write_bytes(b"")
        (folder / "notes.txt").write_bytes(b"\xff\x00 private notes")
        (folder / "folder").mkdir()
        (folder / "folder" / "more.csv").write_bytes(b"a,b\n1,2\n")
        return Files(contents(folder))


@contextlib.contextmanager
def a_case(files):
    """Inside, the current directory holds these files; it is gone afterwards.

    There are 2 GB of memory more than now: a file that claims to be huge must not take them.
    """
    with contextlib.ExitStack() as stack:
        outer = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = stack.enter_context(working_in(outer / "case"))
        for name, data in files.items():
            (folder / name).mkdir() if data is None else (folder / name).write_bytes(data)
        os.symlink("notes.txt", folder / "link.pth")
        if sys.platform == "linux":
            stack.enter_context(limited(memory=2_000_000_000))
        yield outer


def check_outcome(done):
    """It succeeded, or said in ASCII what the user can mend; nothing looks like a traceback."""
    assert done.status in (0, 2), done
    assert "Traceback" not in done.err and not re.search(r'File ".*", line \d+', done.err), done
    if done.status == 2:
        assert done.err.isascii() and done.err.splitlines()[-1].startswith("error: "), done
    return done


def check_train(outer, argv, *writes):
    """Train; every file that existed is as it was, or kept as the previous one; no stray is new.

    A resumed run replaces its own checkpoint and log. `writes` are the names of both.
    """
    before = contents(outer)
    where = {name: os.path.realpath(outer / name) for name in before}
    real = [os.path.realpath(path) if path else "" for path in writes]
    older = [os.path.realpath(previous_name(path)) for path in [*real, *writes]]
    done = check_outcome(train(*argv))
    after = {os.path.realpath(outer / name): data for name, data in contents(outer).items()}
    for name, data in before.items():
        kept = after.get(where[name]) == data
        if not kept and where[name] in real:  # beside a link, or beside what it links to
            kept = data in [after.get(path) for path in older]
        if not kept and "--resume" in argv:
            kept = where[name] == real[0] or (where[name] == real[1] and data.startswith(HEADER))
        assert kept, (name, done)
    assert set(after) - set(where.values()) <= {*real, *older}, done
    return done


def check_generate(outer, argv, stdin=b""):
    """Write; no file has changed."""
    before = contents(outer)
    done = check_outcome(call(generate_text.main, argv, stdin))
    assert contents(outer) == before
    return done


# ---- Arguments ---------------------------------------------------------------------------------

# What a process can be given: no NUL, and of the surrogates those that stand for stray bytes.
LETTERS = st.one_of(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"),
    st.sampled_from("\udc80\udcffabc -\n\u0663\u0301\U0001f600"),
)
WORDS = st.text(LETTERS, max_size=8)
ODD_NUMBERS = st.one_of(
    st.sampled_from(["", "nan", "-inf", "1e400", "1e-320", "0x10", "9" * 5_000, "\u0663", "-0"]),
    st.floats().map(repr),
    st.integers(-(2**70), -1).map(str),
    WORDS,
)


def number(usual):
    """Values of a setting: mostly usable ones, none of which makes a run long."""
    return st.one_of(st.sampled_from(usual.split()), st.sampled_from(usual.split()), ODD_NUMBERS)


PATHS = [
    *["text.txt", "empty.txt", "notes.txt", "link.pth", "folder", "folder/more.csv", "text.txt/x"],
    *["finished.pth", "finished.csv", "unfinished.pth", "unfinished.csv", "new.pth", "new.csv"],
    *["nowhere/new.pth", "./new.pth", "folder/../text.txt", "new.previous.pth", "", "x" * 300],
]
TRAINING = {
    "--input": st.sampled_from(PATHS),
    "--checkpoint": st.sampled_from(PATHS),
    "--training_log": st.sampled_from(PATHS),
    "--device": st.sampled_from(["auto", "cpu", "mps", "tpu"]),
    "--preset": st.sampled_from(["auto", "laptop", "gpu", "huge"]),
    "--compile": st.sampled_from(["auto", "off", "maybe"]),
    "--block_size": number("1 2 16 64 65536 65537 0"),
    "--batch_size": number("4 8 65536 65537 0"),
    "--validation_fraction": number("0.1 0.5 0.001 0.51"),
    "--n_layer": number("1 2 0 1001 1000000000000"),
    "--n_head": number("1 2 4 3 1024"),
    "--n_embd": number("4 8 16 17 65536 1000000000000"),
    "--dropout": number("0 0.5 0.99 1"),
    "--epochs": number("1 3 0 1000001"),
    "--learning_rate": number("0 0.01 10 10.1"),
    "--warmup_steps": number("0 3 1000000 1000001"),
    "--weight_decay": number("0 100 1000"),
    "--beta2": number("0 0.5 0.99999 1"),
    "--gradient_clip": number("0.000001 1 1000000 0"),
    "--seed": number(f"0 7 {2**63 - 1} {2**63}"),
    "--save_minutes": number("0.01 1000000 0"),
}
WRITING = {
    "--checkpoint": st.sampled_from(["finished.pth", "unfinished.pth", *PATHS]),
    "--prompt": st.one_of(st.just("-"), st.text("abc ", max_size=60), st.text(LETTERS, max_size=9)),
    "--max_new_tokens": number("0 1 40 -1 1000000001"),
    "--temperature": number("0 0.5 1e-300 1000 1001"),
    "--top_k": number("0 1 3 1000000000"),
    "--top_p": number("1 0.5 1e-9 0 1.1"),
    "--num_samples": number("1 3 0 1001"),
    "--seed": number(f"0 {2**63 - 1} {2**63}"),
    "--device": st.sampled_from(["auto", "cpu", "mps", "tpu"]),
}


def flags(values):
    """Up to four flags with values of their own."""
    names = st.sampled_from(sorted(values))
    return st.lists(names.flatmap(lambda name: st.tuples(st.just(name), values[name])), max_size=4)


NOISE = st.one_of(
    *[st.just([])] * 3,
    st.lists(
        st.one_of(WORDS, st.sampled_from(["--help", "--", "--epoch", "--seed=x"])), max_size=2
    ),
)


def spelled(chosen, joined):
    """--flag value or --flag=value."""
    return [word for pair in chosen for word in (["=".join(pair)] if joined else pair)]


@fuzz(30)
@given(
    flags(TRAINING),
    st.booleans(),
    st.sampled_from([[], [], ["--resume"]]),
    st.sampled_from(["new", "new", "unfinished", "finished"]),
    NOISE,
)
def test_any_arguments_of_training(template, chosen, joined, resume, stem, odd):
    usual = {"--input": "text.txt", "--checkpoint": f"{stem}.pth", "--training_log": f"{stem}.csv"}
    names = {**usual, **dict(chosen)}
    argv = [*spelled(usual.items(), joined), *(resume or RUN), *spelled(chosen, joined), *odd]
    with a_case(template) as outer:
        check_train(outer, argv, names["--checkpoint"], names["--training_log"])


@fuzz(15)
@given(flags(WRITING), st.booleans(), st.binary(max_size=20), NOISE)
def test_any_arguments_and_prompts_of_writing(template, chosen, joined, stdin, odd):
    with a_case(template) as outer:
        usual = ["--checkpoint", "finished.pth", "--max_new_tokens", "20"]
        check_generate(outer, [*usual, *spelled(chosen, joined), *odd], stdin)


# ---- Texts and checkpoints ---------------------------------------------------------------------

PIECES = st.one_of(
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from([b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n", b"\0", b"\xed\xa0\x80", b"\xf0\x9f"]),
    st.sampled_from(["\U0001f600", "e\u0301", "\u0633\u0644", "\U0010ffff"]).map(str.encode),
    st.binary(max_size=4),
)
NEW = ["--input", "text.txt", "--checkpoint", "new.pth", "--training_log", "new.csv"]


@fuzz(15)
@given(
    st.lists(PIECES), st.integers(1, 60), st.sampled_from("125"), st.sampled_from(["0.1", "0.5"])
)
def test_any_text(template, pieces, times, block_size, share):
    with a_case({**template, "text.txt": (b"".join(pieces) * times)[:3_000]}) as outer:
        sizes = ["--block_size", block_size, "--validation_fraction", share, "--batch_size", "64"]
        if check_train(outer, [*NEW, *RUN, *sizes], "new.pth", "new.csv").status == 0:
            argv = ["--checkpoint", "new.pth", "--max_new_tokens", "9", "--num_samples", "2"]
            assert check_generate(outer, argv).status == 0


VALUES = [
    *[None, True, 0, 1, -1, 3, 2**31, 10**12, 10**400, 0.0, 1.5, -1.0, math.nan, math.inf],
    *["", "x", "ba", "\ud800", "aa" * 300, b"", [], [1], [[]], {}, {"x": 1}, (), ((),), set()],
    *[[[1, 6, 2.0, 2.0, 1.0]], [[1, 6, 2.0, 2.0]], ([1, 6, 2.0, 2.0, 1.0],), [1, 2, 3, 4, 5]],
    *[torch.zeros(()), torch.zeros(2, 3), torch.zeros(0), torch.zeros(1).expand(10**9)],
    *[torch.zeros(1, 1).expand(10**5, 10**5), torch.zeros(9, 16).t(), torch.zeros(16, 16).double()],
    *[torch.full((9, 16), math.nan), torch.zeros(9, 16).char(), torch.zeros(9, 16).to_sparse()],
    *[torch.zeros(9, 16, device="meta"), torch.nn.Parameter(torch.zeros(9, 16))],
]


def places(value):
    """Every (container, key) in nested dicts and lists, the outer ones first."""
    found, queue = [], [value]
    while queue:
        one = queue.pop(0)
        if isinstance(one, (dict, list)):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            found += [(one, key) for key in keys]
            queue += [one[key] for key in keys]
    return found


def damaged(data, other, kind, a, b, changes):
    """The bytes of one checkpoint, damaged with the help of those of another."""
    if kind == "cut":
        return data[: a % len(data)] + other[: b % 3]
    if kind == "splice":
        return data[: a % len(data)] + other[b % len(other) :]
    file = io.BytesIO()
    if kind == "values":
        inside = torch.load(io.BytesIO(data), weights_only=True)
        for where, value in changes:
            found = places(inside)
            container, key = found[where % len(found)]
            if value % 8 == 0:
                del container[key]
            else:
                container[key] = copy.deepcopy(VALUES[value % len(VALUES)])
        torch.save(inside, file)
        return file.getvalue()
    if kind == "flip":
        changed = bytearray(data)
    else:  # the pickle inside, in a zip that is whole
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = {name: bytearray(archive.read(name)) for name in archive.namelist()}
        changed = parts[next(name for name in parts if name.endswith("data.pkl"))]
    for where, value in changes:
        changed[where % len(changed)] = value
    if kind == "flip":
        return bytes(changed)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED * (a % 9 == 0)) as archive:
        for name, part in list(parts.items())[b % 5 == 0 :]:
            archive.writestr(name, bytes(part))
    return file.getvalue()


@fuzz(40)
@given(
    st.sampled_from(["flip", "cut", "splice", "pickle", "pickle", *["values"] * 6]),
    st.integers(0, 2**30),
    st.integers(0, 2**30),
    st.lists(st.tuples(st.integers(0, 2**30), st.integers(0, 255)), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_checkpoint(template, kind, a, b, changes, finished):
    names = ("finished.pth", "unfinished.pth")
    data, other = (template[name] for name in (names if finished else names[::-1]))
    with a_case({**template, "model.pth": damaged(data, other, kind, a, b, changes)}) as outer:
        argv = ["--checkpoint", "model.pth", "--max_new_tokens", "5", "--seed", "1"]
        assert "memory" not in check_generate(outer, argv).err
        argv = [
            "--input",
            "text.txt",
            "--checkpoint",
            "model.pth",
            "--training_log",
            "unfinished.csv",
        ]
        assert (
            "memory"
            not in check_train(outer, [*argv, "--resume"], "model.pth", "unfinished.csv").err
        )
