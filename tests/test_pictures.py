"""Pictures show the numbers of the run and of the model; one that fails costs neither."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, at_step, call, contents, learn, refused, tiny_model

import generate_text
import train_model
from model_architecture import attention_of

Figure = pytest.importorskip("matplotlib.figure").Figure
pytestmark = pytest.mark.usefixtures("here")


def test_the_lines_are_the_log_and_what_guessing_costs(monkeypatch):
    figures, draw = [], train_model.draw_losses
    monkeypatch.setattr(train_model, "draw_losses", lambda *a: figures.append(a[0]) or draw(*a))
    learn(*TINY, "--plot", "loss.png")
    assert Path("loss.png").read_bytes()[1:4] == b"PNG"
    training, validation, *flat = [x.get_xydata().tolist() for x in figures[-1].axes[0].lines]
    rows = np.loadtxt("log.csv", delimiter=",", skiprows=1)
    assert training == [[4.5, rows[0, 2]], [13.5, rows[1, 2]]]  # the middles of 9 steps each
    assert validation == rows[:, [1, 3]].tolist()
    text = Path("text.txt").read_text(encoding="utf-8")[:1062]  # what is learned from
    shares = [text.count(c) / len(text) for c in set(text)]
    guessing = [math.log(len(shares)), -sum(share * math.log(share) for share in shares)]
    assert [line[0][1] for line in flat] == pytest.approx(guessing)


def test_a_panel_a_head_shows_the_attention_of_the_model_by_legible_names():
    names = ["a", "\u2423", r"\n", r"\u4e2d", "$", "e", "\u0301", "t", "\u2423", "b", "c"]
    for length in (1, 5, 8, 11):
        model, prompt, figure = tiny_model(), "a \n\u4e2d$e\u0301t bc"[:length], Figure()
        generate_text.draw_attention(figure, model, prompt, torch.arange(length))
        shown = torch.stack([torch.tensor(p.images[0].get_array()) for p in figure.axes[:-1]])
        weights = attention_of(model, torch.arange(length)[None, -8:])  # the end that it reads
        assert torch.equal(shown, torch.cat(weights).flatten(0, 1))
        for labels in figure.axes[2].get_xticklabels(), figure.axes[2].get_yticklabels():
            assert [label.get_text() for label in labels] == names[:length][-8:]


def test_what_fails_fails_before_training_or_is_only_said(here, monkeypatch):
    before = contents()
    for odd in ("loss.xyz", "loss", "", "text.txt", "nowhere/loss.png", "log.csv"):
        refused(*TINY, "--plot", odd)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert "pip install matplotlib" in refused(*TINY, "--plot", "loss.png")
        done = call(generate_text.main, ["--checkpoint", "no.pth", "--attention", "a.png"])
        assert "pip install matplotlib" in done.sentence()
    (here / "out").mkdir()
    with at_step(3, (here / "out").rmdir):
        assert learn(*TINY, "--plot", "out/loss.png").out.count("warning: no picture") == 2
    assert set(contents()) == {*before, "model.pth", "log.csv"}
