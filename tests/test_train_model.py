"""Chapter 4: a run learns what it should, says what it did, and refuses what cannot work."""

import contextlib
import copy
import functools
import math
import os
import runpy
import signal
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
    RESUME,
    ROOT,
    SIZES,
    STEPS,
    TINY,
    at_step,
    call,
    contents,
    limited,
    log_rows,
    make_text,
    outcome,
    python,
    results,
    train,
    working_in,
)

import generate_text
import train_model
from data_handling import get_batch, load_text, shuffled_sequences, split
from hyperparameters import GPU, LAPTOP
from model_architecture import TinyGPT, load_checkpoint
from train_model import evaluate, learning_rate_at, make_optimizer

MODEL = {"block_size": 16, "n_embd": 16, "n_head": 2, "n_layer": 1}
SETTINGS = replace(LAPTOP, **MODEL, batch_size=8, epochs=2)
SCRIPT = ROOT / "train_model.py"
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell or SIGKILL")


@pytest.fixture(autouse=True)
def here(tmp_path):
    """An empty working directory but for text.txt."""
    with working_in(tmp_path / "here") as folder:
        yield folder


@pytest.fixture
def random_ids():
    """Call it to get that many of nine ids."""
    generator = torch.Generator().manual_seed(1)
    return lambda length: torch.randint(0, 9, (length,), generator=generator, dtype=torch.uint8)


def learn(*argv):
    """A run that must succeed."""
    done = train(*argv)
    assert (done.status, done.err) == (0, "")
    return done


def interrupt(step, *argv):
    """A run that is stopped after a step: it leaves an unfinished checkpoint."""
    with at_step(step, signal.SIGINT):
        assert train(*TINY, *argv).status == 130


def refused(*argv):
    """The sentence with which a run is refused; nothing was done before."""
    before = contents(Path())
    done = train(*argv)
    assert done.out == ""
    assert contents(Path()) == before
    return done.sentence()


def split_text():
    return split(load_text("text.txt")[1], 16, LAPTOP.validation_fraction)


# ---- Measuring, the step size, the optimizer -----------------------------------------------------


def rates(total, **changes):
    return [learning_rate_at(step, total, replace(LAPTOP, **changes)) for step in range(total)]


@pytest.mark.parametrize("total", [20, 150, 2_000])
def test_the_rate_climbs_to_its_setting_and_falls_to_almost_nothing(total):
    found = rates(total, learning_rate=0.5, warmup_steps=100)
    peak = found.index(max(found))
    assert max(found) == pytest.approx(0.5)
    assert 0 < found[-1] == min(found) < 0.5 / 10
    assert found[0] <= 0.5 / 3
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_warmup_takes_its_steps_but_a_tenth_of_the_run_at_most():
    assert rates(5_000, warmup_steps=100).index(LAPTOP.learning_rate) == 100
    for total in (1, 2, 9, 10, 57, 300):
        found = rates(total, warmup_steps=100)
        assert found.index(max(found)) <= total / 10
    assert rates(50, warmup_steps=0)[0] == LAPTOP.learning_rate


@pytest.mark.parametrize("length", [17, 18, 33, 16 * 700 + 5])
def test_evaluation_is_the_plain_mean_over_all_sequences(tiny_model, random_ids, length):
    model, ids, losses = tiny_model(9, **MODEL), random_ids(length).long(), []
    for start in range(0, length - 16, 16):
        logits = model(ids[None, start : start + 16]).detach()
        losses.append(F.cross_entropy(logits[0], ids[start + 1 : start + 17]).item())
    assert evaluate(model, ids) == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_repeats_without_dropout_and_restores_the_mode(tiny_model, random_ids, training):
    ids, model = random_ids(500), tiny_model(9, **MODEL, dropout=0.9).train(training)
    first = evaluate(model, ids)
    assert evaluate(model, ids) == first == evaluate(tiny_model(9, **MODEL), ids)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_matrices_decay(tiny_model):
    model = tiny_model(9, **MODEL)
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


# ---- A run ---------------------------------------------------------------------------------------


def test_an_epoch_meets_the_shuffled_sequences_in_order():
    def note(module, inputs):
        if isinstance(module, TinyGPT) and module.training:
            met.append(inputs[0].clone())

    met, expected = [], []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        learn(*TINY, "--seed", "5")
    ids, _ = split_text()
    for epoch in range(2):
        starts = shuffled_sequences(len(ids), 16, seed=5, epoch=epoch)
        expected += [get_batch(ids, some, 16)[0] for some in starts.split(8)]
    assert len(met) == 2 * STEPS
    assert all(torch.equal(*pair) for pair in zip(met, expected))


def test_training_is_the_plain_loop_that_the_chapter_describes():
    learn(*TINY, "--gradient_clip", "0.05", "--weight_decay", "0.3")
    train_ids, val_ids = split_text()
    torch.manual_seed(SETTINGS.seed)
    model, step = TinyGPT(9, **MODEL), 0
    plain = {"weight_decay": 0.3, "betas": (0.9, SETTINGS.beta2), "fused": False, "foreach": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, **plain)
    for epoch in range(2):
        losses = []
        for starts in shuffled_sequences(len(train_ids), 16, SETTINGS.seed, epoch).split(8):
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, 2 * STEPS, SETTINGS)
            inputs, targets = get_batch(train_ids, starts, 16)
            loss = F.cross_entropy(model(inputs).transpose(1, 2), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            losses += [loss.item()] * len(starts)  # the mean over sequences, not over steps
            step += 1
        row = log_rows()[epoch]
        assert row[:2] == [str(epoch + 1), str(step)]
        assert float(row[2]) == pytest.approx(np.mean(losses), abs=1e-4)
        assert float(row[3]) == pytest.approx(evaluate(model, val_ids), abs=1e-4)
    found = load_checkpoint("model.pth")[0].state_dict()
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-2, atol=1e-3, msg=name)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    found = []
    for seed in ("3", "3", "4"):
        learn(*TINY, "--dropout", "0.2", "--seed", seed)
        found.append(results())
        torch.rand(7)  # whatever happened before in this process must not matter
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]


def test_the_run_says_what_it_is_about_to_do_and_then_a_line_per_epoch():
    before, *said = learn(*TINY, "--epochs", "3").out.split("\nepoch ")
    parameters = sum(p.numel() for p in TinyGPT(9, **MODEL).parameters())
    for figure in ("cpu", "1,062", "118", "9 different", f"{parameters:,}", f"{STEPS} steps"):
        assert figure in before
    rows = log_rows()
    assert [row[:2] for row in rows] == [[str(n), str(n * STEPS)] for n in (1, 2, 3)]
    assert len(said) == 3
    for (epoch, _, train_loss, val_loss), line in zip(rows, said):
        bits = f"{float(val_loss) / math.log(2):.3f} bits/char"
        for figure in (f"{epoch}/3", f"{float(train_loss):.4f}", f"{float(val_loss):.4f}", bits):
            assert figure in line
    seconds = [float(line.split(",")[4]) for line in Path("log.csv").read_text().split("\n")[1:-1]]
    assert seconds == sorted(seconds)
    assert float(rows[0][2]) < math.log(9) + 0.05
    assert float(rows[2][3]) < math.log(9) - 0.05


def test_the_checkpoint_holds_the_parameters_of_the_best_epoch(here):
    learned, measured = "abcdefgh " * 100, "abcdefgh " * 4 + "hgfedcba " * 7
    (here / "text.txt").write_text(learned + measured)  # the better it learns, the worse it does
    argv = ["--epochs", "8", "--learning_rate", "0.01", "--seed", "1"]
    learn(*TINY, *argv)
    losses = [float(row[3]) for row in log_rows()]
    assert min(losses) < losses[-1] - 0.3
    assert evaluate(load_checkpoint("model.pth")[0], split_text()[1]) == min(losses)

    straight = results()
    interrupt(4 * STEPS, *argv)  # later than the best epoch, which must be remembered
    learn(*RESUME)
    assert results() == straight


def test_a_finished_file_holds_what_generation_needs_and_nothing_else():
    learn(*TINY)
    kept = torch.load("model.pth", weights_only=True)
    assert set(kept) == {"format", "sizes", "vocabulary", "parameters"}
    assert kept["vocabulary"] == " abcdefgh"
    assert kept["sizes"] == {**MODEL, "dropout": 0.0}
    done = call(generate_text.main, ["--checkpoint", "model.pth", "--max_new_tokens", "30"])
    assert done.status == 0
    assert len(done.out) >= 30


def test_presets_and_flags_choose_the_settings():
    interrupt(1, "--preset", "gpu", "--seed", "3")
    saved = torch.load("model.pth", weights_only=True)["training"]["settings"]
    assert saved == asdict(replace(GPU, **MODEL, batch_size=8, epochs=2, seed=3))


# ---- Resuming, refusing, keeping (kills and disks: test_interruptions.py) ------------------------


def test_resuming_a_finished_run_says_so_and_changes_nothing(here):
    learn(*TINY)
    before = contents(here)
    assert "finished" in learn(*RESUME).out
    assert contents(here) == before


def test_resume_takes_the_settings_of_the_checkpoint_and_lists_flags_that_contradict():
    argv = ["--dropout", "0.1", "--weight_decay", "0.7", "--seed", "9"]
    learn(*TINY, *argv)
    straight = results()
    interrupt(STEPS + 3, *argv)
    sentence = refused(*RESUME, "--n_embd", "32", "--seed", "7", "--n_layer", "1")
    assert "n_embd is 16, not 32" in sentence
    assert "seed is 9, not 7" in sentence
    assert "n_layer" not in sentence  # it says the same as the checkpoint
    assert "dropout is 0.1, not 0.2" in refused(*RESUME, "--preset", "gpu")
    learn(*RESUME, *SIZES)
    assert results() == straight


def test_resume_refuses_another_text(here):
    interrupt(4)
    text = make_text()
    (here / "text.txt").write_text(text[:-1] + ("a" if text[-1] != "a" else "b"))
    assert "another text" in refused(*RESUME)


def test_resume_keeps_a_file_that_is_not_the_log_of_this_run(here):
    interrupt(4)
    (here / "notes.csv").write_text("my notes\n")
    learn(*RESUME, "--training_log", "notes.csv")
    assert (here / "notes.previous.csv").read_text() == "my notes\n"
    assert len(log_rows("notes.csv")) == 2


HUGE, NAN = torch.zeros(1, 1).expand(10**5, 10**5), math.nan
HUGE_BYTES = torch.zeros(1, dtype=torch.uint8).expand(10**9)
FORGED = {
    "training": [5, [], "x", {}, torch.zeros(3)],
    "training/settings": [None, {}, {"n_embd": 16}, {"new": 1}],
    "training/settings/beta2": ["0.9", NAN],
    "training/settings/epochs": [0, 2.0, True, "2", None, 10**12],
    "training/settings/n_embd": [32, 4096, HUGE],
    "training/text": [None, "", b"x"],
    "training/step": [-1, 0, STEPS - 1, 2 * STEPS + 1, 10**30, 1.5, True, None, "x"],
    "training/history": [None, (), {}, "", 5, [[1]], [()], [[1, 9, 2.0, NAN, 1.0]], HUGE],
    "training/history/0": [(1, 9, 2.0, 2.0, 1.0), [1, 9, 2.0, "2", 1.0], "12345", [None] * 5, HUGE],
    "training/loss_sum": [math.inf, 10**400, None, torch.zeros(2)],
    "training/seconds": [NAN, 10**400, "1"],
    "training/best_loss": [None, 1, "x"],
    "training/parameters": [None, {}, [1]],
    "training/parameters/unembedding.weight": [None, torch.zeros(3), torch.full((9, 16), NAN)],
    "training/optimizer": [None, [], {0: 1}],
    "training/optimizer/0": [None, {}],
    "training/optimizer/0/exp_avg": [torch.zeros(9, 16).double(), torch.zeros(16, 9).t()],
    "training/optimizer/0/exp_avg_sq": [torch.zeros(1).expand(9, 16), torch.eye(9, 16).to_sparse()],
    "training/scaler": [None, {"scale": "x"}, {"scale": NAN}],
    "training/random": [None, torch.zeros(3), torch.zeros(8).byte(), "x", HUGE_BYTES],
    "vocabulary": [" abcdefgi", " abcdefg"],
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """What a run holds that was interrupted in its second epoch."""
    with working_in(tmp_path_factory.mktemp("interrupted")):
        interrupt(STEPS + 3)
        return torch.load("model.pth", weights_only=True)


def check_forged(forged, where):
    torch.save(forged, "model.pth")
    with limited(memory=500_000_000):
        sentence = refused(*RESUME)
    assert "model.pth" in sentence, where
    assert "memory" not in sentence, where
    assert len(sentence) < 1_000, where


@pytest.mark.parametrize("where", FORGED)
def test_a_forged_run_is_refused_before_memory_is_spent_on_it(interrupted, where):
    for value in FORGED[where]:
        forged = inside = copy.deepcopy(interrupted)
        *path, last = (int(name) if name.isdigit() else name for name in where.split("/"))
        for name in path:
            inside = inside[name]
        inside[last] = value
        check_forged(forged, (where, value))


def test_a_run_with_a_part_missing_is_refused(here, interrupted):
    for name in interrupted["training"]:
        forged = copy.deepcopy(interrupted)
        del forged["training"][name]
        check_forged(forged, name)
    (here / "text.txt").write_text(make_text(2_000))  # long enough for a new run by default
    check_forged({**interrupted, "training": {}}, "all")


REFUSED = {  # flags, and what the sentence names
    "--batch_size 0": "batch_size",
    "--n_embd 15": "n_embd",
    f"--n_embd 1{'0' * 5000}": "n_embd",
    "--block_size 2.5": "block_size",
    "--block_size 600": "1,180",
    "--learning_rate nan": "learning_rate",
    "--seed \u0663\u00e9": "seed",
    "--input nowhere.txt": "nowhere.txt",
    "--input folder": "folder",
    "--input model.pth.part": "--input",
    "--training_log text.txt": "--training_log",
    "--training_log model.pth": "--training_log",
    "--training_log model.previous.pth": "--training_log",
    "--training_log model.pth.part": "--training_log",
    "--checkpoint folder/../text.txt": "--checkpoint",
    "--checkpoint folder": "folder",
    "--training_log folder": "folder",
    "--checkpoint=": "''",
    "--training_log=": "''",
    "--checkpoint nowhere/model.pth": "nowhere/model.pth",
    "--training_log text.txt/log.csv": "text.txt/log.csv",
    f"--checkpoint {'x' * 300}": "xxx",
    "--device tpu": "tpu",
    "--device cuda": "cuda",
    "--epoch 3": "--epochs",
    "--epochs": "--epochs",
    "text.txt": "text.txt",
    "--resume": "model.pth",
}


@pytest.mark.parametrize("flags, named", REFUSED.items(), ids=[flags[:40] for flags in REFUSED])
def test_what_cannot_work_is_refused_by_name_before_anything_is_done(here, flags, named):
    (here / "folder").mkdir()
    (here / "model.previous.pth").write_text("an older model")
    if flags.startswith("--input model"):
        os.rename("text.txt", "model.pth.part")
    assert named in refused(*TINY, *flags.split(" "))
    assert os.listdir(here.parent) == ["here"]


def test_a_fresh_run_keeps_whatever_has_the_names_it_is_to_write(here):
    unrelated = {"log.csv": b"\x00 an unrelated file \xff", "model.pth": b"\x01 another one"}
    for name, data in unrelated.items():
        (here / name).write_bytes(data)
    for again in (learn, functools.partial(interrupt, 2), learn):  # each run keeps the one before
        before = contents(here)
        again(*(TINY if again is learn else ()), "--seed", str(len(before)))
        after = contents(here)
        assert set(after) == {*before, "model.previous.pth", "log.previous.csv"}
        assert after["model.previous.pth"] == before["model.pth"] != after["model.pth"]
    assert after["log.previous.csv"] == before["log.csv"] != after["log.csv"]


EXPLOSION = ["--learning_rate", "10", "--weight_decay", "100"]


def test_a_run_that_diverges_stops_with_advice_and_keeps_the_older_checkpoint(here):
    learn(*TINY)
    (here / "text.txt").write_text(make_text(5_000))  # 35 steps an epoch: none worth saving
    before = contents(here)
    assert "learning_rate" in train(*TINY, *EXPLOSION, "--warmup_steps", "0").sentence()
    assert contents(here) == before


def test_a_run_that_diverges_keeps_its_last_good_epoch(here):
    (here / "text.txt").write_text(make_text(400))  # one step an epoch
    done = train(*TINY, *EXPLOSION, "--epochs", "60", "--batch_size", "32")
    assert "learning_rate" in done.sentence()
    rows = log_rows()
    assert len(rows) == done.out.count("\nepoch ")
    assert 1 <= len(rows) < 60
    assert all(math.isfinite(float(loss)) for row in rows for loss in row[2:])
    assert load_checkpoint("model.pth")[2]["step"] == len(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are those of Linux")
@pytest.mark.parametrize("flags", ["--n_embd 4096", "--batch_size 60000", "--n_embd 65536"])
def test_memory_that_runs_out_names_the_settings_to_lower(here, monkeypatch, flags):
    (here / "text.txt").write_text(make_text(200_000))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *flags.split()])
    with limited(memory=150_000_000):
        done = call(lambda _: runpy.run_path(str(SCRIPT), run_name="__main__"), [])
    for name in ("memory", "batch_size", "block_size", "n_layer", "n_embd"):
        assert name in done.sentence()
    assert list(contents(here)) == ["text.txt"]


# ---- Number formats, compilation, several processes ----------------------------------------------


@pytest.fixture
def compute_in(monkeypatch):
    """Call it to let runs compute in a format that only GPUs choose. All else is real."""
    set_up = train_model.set_up_session
    scalers = []

    def choose(kind, **scaler):
        def set_up_so(run, device):
            set_up(run, device)
            run.number_format = kind
            run.scaler = torch.amp.GradScaler("cpu", enabled=kind == torch.float16, **scaler)
            scalers.append(run.scaler)

        monkeypatch.setattr(train_model, "set_up_session", set_up_so)
        return scalers

    return choose


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_learns_through_the_same_functions(compute_in, kind):
    learn(*TINY, "--epochs", "4")
    exact = log_rows()
    compute_in(kind)
    assert str(kind).split(".")[1] in learn(*TINY, "--epochs", "4").out
    assert log_rows() != exact
    assert float(log_rows()[-1][3]) == pytest.approx(float(exact[-1][3]), abs=0.03)


@pytest.mark.parametrize("step", [3, STEPS + 4])
def test_the_scale_of_float16_changes_in_a_run_and_is_part_of_what_is_resumed(compute_in, step):
    """At first the gradients overflow: such steps are skipped, and the scale is halved."""
    scalers = compute_in(torch.float16, init_scale=2.0**40, growth_interval=3)
    argv = ["--epochs", "10"]
    learn(*TINY, *argv)
    straight = results()
    assert float(straight[1][-1][3]) < math.log(9) - 0.05
    interrupt(step, *argv)
    saved = torch.load("model.pth", weights_only=True)
    assert saved["training"]["scaler"]["scale"] == scalers[-1].get_scale() < 2.0**40
    learn(*RESUME)
    assert results() == straight
    saved["training"]["scaler"] = {}  # the same without it is another run
    torch.save(saved, "model.pth")
    learn(*RESUME)
    assert results() != straight


def test_without_a_compiler_there_is_one_warning_and_the_same_result(here):
    argv = [*TINY, "--dropout", "0.2"]
    learn(*argv)
    eager = results()
    nothing = {"CXX": "/nonexistent/compiler", "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    done = outcome(python(SCRIPT, *argv, "--compile", "on", folder=here, **nothing))
    assert done.status == 0
    assert done.out.count("warning") == 1
    assert "compile" in next(line for line in done.out.splitlines() if "warning" in line)
    assert "Traceback" not in done.err
    assert results() == eager


def check_compiled(done):
    """A compiled run learned what the eager run before it did, and saved the plain names."""
    assert done.status == 0
    assert "warning" not in done.out
    load_checkpoint("model.pth")
    for compiled, eager in zip(log_rows(), log_rows("log.previous.csv")):
        assert float(compiled[3]) == pytest.approx(float(eager[3]), abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # its own
def test_a_compiled_run_saves_the_plain_names(monkeypatch):
    """The compiler's first half only: turning it into C++ takes half a minute (see below)."""
    learn(*TINY, "--dropout", "0.2")
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)
    check_compiled(learn(*TINY, "--dropout", "0.2", "--compile"))


@pytest.mark.skipif("TINYGPT_COMPILE" not in os.environ, reason="slow; TINYGPT_COMPILE=1 runs it")
def test_compiling_for_real(here):
    learn(*TINY)
    cache = str(here / "cache")
    process = python(SCRIPT, *TINY, "--compile", folder=here, TORCHINDUCTOR_CACHE_DIR=cache)
    check_compiled(outcome(process))


def torchrun(folder, *command):
    """Two processes, meeting at a port that is free."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return outcome(python(*run, *command, folder=folder))


def test_two_processes_learn_what_one_learns(here):
    """The last batch of an epoch has a single sequence: nothing is left for the second process."""
    argv = [*TINY, "--gradient_clip", "0.1"]  # where the length of a gradient matters
    done = torchrun(here, SCRIPT, *argv)
    assert done.status == 0, done
    assert done.out.count("epoch 1/2") == 1
    assert set(contents(here)) == {"text.txt", "model.pth", "log.csv"}
    together = log_rows()
    assert evaluate(load_checkpoint("model.pth")[0], split_text()[1]) == float(together[-1][3])
    learn(*argv)
    for found, alone in zip(together, log_rows()):
        assert [float(x) for x in found] == pytest.approx([float(x) for x in alone], abs=1e-3)


@needs_posix
def test_a_process_that_cannot_start_ends_the_others(here):
    (here / "text.txt").rename("text0.txt")  # and there is no text1.txt
    command = f"exec '{sys.executable}' '{SCRIPT}' {' '.join(TINY)} --input text$RANK.txt"
    done = torchrun(here, "--no-python", "sh", "-c", command)
    assert done.status != 0
    assert "text1.txt" in done.err
    assert list(contents(here)) == ["text0.txt"]


@needs_posix
def test_a_process_that_dies_ends_the_others(here):
    (here / "one_dies.py").write_text(ONE_DIES)
    done = torchrun(here, "one_dies.py", SCRIPT, *TINY)
    assert done.status != 0
    assert "error: another process" in done.err
    assert str(SCRIPT) not in done.err  # no traceback of ours
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
    text = "\u0633\u0644\u0627\u0645 \U0001f600\U0001f680 e\u0301\n" * 120
    (here / "texte accentu\u00e9.txt").write_text(text, encoding="utf-8")
    (here / "out").mkdir()
    names = ["--input", "texte accentu\u00e9.txt", "--checkpoint", "out/mod\u00e8le.pth"]
    argv = [os.path.relpath(SCRIPT, here), *TINY, *names, "--training_log", "out/log.csv"]
    done = outcome(python(*argv, folder=here, PYTHONIOENCODING="ascii", LC_ALL="C"))
    assert (done.status, done.err) == (0, "")  # there is no terminal, so there is no bar
    assert "\r" not in done.out
    assert done.out.isascii()
    assert len(log_rows("out/log.csv")) == 2
    assert "\U0001f680" in load_checkpoint("out/mod\u00e8le.pth")[1]
    assert set(contents(here / "out")) == {"log.csv", "mod\u00e8le.pth"}


@needs_posix
def test_a_run_outlives_its_output(here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = []
    for number, end in enumerate(["2>&1 | head -1", ">&- 2>&-", "> /dev/full 2>&1"]):
        names = f"--checkpoint {number}.pth --training_log {number}.csv"
        command = f"'{sys.executable}' '{SCRIPT}' {' '.join(TINY)} {names} {end}"
        processes.append(subprocess.Popen(command, shell=True, cwd=here))
    for number, process in enumerate(processes):
        process.wait(120)
        assert load_checkpoint(f"{number}.pth")[2] is None
        assert len(log_rows(f"{number}.csv")) == 2
    assert len(contents(here)) == 7
