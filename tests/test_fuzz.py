"""Whatever the arguments, the text, the prompt and the checkpoint are: 0 or 2, and nothing is lost.

`TINYGPT_FUZZ_CASES=10000 pytest tests/test_fuzz.py` tries more than the usual 300.
"""

import contextlib
import copy
import io
import math
import os
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path

import helpers
import pytest
import torch
from helpers import STEPS, contents, given, settings, st

import generate_text
from hyperparameters import Hyperparameters
from train_model import previous_name

CASES = int(os.environ.get("TINYGPT_FUZZ_CASES", 300))
RUN = [*helpers.SIZES, "--epochs", "2", "--dropout", "0.1"]


def fuzz(percent):
    """So many of all cases, the same ones every time."""
    return settings(max_examples=max(CASES * percent // 100, 1), derandomize=True, deadline=None)


class Files(dict):
    """Names and bytes of files, which a failing test need not print."""

    def __repr__(self):
        return f"Files of {list(self)}"


def naming(stem):
    return ["--input", "text.txt", "--checkpoint", f"{stem}.pth", "--training_log", f"{stem}.csv"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The files that lie around in every case: a text, two checkpoints, and what is not ours."""
    with helpers.working_in(tmp_path_factory.mktemp("template")) as folder:
        (folder / "text.txt").write_text(helpers.make_text(600), encoding="utf-8")
        for name, step, status in (("finished", 10**9, 0), ("unfinished", STEPS - 3, 130)):
            with helpers.at_step(step, 2):  # SIGINT
                assert helpers.train(*naming(name), *RUN).status == status
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
    with tempfile.TemporaryDirectory() as outer, helpers.limited(memory=2_000_000_000):
        with helpers.working_in(Path(outer, "case")) as folder:
            for name, data in files.items():
                (folder / name).mkdir() if data is None else (folder / name).write_bytes(data)
            os.symlink("notes.txt", folder / "link.pth")
            yield Path(outer)


def check_outcome(done):
    """It succeeded, or said in ASCII what the user can mend; nothing looks like a traceback."""
    assert done.status in (0, 2) and "Traceback" not in done.err, done
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
    done = check_outcome(helpers.train(*argv))
    after = {os.path.realpath(outer / name): data for name, data in contents(outer).items()}
    for name, data in before.items():
        kept = after.get(where[name]) == data
        if not kept and where[name] in real:  # beside a link, or beside what it links to
            kept = data in [after.get(path) for path in older]
            kept = kept or (where[name] == real[1] and after[real[1]].startswith(data))
        if not kept and "--resume" in argv:
            kept = where[name] == real[0] or (where[name] == real[1] and data[:6] == b"epoch,")
        assert kept, (name, done)
    assert set(after) - set(where.values()) <= {*real, *older}, done
    return done


def check_generate(outer, argv, stdin=b""):
    """Write; no file has changed."""
    before = contents(outer)
    done = check_outcome(helpers.call(generate_text.main, argv, stdin))
    assert contents(outer) == before
    return done


# ---- Arguments -----------------------------------------------------------------------------------

# What a process can be given: no NUL, and of the surrogates those that stand for stray bytes.
LETTERS = st.characters(blacklist_categories=("Cs",), blacklist_characters="\0")
LETTERS = LETTERS | st.sampled_from("\udc80\udcffabc -\n\u0663\u0301\U0001f600")
WORDS = st.text(LETTERS, max_size=8)
ODD_NUMBERS = ["", "nan", "-inf", "1e400", "1e-320", "0x10", "9" * 5_000, "\u0663", "-0"]
ODD_NUMBERS = st.sampled_from(ODD_NUMBERS) | st.floats().map(repr) | WORDS
PATHS = [
    *["text.txt", "empty.txt", "notes.txt", "link.pth", "folder", "folder/more.csv", "text.txt/x"],
    *["finished.pth", "finished.csv", "unfinished.pth", "unfinished.csv", "new.pth", "new.csv"],
    *["nowhere/new.pth", "./new.pth", "folder/../text.txt", "new.previous.pth", "", "x" * 300],
]
TRAINING = {  # mostly usable values, none of which makes a run long
    **{one.name: [*one.metadata["range"], one.default] for one in fields(Hyperparameters)},
    "n_layer": [1, 2, 0, 1_001, 10**12],
    "n_embd": [4, 8, 16, 17, 65_536, 10**12],
    "epochs": [1, 3, 0, 1_000_001],
    "preset": ["auto", "laptop", "gpu", "huge"],
    "compile": ["auto", "off", "maybe"],
}
WRITING = {
    "max_new_tokens": [0, 1, 40, -1, 10**9 + 1],
    "temperature": [0, 0.5, 1e-300, 1_000, 1_001],
    "top_k": [0, 1, 3, 10**9],
    "top_p": [1, 0.5, 1e-9, 0, 1.1],
    "num_samples": [1, 3, 0, 1_001],
    "seed": [0, 7, 2**63 - 1, 2**63],
}


def flags(values, **others):
    """Up to four flags with values of their own."""
    kinds = {name: st.sampled_from(usual).map(str) for name, usual in values.items()}
    kinds = {name: kind | kind | ODD_NUMBERS for name, kind in kinds.items()}
    kinds.update(others, device=st.sampled_from(["auto", "cpu", "mps", "tpu"]))
    names = st.sampled_from(sorted(kinds))
    one = names.flatmap(lambda name: st.tuples(st.just(f"--{name}"), kinds[name]))
    return st.lists(one, max_size=4)


NOISE = st.lists(WORDS | st.sampled_from(["--help", "--", "--epoch", "--seed=x"]), max_size=2)
NOISE = st.just([]) | st.just([]) | st.just([]) | NOISE
PATH = st.sampled_from(PATHS)


@fuzz(30)
@given(
    flags(TRAINING, input=PATH, checkpoint=PATH, training_log=PATH),
    st.sampled_from([RUN, RUN, ["--resume"]]),
    st.sampled_from(["new", "new", "unfinished", "finished"]),
    NOISE,
)
def test_any_arguments_of_training(template, chosen, how, stem, odd):
    names = {"--checkpoint": f"{stem}.pth", "--training_log": f"{stem}.csv", **dict(chosen)}
    argv = [*naming(stem), *how, *map("=".join, chosen), *odd]
    with a_case(template) as outer:
        check_train(outer, argv, names["--checkpoint"], names["--training_log"])


PROMPT = st.just("-") | st.text("abc ", max_size=60) | st.text(LETTERS, max_size=9)


@fuzz(15)
@given(flags(WRITING, checkpoint=PATH, prompt=PROMPT), st.binary(max_size=20), NOISE)
def test_any_arguments_and_prompts_of_writing(template, chosen, stdin, odd):
    with a_case(template) as outer:
        usual = ["--checkpoint", "finished.pth", "--max_new_tokens", "20"]
        check_generate(outer, [*usual, *map("=".join, chosen), *odd], stdin)


# ---- Texts and checkpoints -----------------------------------------------------------------------

PIECES = ["\ufeff", "\r\n", "\r", "\n", "\0", "\U0001f600", "e\u0301", "\u0633\u0644", "\U0010ffff"]
PIECES = st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")) | st.one_of(
    st.sampled_from(PIECES).map(str.encode), st.binary(max_size=4)
)
SHARES = st.sampled_from(["0.1", "0.5"])


@fuzz(15)
@given(st.lists(PIECES), st.integers(1, 60), st.sampled_from("125"), SHARES)
def test_any_text(template, pieces, times, block_size, share):
    with a_case({**template, "text.txt": (b"".join(pieces) * times)[:3_000]}) as outer:
        sizes = ["--block_size", block_size, "--validation_fraction", share, "--batch_size", "64"]
        argv = [*naming("new"), *RUN, *sizes]
        if check_train(outer, argv, "new.pth", "new.csv").status == 0:
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
    for one in queue:
        if isinstance(one, (dict, list)):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            found += [(one, key) for key in keys]
            queue += [one[key] for key in keys]
    return found


def overwritten(data, changes):
    """The bytes with some of them changed."""
    data = bytearray(data)
    for where, value in changes:
        data[where % len(data)] = value
    return bytes(data)


def damaged(data, other, kind, cut, changes):
    """The bytes of one checkpoint, damaged with the help of those of another."""
    file = io.BytesIO()
    if kind == "cut":
        return data[: cut % len(data)] + other[cut % 999_983 % len(other) :] * (cut % 2)
    if kind == "bytes":
        return overwritten(data, changes)
    if kind == "pickle":  # in a zip that is whole
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                part = old.read(name)
                new.writestr(name, overwritten(part, changes) if name[-4:] == ".pkl" else part)
        return file.getvalue()
    inside = torch.load(io.BytesIO(data), weights_only=True)
    for where, value in changes:
        container, key = places(inside)[where % len(places(inside))]
        if value % 8 == 0:
            del container[key]
        else:
            container[key] = copy.deepcopy(VALUES[value % len(VALUES)])
    torch.save(inside, file)
    return file.getvalue()


@fuzz(40)
@given(
    st.sampled_from(["bytes", "cut", "pickle", "pickle", *["values"] * 6]),
    st.integers(0, 2**30),
    st.lists(st.tuples(st.integers(0, 2**30), st.integers(0, 255)), min_size=1, max_size=3),
    st.sampled_from([("finished.pth", "unfinished.pth"), ("unfinished.pth", "finished.pth")]),
)
def test_any_checkpoint(template, kind, cut, changes, names):
    data, other = (template[name] for name in names)
    with a_case({**template, "unfinished.pth": damaged(data, other, kind, cut, changes)}) as outer:
        argv = ["--checkpoint", "unfinished.pth", "--max_new_tokens", "5", "--seed", "1"]
        assert "memory" not in check_generate(outer, argv).err
        argv = [*naming("unfinished"), "--resume"]
        assert "memory" not in check_train(outer, argv, "unfinished.pth", "unfinished.csv").err
