"""Whatever the arguments, the text, the prompt and the checkpoint are: 0 or 2, and nothing is lost.

`TINYGPT_FUZZ_CASES=10000 pytest tests/test_fuzz.py` tries more than the usual 300.
"""

import copy
import io
import math
import os
import zipfile
from dataclasses import fields
from pathlib import Path

import helpers
import pytest
import torch
from helpers import STEPS, contents, given, settings, st, stopped_at

import generate_text
from hyperparameters import Hyperparameters

CASES = int(os.environ.get("TINYGPT_FUZZ_CASES", 300))
RUN = [*helpers.SIZES, "--epochs", "2", "--dropout", "0.1"]


def fuzz(percent):
    """So many of all cases, the same ones every time."""
    return settings(max_examples=max(CASES * percent // 100, 1), derandomize=True, deadline=None)


def naming(stem):
    return ["--input", "text.txt", "--checkpoint", f"{stem}.pth", "--training_log", f"{stem}.csv"]


@pytest.fixture(scope="module")
def new_case(tmp_path_factory):
    """Call it for the files that lie around in every case: a text, two checkpoints, and others'.

    There are 2 GB of memory more than now: a file that claims to be huge must not take them.
    """
    with helpers.working_in(tmp_path_factory.mktemp("fuzz")) as folder:
        (folder / "text.txt").write_text(helpers.make_text(600), encoding="utf-8")
        for name, step, status in (("finished", 10**9, 0), ("unfinished", STEPS - 3, 130)):
            assert stopped_at(step, *naming(name), *RUN).status == status
        (folder / "empty.txt").write_bytes(b"")
        (folder / "notes.txt").write_bytes(b"\xff\x00 private notes")
        (folder / "folder").mkdir()
        (folder / "folder" / "more.csv").write_bytes(b"a,b\n1,2\n")
        os.symlink("notes.txt", "link.pth")
        files = contents()
        with helpers.limited("AS", 2_000_000_000):
            yield lambda: helpers.restore(files)


def check_outcome(done):
    """It succeeded, or said in ASCII what the user can mend; nothing looks like a traceback."""
    assert done.status in (0, 2) and "Traceback" not in done.err, done
    if done.status == 2:
        assert done.err.isascii() and done.err.splitlines()[-1].startswith("error: "), done
    return done


def real_files():
    return {os.path.realpath(name): data for name, data in contents().items()}


def check_train(argv, *writes):
    """Train; every file that existed is as it was, or kept as the previous one; no stray is new.

    A resumed run replaces its own checkpoint and log. `writes` are the names of both.
    """
    before, real = real_files(), [os.path.realpath(path) for path in writes]
    older = [os.path.splitext(path) for path in (*real, *writes)]
    older = [f"{stem}.previous{n}{end}" for stem, end in older for n in ("", 1, 2)]
    older = [os.path.realpath(path) for path in older]  # beside a link, or what it links to
    done = check_outcome(helpers.train(*argv))
    after = real_files()
    for name, data in before.items():
        if after.get(name) != data:
            own = "--resume" in argv and (name == real[0] or data[:6] == b"epoch,")
            kept = data in [b"", *map(after.get, older)] or after[name].startswith(data)
            assert name in real and (own or kept), (name, done)
    assert set(after) - set(before) <= {*real, *older}, done
    return done


def check_generate(argv, stdin=b""):
    """Write; no file has changed."""
    before = contents()
    done = check_outcome(helpers.call(generate_text.main, argv, stdin))
    assert contents() == before
    return done


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
WRITING = "max_new_tokens temperature top_k top_p num_samples seed".split()
WRITING = dict.fromkeys(WRITING, [0, 0.5, 1, 3, 40, -1, 1e-300, 10**9 + 1, 2**63])


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
def test_any_arguments_of_training(new_case, chosen, how, stem, odd):
    names = {"--checkpoint": f"{stem}.pth", "--training_log": f"{stem}.csv", **dict(chosen)}
    argv = [*naming(stem), *how, *map("=".join, chosen), *odd]
    new_case()
    check_train(argv, names["--checkpoint"], names["--training_log"])


PROMPT = st.just("-") | st.text("abc ", max_size=60) | st.text(LETTERS, max_size=9)


@fuzz(15)
@given(flags(WRITING, checkpoint=PATH, prompt=PROMPT), st.binary(max_size=20), NOISE)
def test_any_arguments_and_prompts_of_writing(new_case, chosen, stdin, odd):
    new_case()
    usual = ["--checkpoint", "finished.pth", "--max_new_tokens", "20"]
    check_generate([*usual, *map("=".join, chosen), *odd], stdin)


ODD = ["\ufeff", "\r\n", "\r", "\n", "\0", "\U0001f600", "e\u0301", "\u0633\u0644", "\U0010ffff"]
PIECES = st.text(max_size=20) | st.sampled_from(ODD)
PIECES = PIECES.map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=4)


@fuzz(15)
@given(st.lists(PIECES), st.integers(1, 60), st.sampled_from("125"), st.sampled_from("15"))
def test_any_text(new_case, pieces, times, block_size, share):
    new_case()
    Path("text.txt").write_bytes((b"".join(pieces) * times)[:3_000])
    sizes = f"--block_size {block_size} --validation_fraction 0.{share} --batch_size 64".split()
    if check_train([*naming("new"), *RUN, *sizes], "new.pth", "new.csv").status == 0:
        argv = ["--checkpoint", "new.pth", "--max_new_tokens", "9", "--num_samples", "2"]
        assert check_generate(argv).status == 0


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
    """Every (container, key) in nested dicts and lists."""
    keys = list(value) if isinstance(value, dict) else []
    keys = range(len(value)) if isinstance(value, list) else keys
    return [(value, key) for key in keys] + [one for key in keys for one in places(value[key])]


def damaged(data, kind, changes):
    """The bytes of a checkpoint, with another pickle or other values in a zip that is whole."""
    file = io.BytesIO()
    if kind == "pickle":
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                part = bytearray(old.read(name))
                for where, value in changes if name.endswith(".pkl") else ():
                    part[where % len(part)] = value
                new.writestr(name, bytes(part))
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
    st.sampled_from(["pickle", "values", "values"]),
    st.lists(st.tuples(st.integers(0, 2**30), st.integers(0, 255)), min_size=1, max_size=3),
    st.sampled_from(["finished.pth", "unfinished.pth"]),
)
def test_any_checkpoint(new_case, kind, changes, name):
    new_case()
    Path("unfinished.pth").write_bytes(damaged(Path(name).read_bytes(), kind, changes))
    argv = ["--checkpoint", "unfinished.pth", "--max_new_tokens", "5", "--seed", "1"]
    assert "memory" not in check_generate(argv).err
    argv = [*naming("unfinished"), "--resume"]
    assert "memory" not in check_train(argv, "unfinished.pth", "unfinished.csv").err
