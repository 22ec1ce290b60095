"""Chapter 4: a run learns what it should, says what it did, and refuses what cannot work."""

import copy
import functools
import math
import operator
import os
import runpy
import signal
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import RESUME, STEPS, TINY, contents, learn, log_rows, refused, results, train

import train_model
from data_handling import get_batch, load_text, shuffled_sequences, split
from hyperparameters import GPU, LAPTOP
from model_architecture import TinyGPT, load_checkpoint
from train_model import evaluate, learning_rate_at, make_optimizer, sequence_length_at

MODEL = {"block_size": 16, "n_embd": 16, "n_head": 2, "n_layer": 1}
SCRIPT = helpers.ROOT / "train_model.py"
pytestmark = pytest.mark.usefixtures("here")


def interrupt(step, *argv):
    """A run that is stopped after a step, and the unfinished checkpoint that it leaves."""
    assert helpers.stopped_at(step, *TINY, *argv).status == 130
    return torch.load("model.pth", weights_only=True)


def split_text():
    return split(load_text("text.txt")[1], 16, LAPTOP.validation_fraction)


def test_the_rate_climbs_to_its_setting_for_a_tenth_of_the_run_at_most_and_falls_to_zero():
    for total, warmup, peak in ((5_000, 100, 100), (150, 100, 15), (9, 100, 0), (50, 0, 0)):
        settings = replace(LAPTOP, learning_rate=0.5, warmup_steps=warmup)
        found = [learning_rate_at(step, total, settings) for step in range(total)]
        assert found[peak] == max(found) == 0.5 and min(found) > 0
        climb, fall = np.diff([0, *found[: peak + 1]]), np.diff([*found[peak:], 0])
        np.testing.assert_allclose(climb, 0.5 / (peak + 1))  # straight lines, from 0 and to 0
        np.testing.assert_allclose(fall, -0.5 / (total - peak))


def test_sequences_begin_short_and_end_as_long_as_the_window():
    for epochs, parts in ((1, [1]), (2, [4, 1]), (4, [4, 4, 2, 1]), (8, [4, 4, 4, 4, 2, 2, 1, 1])):
        settings = replace(LAPTOP, epochs=epochs, block_size=64)
        assert [64 // sequence_length_at(epoch, settings) for epoch in range(epochs)] == parts
    assert sequence_length_at(0, replace(LAPTOP, block_size=1)) == 1


def test_evaluation_is_the_mean_over_all_sequences_without_dropout_and_changes_nothing():
    for length, training in ((17, True), (33, False), (16 * 700 + 5, True)):
        ids = torch.randint(0, 9, (length,), generator=torch.Generator().manual_seed(1))
        plain, model = (helpers.tiny_model(9, **MODEL, dropout=share) for share in (0.0, 0.9))
        model.train(training)
        losses = []
        for start in range(0, length - 16, 16):
            logits = plain(ids[None, start : start + 16]).detach()
            losses.append(F.cross_entropy(logits[0], ids[start + 1 : start + 17]).item())
        assert evaluate(model, ids.byte()) == pytest.approx(np.mean(losses), rel=1e-6)
        assert all(module.training is training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_only_matrices_decay():
    model = helpers.tiny_model(9, **MODEL)
    optimizer, before = make_optimizer(model, replace(LAPTOP, weight_decay=0.5)), model.state_dict()
    before = {name: parameter.clone() for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, found in model.state_dict().items():
        kept = 1.0 if "convolution" in name else 1 - 0.1 * 0.5
        torch.testing.assert_close(found, kept * before[name], msg=name)


def test_training_is_the_plain_loop_that_the_chapter_describes():
    learn(*TINY, "--gradient_clip", "0.05", "--weight_decay", "0.3", "--seed", "5")
    train_ids, val_ids = split_text()
    torch.manual_seed(5)
    model, step, settings = TinyGPT(9, **MODEL), 0, replace(LAPTOP, epochs=2)
    plain = {"weight_decay": 0.3, "betas": (0.9, settings.beta2), "fused": False, "foreach": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, **plain)
    for epoch, T in enumerate((4, 16)):  # some 8 sequences of 16, or four times as many short ones
        losses = []
        for starts in shuffled_sequences(len(train_ids), T, 5, epoch).tensor_split(STEPS):
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, 2 * STEPS, settings)
            inputs, targets = get_batch(train_ids, starts, T)
            logits, after_next = (x.transpose(1, 2) for x in model(inputs, both=True))
            loss = F.cross_entropy(logits, targets)
            second = F.cross_entropy(after_next[..., :-1], targets[:, 1:]) * (T - 1) / T
            optimizer.zero_grad()
            (loss + 0.3 * (1 - step / (2 * STEPS)) * second).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        row = log_rows()[epoch]
        assert row[:2] == [str(epoch + 1), str(step)]
        assert float(row[2]) == pytest.approx(np.mean(losses), abs=1e-4)
        assert float(row[3]) == pytest.approx(evaluate(model, val_ids), abs=1e-4)
    found = load_checkpoint("model.pth")[0].state_dict()
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-2, atol=1e-3, msg=name)


def test_all_bits_follow_from_the_seed_and_samples_change_none():
    found = []
    for seed, sample in (("3", "0"), ("3", "20"), ("4", "0")):
        argv = ["--dropout", "0.2", "--seed", seed, "--sample_characters", sample]
        out = learn(*TINY, *argv).out
        assert out.count("\n    ") >= 2 * (sample > "0") and "over-fitting" not in out
        found.append(results())
        torch.rand(7)  # whatever happened before in this process must not matter
    assert found[0] == found[1] and found[0][0] != found[2][0] and found[0][1] != found[2][1]


def test_a_run_says_what_it_is_about_to_do_and_then_a_line_per_epoch_and_leaves_the_model():
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
        assert 10 < float(line.split(" chars/s")[0].split()[-1].replace(",", "")) < 1e8
    seconds = [float(line.split(",")[4]) for line in Path("log.csv").read_text().split("\n")[1:-1]]
    assert seconds == sorted(seconds)
    assert float(rows[0][2]) < math.log(9) + 0.05
    assert float(rows[2][3]) < math.log(9) - 0.05

    kept, files = torch.load("model.pth", weights_only=True), contents()
    assert set(kept) == {"format", "sizes", "vocabulary", "parameters"}
    assert kept["vocabulary"] == " abcdefgh" and kept["sizes"] == {**MODEL, "dropout": 0.0}
    assert "finished" in learn(*RESUME).out and contents() == files


def test_over_fitting_is_named_and_the_checkpoint_holds_the_parameters_of_the_best_epoch(here):
    learned, measured = "abcdefgh " * 100, "abcdefgh " * 4 + "hgfedcba " * 7
    (here / "text.txt").write_text(learned + measured)  # the better it learns, the worse it does
    argv = ["--epochs", "8", "--learning_rate", "0.01", "--seed", "1"]
    assert learn(*TINY, *argv).out.count("over-fitting") == 1
    losses = [float(row[3]) for row in log_rows()]
    assert min(losses) < losses[-1] - 0.3
    assert evaluate(load_checkpoint("model.pth")[0], split_text()[1]) == min(losses)

    straight = results()
    interrupt(4 * STEPS, *argv)  # later than the best epoch, which must be remembered
    learn(*RESUME)
    assert results() == straight
    learn(*TINY, "--learning_rate", "0.03", "--seed", "1")
    first, second = (float(row[3]) for row in log_rows())
    assert evaluate(load_checkpoint("model.pth")[0], split_text()[1]) == first < second


def test_a_run_goes_on_as_it_began_or_not_at_all(here):
    argv = ["--dropout", "0.1", "--weight_decay", "0.7", "--seed", "9"]
    learn(*TINY, *argv)
    whole, rows = results()
    gpu = replace(GPU, **MODEL, batch_size=8, epochs=2, seed=3, sample_characters=0)
    assert interrupt(1, "--preset", "gpu", "--seed", "3")["training"]["settings"] == asdict(gpu)
    unfinished = interrupt(STEPS + 3, *argv)
    sentence = refused(*RESUME, "--n_embd", "32", "--seed", "7", "--n_layer", "1")
    assert "n_embd is 16, not 32" in sentence and "seed is 9, not 7" in sentence
    assert "n_layer" not in sentence  # it says the same as the checkpoint
    assert "dropout is 0.1, not 0.2" in refused(*RESUME, "--preset", "gpu")

    text = (here / "text.txt").read_text()
    (here / "text.txt").write_text(text[::-1])
    assert "another text" in refused(*RESUME)
    (here / "text.txt").write_text(text)
    torch.save({**unfinished, "vocabulary": " abcdefgi"}, "model.pth")
    assert "another text" in refused(*RESUME)
    torch.save(unfinished, "model.pth")

    (here / "notes.csv").write_text("my notes\n")  # and this is not its log
    learn(*RESUME, *helpers.SIZES, "--training_log", "notes.csv")
    assert results("model.pth", "notes.csv") == (whole, rows)
    assert (here / "notes.previous.csv").read_text() == "my notes\n"


HUGE, BYTE = torch.zeros(1, 1).expand(10**5, 10**5), torch.zeros(1).byte()
MATRIX, OTHER = torch.eye(9, 16), torch.zeros(16, 9)
INFINITE, SOME_NAN = MATRIX.log(), (MATRIX - 1).sqrt()
FORGED = {
    "format": ["del", "2", True, 3, torch.tensor([2, 2]), HUGE],
    "more": [1],
    "vocabulary": ["del", "", " abcdefg", " abcdefghi", " abcdefgg", "hgfedcba ", [*" abcdefgh"]],
    "sizes": ["del", [1, 2], {}],
    "sizes/n_layer": [10**9, 3, 2, 0, 1.0, True, torch.tensor(1)],
    "sizes/n_head": ["del", 0, 3],
    "sizes/n_embd": [65_536, 10**12],
    "sizes/block_size": [10**12],
    "sizes/dropout": [math.nan, 1.0, "0"],
    "sizes/epochs": [2],
    "parameters": ["del", {}, [MATRIX]],
    "parameters/convolution.weight": ["del"],
    "parameters/more": [MATRIX],
    "parameters/embedding.weight": [
        *[1.0, OTHER, OTHER.t(), MATRIX[:1].expand(9, 16), MATRIX.to("meta"), MATRIX.to_sparse()],
        *[MATRIX.double(), MATRIX.half(), MATRIX.int(), MATRIX.cfloat(), HUGE, SOME_NAN, INFINITE],
    ],
    "training": [5, [], "x", {}, torch.zeros(3)],
    "training/settings": [None, {}, {"n_embd": 16}, {"new": 1}],
    "training/settings/beta2": ["0.9", math.nan],
    "training/settings/epochs": [0, 1, 2.0, True, "2", None, 10**12],
    "training/settings/n_embd": [32, 4096, HUGE],
    "training/text": [None, "", b"x"],
    "training/step": [-1, 0, STEPS - 1, 2 * STEPS + 1, 10**30, 1.5, True, None, "x", HUGE],
    "training/history": [None, (), {}, "", 5, [[1]], [()], [[1, 9, 2.0, math.nan, 1.0]], HUGE],
    "training/history/0": [(1, 9, 2.0, 2.0, 1.0), [1, 9, 2.0, "2", 1.0], "12345", [None] * 5, HUGE],
    "training/loss_sum": [math.inf, 10**400, None, torch.zeros(2)],
    "training/seconds": [0.0, math.nan, 10**400, "1"],
    "training/parameters": [None, {}, [1]],
    "training/parameters/unembedding.weight": [None, torch.zeros(3), SOME_NAN],
    "training/optimizer": [None, [], {0: 1}],
    "training/optimizer/0": [None, {}],
    "training/optimizer/0/exp_avg": [MATRIX.double(), OTHER.t(), MATRIX[:1].expand(9, 16)],
    "training/scaler": [None, {"scale": "x"}, {"scale": math.nan}],
    "training/random": [None, torch.zeros(3), BYTE.repeat(8), "x", BYTE.expand(10**10)],
}


def test_a_forged_field_is_refused_before_memory_is_spent_on_it():
    unfinished, ones = interrupt(STEPS + 3), torch.ones(2_000)
    shared = {n: ones[: p.numel()].view(p.shape) for n, p in unfinished["parameters"].items()}
    cases = [(where, value) for where, values in FORGED.items() for value in values]
    cases += [("parameters", shared)]
    cases += [(f"training/{name}", "del") for name in unfinished["training"]]
    for where, value in cases:
        forged = copy.deepcopy(unfinished)
        *path, last = (int(name) if name.isdigit() else name for name in where.split("/"))
        inside = functools.reduce(operator.getitem, path, forged)
        inside[last] = value
        if value == "del":
            del inside[last]
        torch.save(forged, "model.pth")
        with helpers.limited("AS", 500_000_000):
            if where.startswith("training"):
                sentence = refused(*RESUME)
            else:
                sentence = helpers.refusal(load_checkpoint, "model.pth")
        assert "'model.pth'" in sentence and "memory" not in sentence, (where, value)
        assert len(sentence) < 1_000, where


REFUSED = f"""
--batch_size=0 --n_embd=15 --n_embd=1{"0" * 5000} --block_size=2.5 --block_size=600
--learning_rate=nan --seed=\u0663\u00e9 --device=tpu --device=cuda --epoch=3 --epochs
--input=nowhere.txt --input=folder --input=model.pth.part --training_log=text.txt
--training_log=model.pth --training_log=model.pth.part --checkpoint=x.pth/
--checkpoint=folder/../text.txt --checkpoint=folder --training_log=folder
--checkpoint=nowhere/model.pth --checkpoint={"x" * 300} --training_log=text.txt/log.csv
""".split()


def test_what_cannot_work_is_refused_by_name_before_anything_is_done(here):
    (here / "folder").mkdir()
    for word in REFUSED:
        flag, _, value = word.strip("-").partition("=")
        sentence = refused(*TINY, word)
        assert flag in sentence or ascii(value)[1:-1] in sentence, word
    for words, named in (("--checkpoint=", "''"), ("text.txt", "text.txt"), ("--resume", "model")):
        assert named in refused(*TINY, words)
    assert os.listdir(here.parent) == ["here"]


def test_a_run_that_diverges_stops_with_advice_and_keeps_what_is_good(here):
    explosion = [*TINY, "--learning_rate", "10", "--weight_decay", "100"]
    learn(*TINY)
    (here / "text.txt").write_text(helpers.make_text(5_000))  # 35 steps an epoch: none worth saving
    before = contents()
    assert "learning_rate" in train(*explosion, "--warmup_steps", "0").sentence()
    assert contents() == before

    (here / "text.txt").write_text(helpers.make_text(400))  # one step an epoch: some are
    done = train(*explosion, "--epochs", "60", "--batch_size", "32")
    assert "learning_rate" in done.sentence()
    rows = log_rows()
    assert 1 <= len(rows) == done.out.count("\nepoch ") < 60
    assert all(math.isfinite(float(loss)) for row in rows for loss in row[2:])
    assert load_checkpoint("model.pth")[2]["step"] == len(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are those of Linux")
def test_memory_that_runs_out_names_the_settings_to_lower(here, monkeypatch):
    (here / "text.txt").write_text(helpers.make_text(200_000))
    for flags in ("--n_embd 4096", "--batch_size 60000", "--n_embd 65536"):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *flags.split()])
        with helpers.limited("AS", 150_000_000):
            done = helpers.call(lambda _: runpy.run_path(str(SCRIPT), run_name="__main__"))
        for name in ("memory", "batch_size", "block_size", "n_layer", "n_embd"):
            assert name in done.sentence()
        assert list(contents()) == ["text.txt"]


def test_half_precision_learns_the_same_and_resumes_with_its_scale(monkeypatch):
    """Only GPUs choose these formats; all else is real. With a scale of 2**40, the first gradients
    of float16 overflow: such steps are skipped, and the scale is halved.
    """

    def set_up_so(run, device):
        set_up(run, device)
        run.number_format = kind
        run.scaler = torch.amp.GradScaler("cpu", enabled=kind == torch.float16, **scaler)

    set_up, argv = train_model.set_up_session, ["--epochs", "8"]
    learn(*TINY, *argv)
    exact, large = log_rows(), {"init_scale": 2.0**40, "growth_interval": 3}
    monkeypatch.setattr(train_model, "set_up_session", set_up_so)
    for kind, scaler in ((torch.bfloat16, {}), (torch.float16, {}), (torch.float16, large)):
        assert str(kind).split(".")[1] in learn(*TINY, *argv).out
        straight = results()
        assert straight[1] != exact and float(straight[1][-1][3]) < math.log(9) - 0.05
        assert scaler or float(straight[1][1][3]) == pytest.approx(float(exact[1][3]), abs=0.01)
    for step, left in ((3, 2.0**37), (STEPS + 4, 2.0**27)):
        saved = interrupt(step, *argv)
        assert saved["training"]["scaler"]["scale"] == left
        learn(*RESUME)
        assert results() == straight
    saved["training"]["scaler"] = {}  # the same without it is another run
    torch.save(saved, "model.pth")
    learn(*RESUME)
    assert results() != straight


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # its own
def test_a_compiled_run_saves_plain_names_and_a_missing_compiler_is_one_warning(monkeypatch):
    """The compiler's first half only. It compiles for whole windows and, once, for all others."""
    argv, compile_with = [*TINY, "--dropout", "0.2", "--epochs", "4"], torch.compile
    missing = functools.partial(compile_with, backend=lambda *_: open("no/compiler"))
    learn(*argv)
    eager = results()
    monkeypatch.setattr(torch, "compile", missing)
    out = learn(*argv, "--compile", "on").out
    assert out.count("warning") == 1 and "compile" in out and results() == eager
    monkeypatch.setattr(torch, "compile", functools.partial(compile_with, backend="aot_eager"))
    made, early = torch._dynamo.utils.counters["stats"], []
    made.clear()
    monkeypatch.setattr(train_model, "note_signals", lambda *_: early.append(made["unique_graphs"]))
    assert "warning" not in learn(*argv, "--compile").out
    assert early == [made["unique_graphs"]] == [2] or torch.__version__ < "2.5"
    assert not torch._dynamo.config.optimize_ddp  # with it, compiling anew in mid-run can fail
    load_checkpoint("model.pth")
    for compiled, plain in zip(log_rows(), eager[1]):
        assert float(compiled[3]) == pytest.approx(float(plain[3]), abs=1e-3)


def test_two_processes_learn_what_one_learns():
    """In some steps, one has four sequences and the other three."""
    argv = [*TINY, "--gradient_clip", "0.3"]  # all are cut: were they shorter, none would be
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, *argv]
    done = helpers.outcome(helpers.python(*command))
    assert done.status == 0 and done.out.count("epoch 1/2") == 1, done
    assert set(contents()) == {"text.txt", "model.pth", "log.csv"}
    together = log_rows()
    assert evaluate(load_checkpoint("model.pth")[0], split_text()[1]) == float(together[-1][3])
    learn(*argv)
    for found, alone in zip(together, log_rows()):
        assert [float(x) for x in found] == pytest.approx([float(x) for x in alone], abs=1e-4)


def together(monkeypatch, *argv, last=lambda: None):
    """The exit statuses of two processes of one run; the second calls `last` before it begins."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank, before in enumerate((lambda: None, last)):
        for name, value in {**place, "WORLD_SIZE": "2", "RANK": str(rank)}.items():
            monkeypatch.setenv(name, value)
        said = f"said by {rank}"
        processes.append(helpers.fork_script("train_model.py", *argv, out=said, before=before))
    return [helpers.ended(process) for process in processes]


@helpers.needs_posix
def test_a_process_that_dies_ends_the_others(monkeypatch):
    die_in_the_first_step = helpers.at_step(1, signal.SIGKILL).__enter__
    assert together(monkeypatch, *TINY, last=die_in_the_first_step) == [2, -signal.SIGKILL]
    said = Path("said by 0").read_text()
    assert "error: another process" in said and "Traceback" not in said
    assert set(contents()) == {"text.txt", "said by 0", "said by 1"}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: torch.ones(2).view(3))
    assert "another process" in refused(*TINY)


@helpers.needs_posix
def test_a_signal_to_one_process_stops_all_and_together_they_resume(monkeypatch):
    argv = [*TINY, "--dropout", "0.3"]  # each drops others
    assert together(monkeypatch, *argv) == [0, 0]
    straight = results()
    stop = helpers.at_step(4, signal.SIGTERM).__enter__
    assert together(monkeypatch, *argv, last=stop) == [143, 143]
    assert torch.load("model.pth", weights_only=True)["training"]["step"] == 4
    assert together(monkeypatch, *RESUME) == [0, 0] and results() == straight


def test_from_another_directory_with_any_names_letters_and_code_page_told_to_stop(here):
    text = "\u0633\u0644\u0627\u0645 \U0001f600\U0001f680 e\u0301\n" * 120
    (here / "texte accentu\u00e9.txt").write_text(text, encoding="utf-8")
    (here / "out").mkdir()
    argv = ["--input", "texte accentu\u00e9.txt", "--checkpoint", "out/mod\u00e8le.pth"]
    argv = [*TINY, *argv, "--training_log", "out/log.csv", "--epochs", "100000"]
    script, ascii_only = os.path.relpath(SCRIPT, here), {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    process = helpers.python(script, *argv, **ascii_only)
    while process.stdout.readline()[:6] not in (b"epoch ", b""):
        pass
    assert "another run" in train(*argv).sentence()
    process.terminate()
    done = helpers.outcome(process)
    assert done.err == "" and done.out.isascii() and "\r" not in done.out  # no terminal, no bar
    assert set(contents(here / "out")) == {"log.csv", "mod\u00e8le.pth"}
    _, vocabulary, unfinished = load_checkpoint("out/mod\u00e8le.pth")
    assert "\U0001f680" in vocabulary and unfinished["step"] >= STEPS


@helpers.needs_posix
def test_a_run_outlives_its_output():
    def close_both():
        sys.stdout = sys.stderr = None

    left, nobody_reads = os.pipe()
    os.close(left)
    full = "/dev/full" if os.path.exists("/dev/full") else nobody_reads
    cases = (nobody_reads, lambda: None), (full, lambda: None), (full, close_both)
    processes = []
    for number, (out, before) in enumerate(cases):
        argv = [*TINY, "--checkpoint", f"{number}.pth", "--training_log", f"{number}.csv"]
        processes.append(helpers.fork_script("train_model.py", *argv, out=out, before=before))
    for number, process in enumerate(processes):
        assert helpers.ended(process) == 0
        assert load_checkpoint(f"{number}.pth")[2] is None and len(log_rows(f"{number}.csv")) == 2
    assert len(contents()) == 7
