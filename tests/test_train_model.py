"""Chapter 4: a run learns what it should, says what it did, and refuses what cannot work."""
# ruff: noqa: D103

import contextlib
import functools
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    FILES,
    POSIX,
    ROOT,
    SIZES,
    STEPS,
    TINY,
    call,
    contents,
    environment,
    forks,
    log_losses,
    make_text,
    outcome,
    python,
    signal_after,
    write_text,
)

import generate_text
import train_model
from data_handling import gather, load_text, shuffled_windows, split
from hyperparameters import GPU, LAPTOP
from model_architecture import TinyGPT, load_checkpoint
from train_model import Precision, evaluate, learning_rate_at, make_optimizer, make_scaler

MODEL = {"block_size": 16, "n_embd": 16, "n_head": 2, "n_layer": 1}
DIALS = replace(LAPTOP, **MODEL, batch_size=8, epochs=2)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory but for text.txt, and one thread: sums have one order then."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def train(*argv):
    """A run that must succeed."""
    done = call(train_model.main, [*TINY, *argv])
    assert done.status == 0, done
    return done


def interrupt(step, *argv):
    """A run that is stopped after a step: it leaves an unfinished checkpoint."""
    with signal_after(step):
        done = call(train_model.main, [*TINY, *argv])
    assert done.status == 130, done


def random_model(**sizes):
    """A model that knows nothing and guesses all the same: no parameter is zero."""
    torch.manual_seed(0)
    model = TinyGPT(**{"vocab_size": 9, **MODEL, **sizes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def split_text():
    _, ids = load_text("text.txt")
    return split(ids, DIALS.block_size, DIALS.validation_fraction)


# ---- Measuring, the step size, the optimizer -----------------------------------------------------


def rates(total, **dials):
    return [learning_rate_at(step, total, replace(LAPTOP, **dials)) for step in range(total)]


@pytest.mark.parametrize("total", [20, 150, 2_000])
def test_rate_climbs_to_the_dial_and_falls_to_almost_nothing(total):
    found = rates(total, learning_rate=0.5, warmup_steps=100)
    peak = found.index(max(found))
    assert max(found) == pytest.approx(0.5)
    assert 0 < found[-1] == min(found)
    assert found[-1] < 0.5 / 10
    assert found[0] <= 0.5 / 3
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_warmup_takes_its_steps_but_a_tenth_of_the_run_at_most():
    assert rates(5_000, warmup_steps=100).index(LAPTOP.learning_rate) == 100
    for total in (1, 2, 9, 10, 57, 300):
        found = rates(total, warmup_steps=100)
        assert found.index(max(found)) <= total / 10
    assert rates(50, warmup_steps=0)[0] == LAPTOP.learning_rate


@pytest.mark.parametrize("length", [17, 18, 33, 16 * 70 + 5])
def test_evaluation_is_the_plain_mean_over_all_windows(length):
    model = random_model()
    ids = torch.randint(0, 9, (length,), generator=torch.Generator().manual_seed(1))
    losses = []
    with torch.no_grad():
        for start in range(0, length - 16, 16):
            logits = model.eval()(ids[None, start : start + 16].long())
            losses.append(F.cross_entropy(logits[0], ids[start + 1 : start + 17]).item())
    assert evaluate(model, ids) == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_repeats_without_dropout_and_restores_the_mode(training):
    ids = torch.randint(0, 9, (500,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    model = random_model(dropout=0.9).train(training)
    first = evaluate(model, ids)
    assert evaluate(model, ids) == first == evaluate(random_model(dropout=0.0), ids)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_matrices_decay():
    model = random_model()
    optimizer = make_optimizer(model, replace(LAPTOP, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrices = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    for name, parameter in model.named_parameters():
        kept = 1 - 0.1 * 0.5 if any(parameter is one for one in matrices) else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[name], msg=name)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())  # each of them once


# ---- A run --------------------------------------------------------------------------------------


@contextlib.contextmanager
def batches_met():
    """The inputs of every batch that a TinyGPT trains on inside."""
    met = []

    def note(module, inputs):
        if isinstance(module, TinyGPT) and module.training:
            met.append(inputs[0].clone())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield met
    finally:
        handle.remove()


def test_an_epoch_meets_the_shuffled_windows_in_order():
    with batches_met() as met:
        train("--seed", "5")
    train_ids, _ = split_text()
    expected = []
    for epoch in range(2):
        starts = shuffled_windows(len(train_ids), 16, seed=5, epoch=epoch)
        expected += [gather(train_ids, some, 16)[0] for some in starts.split(8)]
    assert len(met) == len(expected) == 2 * STEPS
    for found, wanted in zip(met, expected):
        assert torch.equal(found.long(), wanted)


def test_training_is_the_plain_loop_that_the_chapter_describes():
    train("--gradient_clip", "0.05", "--weight_decay", "0.3")
    train_ids, held_out_ids = split_text()
    dials = replace(DIALS, gradient_clip=0.05, weight_decay=0.3)
    torch.manual_seed(dials.seed)
    model, step = TinyGPT(vocab_size=9, **MODEL), 0
    plain = {"weight_decay": 0.3, "betas": (0.9, dials.beta2), "fused": False, "foreach": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, **plain)
    for epoch in range(dials.epochs):
        losses = []
        for starts in shuffled_windows(len(train_ids), 16, dials.seed, epoch).split(8):
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, 2 * STEPS, dials)
            inputs, targets = gather(train_ids, starts, 16)
            loss = F.cross_entropy(model(inputs).transpose(1, 2), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            losses += [loss.item()] * len(starts)  # the mean over windows, not over steps
            step += 1
        row = log_losses(Path("log.csv"))[epoch]
        assert row[:2] == [str(epoch + 1), str(step)]
        assert float(row[2]) == pytest.approx(np.mean(losses), abs=1e-4)
        assert float(row[3]) == pytest.approx(evaluate(model, held_out_ids), abs=1e-4)
    found = load_checkpoint("model.pth")[0].state_dict()
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-2, atol=1e-3, msg=name)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(here):
    results = []
    for seed in ("3", "3", "4"):
        train("--dropout", "0.2", "--seed", seed)
        results.append((log_losses(here / "log.csv"), (here / "model.pth").read_bytes()))
        torch.rand(7)  # whatever happened before in this process must not matter
    assert results[0] == results[1]
    assert results[0][0] != results[2][0]
    assert results[0][1] != results[2][1]


def test_log_and_report_have_a_line_per_epoch(here):
    done = train("--epochs", "3")
    rows = log_losses(here / "log.csv")
    assert [row[:2] for row in rows] == [[str(n), str(n * STEPS)] for n in (1, 2, 3)]
    seconds = [float(line.split(",")[4]) for line in Path("log.csv").read_text().split("\n")[1:-1]]
    assert seconds == sorted(seconds)
    said = [line for line in done.out.splitlines() if line.startswith("epoch ")]
    assert len(said) == 3
    for (epoch, _, train_loss, val_loss), line in zip(rows, said):
        for figure in (f"{epoch}/3", f"{float(train_loss):.4f}", f"{float(val_loss):.4f}"):
            assert figure in line
        assert f"{float(val_loss) / math.log(2):.3f} bits/char" in line
    assert float(rows[0][2]) < math.log(9) + 0.05
    assert float(rows[2][3]) < math.log(9) - 0.05


def test_the_run_says_first_what_it_is_about_to_do():
    out = train().out.split("epoch 1/2")[0]
    parameters = sum(p.numel() for p in TinyGPT(vocab_size=9, **MODEL).parameters())
    for figure in ("cpu", "1,062", "118", "9 different", f"{parameters:,}", f"{STEPS} steps"):
        assert figure in out


def test_the_checkpoint_holds_the_weights_of_the_best_epoch(here):
    learned, held_out = "abcdefgh " * 100, "abcdefgh " * 4 + "hgfedcba " * 7
    (here / "text.txt").write_text(learned + held_out)  # the better it learns, the worse it does
    argv = ["--epochs", "8", "--learning_rate", "0.01", "--seed", "1"]
    train(*argv)
    losses = [float(row[3]) for row in log_losses(here / "log.csv")]
    assert min(losses) < losses[-1] - 0.3
    _, held_out_ids = split_text()
    assert evaluate(load_checkpoint("model.pth")[0], held_out_ids) == min(losses)

    straight = contents(here)["model.pth"]
    interrupt(4 * STEPS, *argv)  # later than the best epoch, which must be remembered
    assert call(train_model.main, [*FILES, "--resume"]).status == 0
    assert contents(here)["model.pth"] == straight


def test_a_finished_file_holds_what_generation_needs_and_nothing_else():
    train()
    kept = torch.load("model.pth", weights_only=True)
    assert set(kept) == {"format", "model", "vocabulary", "weights"}
    assert kept["vocabulary"] == " abcdefgh"
    assert kept["model"] == {"vocab_size": 9, **MODEL, "dropout": 0.0}
    done = call(generate_text.main, ["--checkpoint", "model.pth", "--max_new_tokens", "30"])
    assert done.status == 0
    assert len(done.out) >= 30


def test_presets_and_flags_choose_the_dials(monkeypatch):
    gpu = ["--preset", "gpu", *SIZES, "--dropout", "0", "--epochs", "1", "--learning_rate", "0.1"]
    assert call(train_model.main, [*FILES, *gpu]).status == 0
    assert log_losses(Path("log.csv"))[0][1] == str(STEPS)
    with signal_after(1):
        assert call(train_model.main, [*FILES, "--preset", "gpu", *SIZES]).status == 130
    saved = torch.load("model.pth", weights_only=True)["training"]["dials"]
    assert saved == asdict(replace(GPU, **MODEL, batch_size=8))


# ---- Resuming, refusing, keeping (kills and disks: test_interruptions.py) ------------------------


def test_resuming_a_finished_run_says_so_and_changes_nothing(here):
    train()
    before = contents(here)
    done = call(train_model.main, [*FILES, "--resume"])
    assert (done.status, done.err) == (0, "")
    assert "finished" in done.out
    assert contents(here) == before


def test_resume_lists_every_flag_that_contradicts(here):
    interrupt(4)
    before = contents(here)
    changed = ["--n_embd", "32", "--learning_rate", "0.5", "--seed", "7", "--n_layer", "1"]
    done = call(train_model.main, [*FILES, "--resume", *changed])
    for name, saved, asked in (
        ("n_embd", 16, 32),
        ("learning_rate", LAPTOP.learning_rate, 0.5),
        ("seed", LAPTOP.seed, 7),
    ):
        assert f"{name} is {saved}, not {asked}" in done.sentence()
    assert "n_layer" not in done.err  # it says the same as the checkpoint
    assert contents(here) == before
    assert "dropout" in call(train_model.main, [*FILES, "--resume", "--preset", "gpu"]).sentence()
    assert contents(here) == before
    assert call(train_model.main, [*FILES, "--resume", *SIZES]).status == 0


def test_resume_takes_the_dials_of_the_checkpoint(here):
    argv = ["--dropout", "0.1", "--weight_decay", "0.7", "--seed", "9"]
    train(*argv)
    straight = contents(here)
    interrupt(STEPS + 3, *argv)
    assert call(train_model.main, [*FILES, "--resume"]).status == 0
    assert contents(here)["model.pth"] == straight["model.pth"]


def test_resume_refuses_another_text(here):
    interrupt(4)
    text = make_text()
    (here / "text.txt").write_text(text[:-1] + ("a" if text[-1] != "a" else "b"), encoding="utf-8")
    before = contents(here)
    assert "text.txt" in call(train_model.main, [*FILES, "--resume"]).sentence()
    assert contents(here) == before


def test_resume_without_a_checkpoint(here):
    assert "model.pth" in call(train_model.main, [*FILES, "--resume"]).sentence()
    assert list(contents(here)) == ["text.txt"]


def test_resume_keeps_a_file_that_is_not_the_log_of_this_run(here):
    interrupt(4)
    (here / "notes.csv").write_text("my notes\n")
    argv = ["--input", "text.txt", "--checkpoint", "model.pth", "--log", "notes.csv", "--resume"]
    done = call(train_model.main, argv)
    assert "my notes\n" in [path.read_text() for path in here.glob("notes*.csv")], done
    if done.status == 0:
        assert len(log_losses(here / "notes.csv")) == 2


FORGED = {
    "training": [5, [], "x", {}, torch.zeros(3)],
    "training/dials": [None, {}, {"n_embd": 16}, {"new": 1}],
    "training/dials/beta2": [0, "0.9", math.nan],
    "training/dials/epochs": [0, 2.0, True, "2", None, 10**12],
    "training/dials/n_embd": [32],
    "training/text": [None, "", b"x"],
    "training/step": [-1, 0, STEPS - 1, 2 * STEPS + 1, 10**30, 1.5, True, None, "x"],
    "training/updates": [-1, 10**30, None, 1.0],
    "training/rows": [None, (), {}, "", 5, [[1]], [()], [[1, 9, 2.0, math.nan, 1.0]], [[None] * 5]],
    "training/rows/0": [(1, 9, 2.0, 2.0, 1.0), [1, 9, 2.0, "2", 1.0], torch.zeros(5), "12345"],
    "training/loss_sum": [math.inf, 10**400, None, torch.zeros(2)],
    "training/seconds": [math.nan, 10**400, "1"],
    "training/best_loss": [None, 1, "x"],
    "training/weights": [None, {}, [1]],
    "training/weights/head.weight": [None, torch.zeros(3), torch.full((9, 16), math.nan)],
    "training/average/head.weight": [torch.zeros(9, 16).double(), torch.zeros(16, 9).t()],
    "training/square/head.weight": [torch.zeros(1).expand(9, 16), torch.zeros(9, 16).to_sparse()],
    "training/random": [None, torch.zeros(3), torch.zeros(8, dtype=torch.uint8), "x"],
    "vocabulary": [" abcdefgi", " abcdefg"],
}


@pytest.mark.parametrize("where, value", [(k, v) for k in FORGED for v in FORGED[k]])
def test_a_forged_run_is_refused(here, where, value):
    interrupt(STEPS + 3)
    forged = torch.load("model.pth", weights_only=True)
    *path, last = where.split("/")
    inside = forged
    for name in path:
        inside = inside[name]
    inside[int(last) if last.isdigit() else last] = value
    torch.save(forged, "model.pth")
    before = contents(here)
    done = call(train_model.main, [*FILES, "--resume"])
    if where == "training/dials/beta2" and value == 0:  # odd, and possible
        assert done.status == 0
        return
    assert "model.pth" in done.sentence() or where.startswith("training/dials"), done
    assert len(done.err) < 1_000
    assert contents(here) == before


@pytest.mark.parametrize("part", ["training.seconds", "training.updates", "training.square"])
def test_a_run_with_a_part_missing_is_refused(here, part):
    interrupt(3)
    forged = torch.load("model.pth", weights_only=True)
    del forged["training"][part.split(".")[1]]
    torch.save(forged, "model.pth")
    call(train_model.main, [*FILES, "--resume"]).sentence()


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are those of Linux")
@pytest.mark.parametrize("where", ["rows", "row", "random", "dial"])
def test_a_forged_run_takes_no_more_memory_than_it_has_bytes(here, where):
    interrupt(STEPS + 3)
    forged = torch.load("model.pth", weights_only=True)
    huge, training = torch.zeros(1, 1).expand(10**5, 10**5), forged["training"]
    if where == "rows":
        training["rows"] = huge
    elif where == "row":
        training["rows"] = [huge[0].expand(10**5)]
    elif where == "random":
        training["random"] = torch.zeros(1, dtype=torch.uint8).expand(10**9)
    else:
        training["dials"]["n_embd"] = huge
    torch.save(forged, "model.pth")
    done = forks().run(here, *FILES, "--resume", memory=500_000_000)
    assert "memory" not in done.sentence()


IMPOSSIBLE = [
    ["--batch_size", "0"],
    ["--n_layer", "-1"],
    ["--epochs", "0"],
    ["--n_embd", "15"],
    ["--n_embd", str(10**12)],
    ["--n_embd", "1" + "0" * 5000],
    ["--n_head", "3"],
    ["--block_size", "2.5"],
    ["--learning_rate", "nan"],
    ["--learning_rate", "-1"],
    ["--weight_decay", "inf"],
    ["--dropout", "1"],
    ["--validation_fraction", "0.9"],
    ["--seed", "-1"],
    ["--seed", "\u0663\u00e9"],
    ["--gradient_clip", "0"],
]


@pytest.mark.parametrize("flags", IMPOSSIBLE, ids=lambda flags: " ".join(flags)[:30])
def test_impossible_dials_are_refused_by_name(here, flags):
    before = contents(here)
    done = call(train_model.main, [*TINY, *flags])
    assert flags[0].strip("-") in done.sentence()
    assert done.out == ""
    assert contents(here) == before


REFUSED = {
    "missing text": ["--input", "nowhere.txt"],
    "folder as text": ["--input", "folder"],
    "text without a window": ["--block_size", "600"],
    "log is text": ["--log", "text.txt"],
    "checkpoint is text": ["--checkpoint", "folder/../text.txt"],
    "log is checkpoint": ["--log", "model.pth"],
    "log is the kept checkpoint": ["--log", "model.previous.pth"],
    "folder as checkpoint": ["--checkpoint", "folder"],
    "folder as log": ["--log", "folder"],
    "no checkpoint name": ["--checkpoint", ""],
    "no log name": ["--log", ""],
    "missing folder": ["--checkpoint", "nowhere/model.pth"],
    "file as folder": ["--log", "text.txt/log.csv"],
    "endless name": ["--checkpoint", "x" * 300],
    "no such device": ["--device", "tpu"],
    "no such flag": ["--epoch", "3"],
    "no value": ["--epochs"],
    "a word too many": ["text.txt"],
}


@pytest.mark.parametrize("flags", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_done(here, flags):
    (here / "folder").mkdir()
    (here / "model.previous.pth").write_text("not a checkpoint")
    parents = os.listdir(here.parent)
    before = contents(here)
    done = call(train_model.main, [*TINY, *flags])
    done.sentence()
    assert "epoch 1" not in done.out
    assert contents(here) == before
    assert os.listdir(here.parent) == parents


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(here):
    assert "cuda" in call(train_model.main, [*TINY, "--device", "cuda"]).sentence()
    assert list(contents(here)) == ["text.txt"]


def test_a_fresh_run_keeps_the_older_files(here):
    train("--seed", "1")
    first = contents(here)
    done = train("--seed", "2")
    second = contents(here)
    assert set(second) == {*first, "model.previous.pth", "log.previous.csv"}
    assert second["model.previous.pth"] == first["model.pth"] != second["model.pth"]
    assert second["log.previous.csv"] == first["log.csv"] != second["log.csv"]
    assert "model.previous.pth" in done.out

    interrupt(2, "--seed", "3")  # an unfinished run replaces, and is replaced, in the same way
    third = contents(here)
    assert third["model.previous.pth"] == second["model.pth"]
    train("--seed", "4")
    assert contents(here)["model.previous.pth"] == third["model.pth"]


def test_a_fresh_run_keeps_any_file_it_is_told_to_write_to(here):
    (here / "log.csv").write_bytes(b"\x00 an unrelated file \xff")
    (here / "model.pth").write_bytes(b"\x01 another one")
    train()
    after = contents(here)
    assert after["log.previous.csv"] == b"\x00 an unrelated file \xff"
    assert after["model.previous.pth"] == b"\x01 another one"


EXPLOSION = ["--learning_rate", "10", "--weight_decay", "100"]


def test_a_run_that_diverges_stops_with_advice_and_keeps_the_older_checkpoint(here):
    train()
    before = contents(here)
    write_text(here, 5_000)  # 35 steps an epoch: nothing of the new run is worth saving
    done = call(train_model.main, [*TINY, *EXPLOSION, "--warmup_steps", "0"])
    assert "learning_rate" in done.sentence()
    after = contents(here)
    assert set(after) == set(before)
    assert [after[name] == before[name] for name in ("model.pth", "log.csv")] == [True, True]


def test_a_run_that_diverges_keeps_its_last_good_epoch(here):
    write_text(here, 400)
    argv = [*TINY, *EXPLOSION, "--epochs", "60", "--batch_size", "32"]  # one step an epoch
    done = call(train_model.main, argv)
    assert "learning_rate" in done.sentence()
    rows = log_losses(here / "log.csv")
    assert 1 <= len(rows) < 60
    assert len(rows) >= sum(line.startswith("epoch ") for line in done.out.splitlines()) - 1
    assert all(math.isfinite(float(row[2])) and math.isfinite(float(row[3])) for row in rows)
    model, _, training = load_checkpoint("model.pth")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert training["step"] == len(rows)


def test_a_model_larger_than_the_machine_is_refused_with_the_dials_to_lower(here):
    done = call(train_model.main, [*TINY, "--n_embd", "65536", "--n_layer", "100"])
    assert "out of memory" in done.sentence()
    assert "n_embd" in done.err
    assert list(contents(here)) == ["text.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are those of Linux")
@pytest.mark.parametrize("flags", [["--n_embd", "4096"], ["--batch_size", "60000"]], ids=str)
def test_memory_that_runs_out_names_the_dials_to_lower(here, flags):
    write_text(here, 200_000)
    done = forks().run(here, *TINY, *flags, memory=150_000_000)
    assert "batch_size" in done.sentence()
    assert "n_embd" in done.err
    assert list(contents(here)) == ["text.txt"]


# ---- Number formats, compilation, several processes ----------------------------------------------


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_learns_through_the_same_functions(here, monkeypatch, kind):
    """Precision is chosen by the GPU; here it is chosen for the CPU, and all else is real."""
    used = []

    def choose(device):
        used.append(Precision("cpu", kind, make_scaler("cpu", kind)))
        return used[-1]

    train("--epochs", "4")
    exact = float(log_losses(here / "log.csv")[-1][3])
    monkeypatch.setattr(train_model, "choose_precision", choose)
    done = train("--epochs", "4")
    assert str(kind).split(".")[1] in done.out
    assert used[0].scaler.is_enabled() == (kind == torch.float16)
    assert float(log_losses(here / "log.csv")[-1][3]) == pytest.approx(exact, abs=0.03)
    straight = contents(here)["model.pth"]
    interrupt(STEPS + 3, "--epochs", "4")
    assert call(train_model.main, [*FILES, "--resume"]).status == 0
    assert contents(here)["model.pth"] == straight  # the scale is part of what is resumed


def test_an_overflow_in_float16_lowers_the_scale_and_skips_the_step(here, monkeypatch):
    scaler = make_scaler("cpu", torch.float16)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    monkeypatch.setattr(
        train_model, "choose_precision", lambda device: Precision("cpu", torch.float16, scaler)
    )
    train("--epochs", "8")
    assert scaler.get_scale() < 2.0**40
    assert float(log_losses(here / "log.csv")[-1][3]) < math.log(9) - 0.05


def test_without_a_compiler_there_is_one_warning_and_the_same_result(here):
    train()
    eager = contents(here)
    nothing = {"CXX": "/nonexistent/compiler", "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    process = python(ROOT / "train_model.py", *TINY, "--compile", "on", folder=here, **nothing)
    done = outcome(process)
    assert done.status == 0, done
    assert done.out.count("warning") == 1
    assert "compile" in next(line for line in done.out.splitlines() if "warning" in line)
    assert "Traceback" not in done.err
    assert contents(here)["model.pth"] == eager["model.pth"]


def check_compiled(here, done):
    """A compiled run learned what the eager run before it did, and saved the plain names."""
    assert done.status == 0, done
    assert "warning" not in done.out
    names = set(torch.load("model.pth", weights_only=True)["weights"])
    assert names == set(TinyGPT(vocab_size=9, **MODEL).state_dict())
    both = zip(log_losses(here / "log.csv"), log_losses(here / "log.previous.csv"))
    for compiled, eager in both:
        assert compiled[:2] == eager[:2]
        assert float(compiled[3]) == pytest.approx(float(eager[3]), abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # its own
def test_compiled_weights_have_their_plain_names(here, monkeypatch):
    """The compiler's first half only: turning it into C++ takes half a minute (see below)."""
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)
    train("--dropout", "0.2")
    check_compiled(here, train("--dropout", "0.2", "--compile"))


@pytest.mark.skipif("TINYGPT_COMPILE" not in os.environ, reason="slow; TINYGPT_COMPILE=1 runs it")
def test_compiling_for_real(here):
    train()
    fresh = {"TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    process = python(ROOT / "train_model.py", *TINY, "--compile", "on", folder=here, **fresh)
    check_compiled(here, outcome(process))


def torchrun(folder, *command):
    """Two processes, meeting at a port that is free."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return python(*run, *command, folder=folder)


# torchrun takes any --log for its own --log_dir, so the log has its usual name here.
TOGETHER = ["--input", "text.txt", "--checkpoint", "model.pth", *SIZES, "--epochs", "2"]
TOGETHER += ["--gradient_clip", "0.1"]  # where the length of a gradient matters


def test_two_processes_learn_what_one_learns(here):
    """The last batch of an epoch has a single window: nothing is left for the second process."""
    done = outcome(torchrun(here, ROOT / "train_model.py", *TOGETHER))
    assert done.status == 0, done
    assert done.out.count("epoch 1/2") == 1
    assert set(contents(here)) == {"text.txt", "model.pth", "training_log.csv"}
    names = set(torch.load("model.pth", weights_only=True)["weights"])
    assert names == set(TinyGPT(vocab_size=9, **MODEL).state_dict())
    together = log_losses(here / "training_log.csv")
    _, held_out_ids = split_text()
    assert evaluate(load_checkpoint("model.pth")[0], held_out_ids) == float(together[-1][3])

    train("--gradient_clip", "0.1")
    for found, alone in zip(together, log_losses(here / "log.csv")):
        assert found[:2] == alone[:2]
        assert float(found[2]) == pytest.approx(float(alone[2]), abs=1e-3)
        assert float(found[3]) == pytest.approx(float(alone[3]), abs=1e-3)


@pytest.mark.skipif(not POSIX, reason="needs a POSIX shell")
def test_a_process_that_cannot_start_ends_the_others(here):
    (here / "text0.txt").write_text(make_text(), encoding="utf-8")  # and there is no text1.txt
    argv = " ".join([*TOGETHER, "--input", "text$RANK.txt"])
    script = f"exec '{sys.executable}' '{ROOT / 'train_model.py'}' {argv}"
    done = outcome(torchrun(here, "--no-python", "sh", "-c", script))
    assert done.status != 0
    assert "text1.txt" in done.err
    assert set(contents(here)) == {"text.txt", "text0.txt"}


@pytest.mark.skipif(not POSIX, reason="needs SIGKILL")
def test_a_process_that_dies_ends_the_others(here):
    (here / "one_dies.py").write_text(ONE_DIES, encoding="utf-8")
    done = outcome(torchrun(here, "one_dies.py", ROOT / "train_model.py", *TOGETHER))
    assert done.status != 0
    assert "error: process 0: " in done.err
    assert str(ROOT / "train_model.py") not in done.err  # no traceback of ours
    assert set(contents(here)) == {"text.txt", "one_dies.py"}


ONE_DIES = """
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

if os.environ["RANK"] == "1":
    register_optimizer_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# ---- As a process --------------------------------------------------------------------------------


def test_from_another_directory_with_any_names_letters_and_code_page(here):
    (here / "texte accentu\u00e9.txt").write_text(
        "\u0633\u0644\u0627\u0645 \U0001f600\U0001f680 e\u0301\n" * 120, encoding="utf-8"
    )
    (here / "out").mkdir()
    argv = ["--input", "texte accentu\u00e9.txt", "--checkpoint", "out/mod\u00e8le.pth"]
    process = python(
        os.path.relpath(ROOT / "train_model.py", here),
        *argv,
        *["--log", "out/log.csv", *SIZES, "--epochs", "2"],
        folder=here,
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
    )
    done = outcome(process)
    assert done.status == 0, done
    assert done.err == ""  # there is no terminal, so there is no bar
    assert "\r" not in done.out
    assert all(line.isascii() for line in done.out.splitlines())
    assert len(log_losses(here / "out" / "log.csv")) == 2
    assert "\U0001f680" in load_checkpoint(str(here / "out" / "mod\u00e8le.pth"))[1]
    assert set(contents(here / "out")) == {"log.csv", "mod\u00e8le.pth"}


@pytest.mark.skipif(not POSIX, reason="needs a POSIX shell")
@pytest.mark.parametrize("redirection", ["2>&1 | head -1", ">&- 2>&-", "> /dev/full 2>&1"])
def test_a_run_outlives_its_output(here, redirection):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = f'"$PYTHON" "$SCRIPT" {" ".join(TINY)} {redirection}'
    names = environment(PYTHON=sys.executable, SCRIPT=str(ROOT / "train_model.py"))
    subprocess.run(command, shell=True, cwd=here, env=names, check=False, timeout=120)
    assert "training" not in torch.load("model.pth", weights_only=True)
    assert len(log_losses(here / "log.csv")) == 2
    assert set(contents(here)) == {"text.txt", "model.pth", "log.csv"}
