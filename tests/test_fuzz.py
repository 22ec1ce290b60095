"""Whatever the arguments, the text, the prompt and the checkpoint are: 0 or 2, and nothing is lost.

`TINYGPT_FUZZ_CASES=10000 pytest tests/test_fuzz.py` tries more than the usual 300.
"""
# ruff: noqa: D103

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
from helpers import SIZES, call, contents, make_text, signal_after
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import generate_text
import train_model

CASES = int(os.environ.get("TINYGPT_FUZZ_CASES", 300))
HEADER = b"epoch,step,train_loss,val_loss,seconds\n"
RUN = [*SIZES, "--epochs", "2", "--dropout", "0.1"]


def fuzz(percent):
    """So many of all cases, the same ones every time."""
    return settings(
        max_examples=max(CASES * percent // 100, 1),
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


class Files(dict):
    """Names and bytes of files, which a failing test need not print."""

    def __repr__(self):
        """Only the names."""
        return f"Files of {list(self)}"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The files that lie around in every case: a text, two checkpoints, and what is not ours."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("template")
    (folder / "text.txt").write_text(make_text(600), encoding="utf-8")
    with working_in(folder):
        for name, steps in (("finished", 10**9), ("unfinished", 6)):
            names = ["--input", "text.txt", "--checkpoint", f"{name}.pth", "--log", f"{name}.csv"]
            with signal_after(steps):
                done = call(train_model.main, [*names, *RUN])
            assert done.status == (0 if name == "finished" else 130), done
    (folder / "empty.txt").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"\xff\x00 private notes")
    (folder / "folder").mkdir()
    (folder / "folder" / "more.csv").write_bytes(b"a,b\n1,2\n")
    return Files(contents(folder))


@pytest.fixture(scope="module", autouse=True)
def enough_memory():
    """2 GB more than now, so that a file that claims to be huge cannot take the machine with it."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2_000_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def working_in(folder):
    """Inside, `folder` is the current directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def a_case(files):
    """Inside, the current directory holds these files; it is gone afterwards."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "case")
        folder.mkdir()
        for name, data in files.items():
            if data is None:
                (folder / name).mkdir()
            else:
                (folder / name).write_bytes(data)
        with contextlib.suppress(OSError, NotImplementedError):  # Windows may refuse
            os.symlink("notes.txt", folder / "link.pth")
        with working_in(folder):
            yield Path(outer)


def check_outcome(done):
    """It succeeded, or said in ASCII what the user can mend; nothing looks like a traceback."""
    assert done.status in (0, 2), done
    assert "Traceback" not in done.err, done
    assert not re.search(r'File ".*", line \d+', done.err), done
    if done.status == 2:
        assert done.err.isascii(), done
        assert done.err.splitlines()[-1].startswith("error: "), done


def previous(path):
    stem, extension = os.path.splitext(path)
    return f"{stem}.previous{extension}"


def check_train(outer, argv, **writes):
    """Train; every file that existed is as it was, or kept as the previous one; no stray is new.

    A resumed run replaces its own checkpoint and log, and no other file. `writes` are the values of
    --checkpoint and --log.
    """
    before = contents(outer)
    real = {kind: os.path.realpath(path) if path else "" for kind, path in writes.items()}
    older = [os.path.realpath(previous(p)) for p in [*real.values(), *writes.values()]]
    where = {name: os.path.realpath(outer / name) for name in before}
    resumed = "--resume" in argv
    done = call(train_model.main, argv)
    check_outcome(done)

    after = contents(outer)
    by_path = {os.path.realpath(outer / name): data for name, data in after.items()}
    for name, data in before.items():
        kept = by_path.get(where[name]) == data
        if not kept and where[name] in real.values():  # beside a link, or beside what it links to
            kept = data in [by_path.get(path) for path in older]
        if not kept and resumed:
            kept = where[name] == real["checkpoint"]
            kept = kept or where[name] == real["log"] and data.startswith(HEADER)
        assert kept, (name, done)
    new = {os.path.realpath(outer / name) for name in set(after) - set(before)}
    assert new <= {*real.values(), *older}, (new, done)
    return done


def check_generate(outer, argv, stdin=b""):
    """Write; no file has changed."""
    before = contents(outer)
    done = call(generate_text.main, argv, stdin)
    check_outcome(done)
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


def number(*usual):
    """Values of a dial: mostly usable ones, none of which makes a run long."""
    return st.one_of(st.sampled_from(usual), st.sampled_from(usual), ODD_NUMBERS)


PATHS = [
    *["text.txt", "empty.txt", "notes.txt", "link.pth", "folder", "folder/more.csv", "text.txt/x"],
    *["finished.pth", "finished.csv", "unfinished.pth", "unfinished.csv", "new.pth", "new.csv"],
    *["nowhere/new.pth", "./new.pth", "folder/../text.txt", "new.previous.pth", "", "x" * 300],
]
TRAINING = {
    "--input": st.sampled_from(PATHS),
    "--checkpoint": st.sampled_from(PATHS),
    "--log": st.sampled_from(PATHS),
    "--device": st.sampled_from(["auto", "cpu", "mps", "tpu"]),
    "--preset": st.sampled_from(["auto", "laptop", "gpu", "huge"]),
    "--compile": st.sampled_from(["auto", "off", "maybe"]),
    "--block_size": number("1", "2", "16", "64", "65536", "65537", "0"),
    "--batch_size": number("4", "8", "65536", "65537", "0"),
    "--validation_fraction": number("0.1", "0.5", "0.001", "0.51"),
    "--n_layer": number("1", "2", "0", "1001", "1000000000000"),
    "--n_head": number("1", "2", "4", "3", "1024"),
    "--n_embd": number("4", "8", "16", "17", "65536", "1000000000000"),
    "--dropout": number("0", "0.5", "0.99", "1"),
    "--epochs": number("1", "3", "0", "1000001"),
    "--learning_rate": number("0", "0.01", "10", "10.1"),
    "--warmup_steps": number("0", "3", "1000000", "1000001"),
    "--weight_decay": number("0", "100", "1000"),
    "--beta2": number("0", "0.5", "0.99999", "1"),
    "--gradient_clip": number("0.000001", "1", "1000000", "0"),
    "--seed": number("0", "7", str(2**63 - 1), str(2**63)),
    "--save_minutes": number("0.01", "1000000", "0"),
}
WRITING = {
    "--checkpoint": st.sampled_from(["finished.pth", "unfinished.pth", *PATHS]),
    "--prompt": st.one_of(st.just("-"), st.text("abc ", max_size=60), st.text(LETTERS, max_size=9)),
    "--max_new_tokens": number("0", "1", "40", "-1", "1000000001"),
    "--temperature": number("0", "0.5", "1e-300", "1000", "1001"),
    "--top_k": number("0", "1", "3", "1000000000"),
    "--top_p": number("1", "0.5", "1e-9", "0", "1.1"),
    "--num_samples": number("1", "3", "0", "1001"),
    "--seed": number("0", str(2**63 - 1), str(2**63)),
    "--device": st.sampled_from(["auto", "cpu", "mps", "tpu"]),
}


def flags(values, most):
    """Up to `most` flags with values of their own."""
    one = st.sampled_from(sorted(values)).flatmap(lambda n: st.tuples(st.just(n), values[n]))
    return st.lists(one, max_size=most)


def noise(*known):
    """Sometimes something that no command line should hold."""
    usual = st.just([])
    odd = st.lists(st.one_of(WORDS, st.sampled_from(["--help", "--", "-", *known])), max_size=2)
    return st.one_of(usual, usual, usual, odd)


def spelled(chosen, joined):
    """--flag value or --flag=value."""
    return [word for pair in chosen for word in (["=".join(pair)] if joined else pair)]


def last(chosen, name, default):
    return ([value for flag, value in chosen if flag == name] or [default])[-1]


@fuzz(30)
@given(
    flags(TRAINING, 4),
    st.booleans(),
    st.sampled_from([[], [], ["--resume"]]),
    st.sampled_from(["new", "new", "unfinished", "finished"]),
    noise("--n_embd", "--log", "--epoch", "--seed=x", "--resume=1"),
)
def test_any_arguments_of_training(template, chosen, joined, resume, stem, odd):
    checkpoint = last(chosen, "--checkpoint", f"{stem}.pth")
    log = last(chosen, "--log", f"{stem}.csv")
    names = ["--input", "text.txt", "--checkpoint", f"{stem}.pth", "--log", f"{stem}.csv"]
    usual = [*names, *([] if resume else RUN)]
    with a_case(template) as outer:
        argv = [*usual, *resume, *spelled(chosen, joined), *odd]
        check_train(outer, argv, checkpoint=checkpoint, log=log)


@fuzz(15)
@given(flags(WRITING, 4), st.booleans(), st.binary(max_size=20), noise("--prompt", "--top_k="))
def test_any_arguments_and_prompts_of_writing(template, chosen, joined, stdin, odd):
    with a_case(template) as outer:
        usual = ["--checkpoint", "finished.pth", "--max_new_tokens", "20"]
        check_generate(outer, [*usual, *spelled(chosen, joined), *odd], stdin)


# ---- Texts -------------------------------------------------------------------------------------

PIECES = st.one_of(
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from([b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n", b"\0", b"\xed\xa0\x80", b"\xf0\x9f"]),
    st.sampled_from(["\U0001f600", "e\u0301", "\u0633\u0644", "\U0010ffff"]).map(str.encode),
    st.binary(max_size=4),
)
TEXTS = st.one_of(
    st.builds(lambda pieces, n: b"".join(pieces) * n, st.lists(PIECES), st.integers(1, 60)),
    st.builds(lambda text, n: (text * n).encode(), st.text(min_size=1), st.integers(1, 60)),
    st.text(max_size=80).map(lambda text: text.encode("utf-16", "replace")),
)


@fuzz(15)
@given(TEXTS, st.sampled_from(["1", "2", "5"]), st.sampled_from(["0.1", "0.5"]))
def test_any_text(template, text, block_size, share):
    with a_case({**template, "text.txt": text[:3_000]}) as outer:
        argv = [*RUN, "--block_size", block_size, "--validation_fraction", share, "--epochs", "1"]
        names = {"checkpoint": "new.pth", "log": "new.csv"}
        paths = ["--input", "text.txt", "--checkpoint", "new.pth", "--log", "new.csv"]
        done = check_train(outer, [*paths, *argv, "--batch_size", "64"], **names)
        if done.status == 0:
            argv = ["--checkpoint", "new.pth", "--max_new_tokens", "9", "--num_samples", "2"]
            assert check_generate(outer, argv).status == 0


# ---- Checkpoints -------------------------------------------------------------------------------

BYTES = st.tuples(st.integers(0, 2**30), st.integers(0, 255))
VALUES = [
    *[None, True, 0, 1, -1, 3, 2**31, 10**12, 10**400, 0.0, 1.5, -1.0, math.nan, math.inf],
    *["", "x", "ba", "\ud800", "aa" * 300, b"", [], [1], [[]], {}, {"x": 1}, (), ((),), set()],
    *[[[1, 6, 2.0, 2.0, 1.0]], [[1, 6, 2.0, 2.0]], ([1, 6, 2.0, 2.0, 1.0],), [1, 2, 3, 4, 5]],
    torch.zeros(()),
    torch.zeros(2, 3),
    torch.zeros(0),
    torch.zeros(1).expand(10**9),
    torch.zeros(1, 1).expand(10**5, 10**5),
    torch.zeros(9, 16).t(),
    torch.zeros(16, 16, dtype=torch.float64),
    torch.full((9, 16), math.nan),
    torch.zeros(9, 16, dtype=torch.int8),
    torch.zeros(9, 16).to_sparse(),
    torch.zeros(9, 16, device="meta"),
    torch.nn.Parameter(torch.zeros(9, 16)),
    torch.zeros(5056, dtype=torch.uint8),
]


def flip(data, changes):
    data = bytearray(data)
    for where, value in changes:
        data[where % len(data)] = value
    return bytes(data)


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(parts, compression=zipfile.ZIP_STORED):
    """A zip of these members, each with its true checksum."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in parts:
            archive.writestr(name, data)
    return file.getvalue()


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


def change(contents_, where, how, value):
    """Replace, remove, rename or double one entry of the nested contents."""
    found = places(contents_)
    container, key = found[where % len(found)]
    if how == "replace":
        container[key] = copy.deepcopy(VALUES[value % len(VALUES)])
    elif how == "swap":
        other, other_key = found[value % len(found)]
        container[key], other[other_key] = other[other_key], container[key]
    elif how == "remove":
        del container[key]
    elif isinstance(container, dict):
        container[f"{key}x"] = container[key]
    else:
        container.append(container[key])


@st.composite
def damaged(draw):
    """A function that damages the bytes of one checkpoint, given those of another."""
    kinds = ["flip", "cut", "splice", "pickle", "pickle", "members", *["values"] * 6]
    kind = draw(st.sampled_from(kinds))
    changes = draw(st.lists(BYTES, min_size=1, max_size=4))
    a, b = draw(st.integers(0, 2**30)), draw(st.integers(0, 2**30))
    hows = st.sampled_from(["replace"] * 5 + ["swap", "remove", "double"])
    hows = draw(st.lists(hows, max_size=2))

    def damage(data, other):
        if kind == "flip":
            return flip(data, changes)
        if kind == "cut":
            return data[: a % len(data)] + other[: b % 3]
        if kind == "splice":
            return data[: a % len(data)] + other[b % len(other) :]
        if kind == "values":
            inside = torch.load(io.BytesIO(data), weights_only=True)
            for how, (where, value) in zip(["replace", *hows], changes):
                change(inside, where, how, value)
            file = io.BytesIO()
            torch.save(inside, file)
            return file.getvalue()
        parts = members(data)
        if kind == "pickle":
            at = next(i for i, part in enumerate(parts) if part[0].endswith("data.pkl"))
            pickled = flip(parts[at][1], changes)
            end = b % len(pickled) if a % 3 == 0 else len(pickled)
            parts[at] = (parts[at][0], pickled[:end])
            return zipped(parts)
        a_at, b_at = a % len(parts), b % len(parts)
        if changes[0][1] % 4 == 0:
            return zipped(parts, zipfile.ZIP_DEFLATED)
        if changes[0][1] % 4 == 1:
            parts.pop(a_at)
        elif changes[0][1] % 4 == 2:
            parts[a_at] = (parts[a_at][0], members(other)[b % len(members(other))][1])
        else:
            (name, first), (other_name, second) = parts[a_at], parts[b_at]
            parts[a_at], parts[b_at] = (name, second), (other_name, first)
        return zipped(parts)

    return kind, changes, a, b, hows, damage


@fuzz(40)
@given(damaged(), st.booleans())
def test_any_checkpoint(template, how, finished):
    names = ("finished.pth", "unfinished.pth")
    data, other = (template[name] for name in (names if finished else names[::-1]))
    with a_case({**template, "model.pth": how[-1](data, other)}) as outer:
        argv = ["--checkpoint", "model.pth", "--max_new_tokens", "5", "--seed", "1"]
        assert "memory" not in check_generate(outer, argv).err
        argv = ["--input", "text.txt", "--checkpoint", "model.pth", "--log", "unfinished.csv"]
        names = {"checkpoint": "model.pth", "log": "unfinished.csv"}
        assert "memory" not in check_train(outer, [*argv, "--resume"], **names).err
