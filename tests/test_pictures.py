"""Pictures show the numbers of the run and of the model; one that fails costs neither."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, at_step, call, contents, tiny_model, train, working_in

import generate_text
import train_model

Figure = pytest.importorskip("matplotlib.figure").Figure


@pytest.fixture(autouse=True)
def here(tmp_path):
    with working_in(tmp_path / "here") as folder:
        yield folder


def test_the_lines_are_the_log_and_what_guessing_costs(monkeypatch):
    figures, draw = [], train_model.draw_losses
    monkeypatch.setattr(train_model, "draw_losses", lambda *a: figures.append(a[0]) or draw(*a))
    assert train(*TINY, "--plot", "loss.png").status == 0
    assert Path("loss.png").read_bytes()[1:4] == b"PNG"
    training, validation, *flat = [x.get_xydata().tolist() for x in figures[-1].axes[0].lines]
    rows = np.loadtxt("log.csv", delimiter=",", skiprows=1)
    assert training == [[4.5, rows[0, 2]], [13.5, rows[1, 2]]]  # the middles of 9 steps each
    assert validation == rows[:, [1, 3]].tolist()
    text = Path("text.txt").read_text(encoding="utf-8")[:1062]  # what is learned from
    shares = [text.count(c) / len(text) for c in set(text)]
    guessing = [math.log(len(shares)), -sum(share * math.log(share) for share in shares)]
    assert [line[0][1] for line in flat] == pytest.approx(guessing)


@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_a_panel_a_head_shows_the_weights_in_the_model_by_legible_names(length):
    model, prompt, figure, mixed = tiny_model(), "a \n\u4e2d$e\u0301t bc"[:length], Figure(), []
    for block in model.blocks:  # what PyTorch's own attention makes with the weights, and of what
        block.attention.output.register_forward_pre_hook(lambda _, x: mixed.append(x[0][0]))
        block.attention.register_forward_hook(lambda b, x, _: mixed.append(b.project(*x[:2])[2]))
    generate_text.draw_attention(figure, model, prompt, torch.arange(length))
    shown = torch.stack([torch.tensor(p.images[0].get_array()) for p in figure.axes[:-1]])
    values = torch.cat(mixed[1::2]).flatten(0, 1)  # (layers * heads, T, D)
    expected = torch.cat([x.unflatten(1, (2, -1)).transpose(0, 1) for x in mixed[::2]])
    assert torch.allclose(shown.sum(dim=-1), torch.ones(4, min(length, 8)))
    assert torch.allclose(shown @ values, expected, atol=1e-5)
    names = ["a", "\u2423", r"\n", r"\u4e2d", "$", "e", "\u0301", "t", "\u2423", "b", "c"]
    for labels in figure.axes[2].get_xticklabels(), figure.axes[2].get_yticklabels():
        assert [label.get_text() for label in labels] == names[:length][-8:]


def test_what_fails_fails_before_training_or_is_only_said(here, monkeypatch):
    before = contents(here)
    for odd in ("loss.xyz", "loss", "", "text.txt", "nowhere/loss.png", "log.csv"):
        assert train(*TINY, "--plot", odd).sentence()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert "pip install matplotlib" in train(*TINY, "--plot", "loss.png").sentence()
        done = call(generate_text.main, ["--checkpoint", "no.pth", "--attention", "a.png"])
        assert "pip install matplotlib" in done.sentence()
    assert contents(here) == before
    (here / "out").mkdir()
    with at_step(3, lambda: (here / "out").rmdir()):
        done = train(*TINY, "--plot", "out/loss.png")
    assert (done.status, done.out.count("warning: no picture")) == (0, 2)
    assert set(contents(here)) == {*before, "model.pth", "log.csv"}
