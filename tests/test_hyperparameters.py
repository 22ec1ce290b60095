"""Chapter 1: no setting has a value that cannot work; and the house has the shape it claims."""

import doctest
import importlib
import os
import re
import runpy
from dataclasses import FrozenInstanceError, asdict, fields, replace
from unittest.mock import Mock

import helpers
import pytest
import torch
from helpers import ROOT, call, refusal

from generate_text import main as write
from hyperparameters import GPU, LAPTOP, Hyperparameters, UserError, end_with_a_sentence, main
from train_model import choose_settings, parse
from train_model import main as train

SETTINGS = fields(Hyperparameters)
MODULES = "hyperparameters data_handling model_architecture generate_text train_model".split()
TEXTS = [(ROOT / f"{module}.py").read_text(encoding="utf-8") for module in MODULES]


def test_nonsense_is_refused_by_every_setting_with_its_name_and_the_value():
    infinity = float("inf")
    for one in SETTINGS:
        for value in (-1, -0.5, float("nan"), infinity, -infinity, "3", None, True, [4], 2j, 2**63):
            sentence = refusal(replace, LAPTOP, **{one.name: value})
            assert f"{one.name} must be a" in sentence and sentence.endswith(f"not {value!a}")
        assert one.type is float or "a whole number" in refusal(replace, LAPTOP, **{one.name: 2.5})


def test_zero_the_whole_and_uneven_shares_are_refused_where_they_cannot_work():
    sizes = ("block_size", "batch_size", "n_layer", "n_head", "epochs", "learning_rate")
    for value, names in ((0, sizes), (1, ("validation_fraction", "dropout", "beta2"))):
        for name in names:
            assert f"{name} must be" in refusal(replace, LAPTOP, **{name: value})
    for name in ("warmup_steps", "dropout", "weight_decay", "beta2", "seed"):
        assert getattr(replace(LAPTOP, **{name: 0}), name) == 0
    for n_embd, n_head in ((128, 5), (4, 4), (6, 2)):  # every head needs an equal and even share
        assert f"2 * n_head, not {n_embd}" in refusal(replace, LAPTOP, n_embd=n_embd, n_head=n_head)
    with pytest.raises(FrozenInstanceError):  # nor changes code one behind the reader's back
        LAPTOP.n_layer = 5


def test_every_setting_can_be_changed_by_a_flag_that_help_explains(monkeypatch):
    def chosen(**flags):
        words = [word for name, value in flags.items() for word in (f"--{name}", f"{value}")]
        return choose_settings(parse(words), torch.device("cpu"), None)

    assert chosen() == LAPTOP
    assert chosen(**asdict(GPU)) == GPU
    assert chosen(n_layer=7) == replace(LAPTOP, n_layer=7)
    monkeypatch.setenv("COLUMNS", "1000")  # no line of the help is folded
    monkeypatch.setenv("NO_COLOR", "1")
    shown = " ".join(call(train, ["--help"]).out.split())
    for one in SETTINGS:
        values = f"({getattr(LAPTOP, one.name)} / {getattr(GPU, one.name)})"
        assert f"--{one.name} X {one.metadata['help']} {values}" in shown


def test_a_slip_is_answered_with_one_sentence_that_names_the_flag_meant():
    assert "did you mean --n_layer?" in call(train, ["--n_layers", "6"]).sentence()
    assert "did you mean --learning_rate?" in call(train, ["--learning-rate=1"]).sentence()
    assert "did you mean --temperature?" in call(write, ["--temprature", "1"]).sentence()
    for argv in (["\u20ac\n"], [""], ["--n_layer", "six"], ["--n_layer"], ["--n_lay", "6"]):
        assert "-" in call(train, argv).sentence()


def test_what_a_user_can_mend_is_one_ascii_sentence_and_a_mistake_of_ours_is_not_hidden():
    for error, status, said in (
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
        (UserError("\u20ac is\nno 'C:\\x'"), 2, "error: \\u20ac is\\nno 'C:\\x'\n"),
        (OSError(28, "no space"), 2, "error: [Errno 28] no space\n"),
        (MemoryError(), 2, "error: out of memory; lower the settings\n"),
        (RuntimeError("CUDA out of memory"), 2, "error: out of memory; lower the settings\n"),
    ):
        assert call(Mock(side_effect=error)) == (status, "", said)
    for error in (RuntimeError("shapes differ"), ValueError("7"), KeyError("x")):
        with pytest.raises(type(error)):
            call(Mock(side_effect=error))


def test_a_module_run_directly_shows_a_screenful_and_imported_nothing(tmp_path, monkeypatch):
    def execute(module, name):
        return call(lambda _: runpy.run_path(f"{ROOT}/{module}.py", run_name=name) and None)

    monkeypatch.chdir(tmp_path)
    assert {execute(module, "imported") for module in MODULES} == {(0, "", "")}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "input.txt").write_text("zyxwvutsrqponmlkjihgfedcba\n" * 1_000)
    monkeypatch.setattr("sys.argv", [""])
    for module, idea in zip(MODULES, ("0.006", "'\\nabcdefghijklmnopqrstuvwxyz'", "(B, H, T, S)")):
        status, out, err = execute(module, "__main__")
        assert (status, err) == (0, "") and out.isascii() and idea in out
        assert 10 <= out.count("\n") <= 40 and max(map(len, out.splitlines())) <= 100
        assert module != "data_handling" or out.count(" -> ") == 1 + 8  # a heading, eight lessons


def test_a_module_runs_without_any_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert end_with_a_sentence(main) == 0 and end_with_a_sentence(train, ["--nonsense"]) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_reader_who_leaves_early_is_no_error_and_a_full_disk_is_one_sentence(tmp_path):
    left, nobody_reads = os.pipe()
    os.close(left)  # as `| head -1` does, only earlier
    for out, status, said in ((nobody_reads, 0, ""), ("/dev/full", 2, "No space left on device\n")):
        err = tmp_path / f"err{status}"
        process = helpers.fork_script("hyperparameters.py", out=out, err=str(err))
        assert helpers.ended(process) == status
        assert err.read_text() == (f"error: [Errno 28] {said}" if said else "")


def test_the_examples_in_the_docstrings_hold():
    results = [doctest.testmod(importlib.import_module(module)) for module in MODULES]
    assert results[1].attempted > 0 and not any(result.failed for result in results)


def test_each_module_is_short_and_most_lines_stand_above_the_folds():
    for text, most in zip(TEXTS, (120, 189, 412, 250, 589)):
        assert text.count("\n") <= most and text.count("\n# ---- The fold:") == 1
    above = sum(text.split("\n# ---- The fold:")[0].count("\n") for text in TEXTS)
    assert above >= 0.55 * sum(text.count("\n") for text in TEXTS)
    loop = TEXTS[4].split("\ndef train(")[1].split("\n\n\n")[0]
    assert loop.count("\n") < 45  # it can be seen at once


def test_imports_go_in_one_direction():
    for text, may in zip(TEXTS, ([], MODULES[:1], MODULES[:1], MODULES[:3], MODULES[:4])):
        found = re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)
        assert "sys" in found and set(found) & set(MODULES) <= set(may)
