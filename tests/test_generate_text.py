"""Chapter 5: what is drawn is what the model and its dials say, and only text reaches stdout."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from optional_hypothesis import given, st

import generate_text
from generate_text import draw, generate, main, next_probabilities
from model_architecture import TinyGPT, save_checkpoint

SCRIPT = generate_text.__file__
posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def close(one, other, tolerance=1e-6):
    return torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance)


# ---- Scores become probabilities ---------------------------------------------------------------

KNOWN = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]])
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
LOGITS = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(FINITE, min_size=width, max_size=width), min_size=1, max_size=4
    ).map(torch.tensor)
)
ONE_HOT = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0]])


def test_at_temperature_1_the_probabilities_are_the_models():
    assert close(next_probabilities(KNOWN.log()), KNOWN)


def test_the_temperature_divides_the_scores():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 0.8, 1.0, 2.5):
        expected = (logits.double() / temperature).softmax(dim=-1)
        assert close(next_probabilities(logits, temperature), expected)
    # Half the temperature squares the odds: 1/2 against 1/4 becomes 4 to 1, and so on.
    squares = KNOWN**2 / (KNOWN**2).sum(dim=-1, keepdim=True)
    assert close(next_probabilities(KNOWN.log(), 0.5), squares)


def test_temperature_0_puts_all_on_the_best():
    assert torch.equal(next_probabilities(KNOWN.log(), 0), ONE_HOT.double())


def test_top_k_keeps_the_k_best():
    expected = torch.tensor([[0, 2 / 3, 0, 1 / 3]])
    assert close(next_probabilities(KNOWN[:1].log(), top_k=2), expected)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    # Ranked, the first row reads 0.5, 0.25, 0.15, 0.1. Two of them make 0.75, three make 0.9.
    three = torch.tensor([[0, 0.5, 0.15, 0.25]]) / 0.9
    for top_p, expected in ((0.3, ONE_HOT[:1]), (0.8, three), (0.95, KNOWN[:1]), (1, KNOWN[:1])):
        assert close(next_probabilities(KNOWN[:1].log(), top_p=top_p), expected)
    assert close(
        next_probabilities(KNOWN[:1].log(), top_p=0.7)[0, [1, 3]] * 3, torch.tensor([2, 1])
    )


def test_each_row_of_a_batch_has_its_own_set():
    probabilities = next_probabilities(KNOWN.log(), top_p=0.6)
    assert (probabilities > 0).tolist() == [
        [False, True, False, True],
        [True, False, False, False],
    ]


def test_top_p_counts_what_top_k_and_temperature_left():
    # The two best of the first row, 0.5 and 0.25, are 2/3 and 1/3 of what is left.
    probabilities = next_probabilities(KNOWN[:1].log(), top_k=2, top_p=0.6)
    assert close(probabilities, ONE_HOT[:1])
    # At temperature 1/2 the best alone has 0.5**2 / 0.345 = 0.72.
    assert close(next_probabilities(KNOWN[:1].log(), 0.5, top_p=0.7), ONE_HOT[:1])


def test_of_equals_exactly_one_is_the_best_everywhere():
    logits = torch.tensor([[1.0, 3, 3, 2], [5, 5, 5, 5], [0, 0, 0, 7]])
    greedy = next_probabilities(logits, 0)
    assert torch.equal(greedy, next_probabilities(logits, top_k=1))
    assert torch.equal(greedy, next_probabilities(logits, top_p=1e-9))
    assert torch.equal(greedy.sum(dim=-1), torch.ones(3).double())
    assert greedy.argmax(dim=-1).tolist() == logits.argmax(dim=-1).tolist()


@given(LOGITS, st.integers(0, 12), st.floats(1e-9, 1))
def test_top_k_1_equals_greedy_whatever_the_scores(logits, _, top_p):
    greedy = next_probabilities(logits, 0)
    assert torch.equal(next_probabilities(logits, top_k=1, top_p=top_p), greedy)
    assert torch.equal(greedy.max(dim=-1).values, torch.ones(len(logits)).double())
    assert torch.equal(logits.gather(1, greedy.argmax(-1, True))[:, 0], logits.amax(-1))


@given(
    LOGITS,
    st.one_of(st.sampled_from([0.0, 5e-324, 1e-300, 1e-9, 1000.0]), st.floats(0, 1000)),
    st.integers(0, 12),
    st.floats(1e-9, 1),
)
def test_whatever_the_dials_every_row_is_a_distribution(logits, temperature, top_k, top_p):
    before = logits.clone()
    probabilities = next_probabilities(logits, temperature, top_k, top_p)
    assert torch.isfinite(probabilities).all() and (probabilities >= 0).all()
    assert close(probabilities.sum(dim=-1), torch.ones(len(logits)))
    if top_k:
        assert ((probabilities > 0).sum(dim=-1) <= top_k).all()
    best = probabilities.gather(1, logits.argmax(-1, True))
    assert (best > 0).all()  # the best always stays
    assert torch.equal(logits, before)  # a pure function


# ---- One draw ----------------------------------------------------------------------------------


def test_each_character_is_drawn_as_often_as_its_probability_says():
    many, generator = 20_000, torch.Generator().manual_seed(1)
    known = torch.tensor([0.5, 0.0, 0.25, 0.2, 0.05]).double()
    counts = torch.bincount(draw(known.expand(many, -1), generator)[:, 0], minlength=5)
    deviation = (known * (1 - known) / many).sqrt()  # of a share in so many draws
    assert ((counts / many - known).abs() <= 4 * deviation).all()
    assert counts[1] == 0


def test_a_draw_is_that_of_pytorch():
    probabilities = next_probabilities(torch.randn(8, 65), 1.5, top_k=40)
    ours, theirs = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for _ in range(200):
        expected = torch.multinomial(probabilities, 1, generator=theirs)
        assert torch.equal(draw(probabilities, ours), expected)


# ---- The loop ----------------------------------------------------------------------------------


def ids_of(model, prompt, count, seed=0, **dials):
    """The new ids as one tensor, (B, count)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(generate(model, prompt, count, generator, **dials)), dim=1)


def greedy_without_cache(model, prompt, count):
    """The same text the slow way: read the whole context again for every character.

    The context follows the one rule that `generate` states: of a prompt longer than the window the
    end is read, and when the window is full, its newest half stays.
    """
    window, text = prompt[:, -model.block_size :], []
    for _ in range(count):
        with torch.no_grad():
            best = model(window)[:, -1:].argmax(dim=-1)
        text.append(best)
        window = torch.cat((window, best), dim=1)
        if window.shape[1] > model.block_size:
            window = window[:, -max(model.block_size // 2, 1) :]
    return torch.cat(text, dim=1)


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("length", [1, 5, 8, 9, 30])
def test_greedy_text_is_the_same_with_and_without_the_cache(tiny_model, block_size, length):
    model = tiny_model(block_size=block_size, n_layer=3)
    prompt = torch.randint(0, 14, (3, length), generator=torch.Generator().manual_seed(length))
    expected = greedy_without_cache(model, prompt, 50)
    assert torch.equal(ids_of(model, prompt, 50, temperature=0), expected)
    alone = ids_of(model, prompt[1:2], 50, temperature=0)
    assert torch.equal(alone, expected[1:2])
    assert expected.unique().numel() > 1 or block_size == 1  # no test of a single repeated letter


def test_each_new_character_costs_one_position_until_the_window_is_full(tiny_model):
    model, sizes = tiny_model(block_size=8), []
    model.register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].shape[1]))
    ids_of(model, torch.zeros(1, 3, dtype=torch.long), 20)
    assert sizes == [3, *[1] * 5, 4, *[1] * 4, 4, *[1] * 4, 4, *[1] * 3]


def test_top_k_1_writes_the_greedy_text_also_in_a_batch(tiny_model):
    model, prompt = tiny_model(), torch.arange(6).view(3, 2)
    greedy = ids_of(model, prompt, 40, temperature=0)
    assert torch.equal(ids_of(model, prompt, 40, seed=1, top_k=1), greedy)
    assert torch.equal(ids_of(model, prompt, 40, seed=2, temperature=0), greedy)  # no randomness


def test_the_same_seed_writes_the_same_text_and_another_another(tiny_model):
    model, prompt = tiny_model(), torch.tensor([[1]])
    assert torch.equal(ids_of(model, prompt, 60, seed=5), ids_of(model, prompt, 60, seed=5))
    assert not torch.equal(ids_of(model, prompt, 60, seed=5), ids_of(model, prompt, 60, seed=6))


def test_no_randomness_but_the_generators_is_used(tiny_model):
    model, prompt = tiny_model(dropout=0.5).train(), torch.tensor([[1]])
    torch.manual_seed(1)
    text = ids_of(model, prompt, 30)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(ids_of(model, prompt, 30), text)
    assert torch.equal(torch.get_rng_state(), state)


def test_ids_come_as_they_are_drawn(tiny_model):
    ids = generate(tiny_model(), torch.zeros(2, 3, dtype=torch.long), 10**9, torch.Generator())
    for _ in range(3):
        new = next(ids)
        assert new.shape == (2,) and new.dtype == torch.int64


def test_nothing_asked_nothing_written(tiny_model):
    assert list(generate(tiny_model(), torch.tensor([[1]]), 0, torch.Generator())) == []


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_characters_are_drawn_as_often_as_their_probabilities_say(temperature):
    # A model whose every character looks the same, and whose head turns that look into log p.
    known = torch.tensor([0.5, 0.3, 0.2])
    model, look = TinyGPT(3, block_size=8, n_embd=4, n_head=1, n_layer=1), torch.tensor([1.0, -1])
    with torch.no_grad():
        model.embedding.weight.copy_(look.repeat(3, 2))
        model.head.weight.copy_(known.log()[:, None] * look.repeat(2) / 4)
    drawn = ids_of(model, torch.zeros(80, 1, dtype=torch.long), 50, temperature=temperature)
    shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    expected = known ** (1 / temperature)
    # 4000 draws: the standard error of a share is below 0.008.
    assert close(shares, expected / expected.sum(), tolerance=0.03)


# ---- main, in this process ---------------------------------------------------------------------


@pytest.fixture
def write(checkpoint, capsys):
    """Call it with flags to get the status, stdout and stderr of one run."""

    def run(*flags):
        try:
            status = main(["--checkpoint", str(checkpoint), "--device", "cpu", *flags])
        except SystemExit as end:  # argparse's way to refuse
            status = end.code
        return (status, *capsys.readouterr())

    return run


def refused(outcome):
    """The one sentence of a run that ended with status 2 and wrote nothing."""
    status, out, err = outcome
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.isascii()
    return err


def typed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_stdout_holds_the_prompt_the_new_characters_and_a_line_end(write, letters):
    status, out, err = write("--prompt", "Eleanor", "--max_new_tokens", "70", "--seed", "1")
    assert status == 0 and err == ""
    assert out.startswith("Eleanor") and out.endswith("\n") and len(out) == 7 + 70 + 1
    assert set(out) <= set(letters)


def test_without_flags_500_characters_follow_a_line_end(write):
    status, out, _ = write()
    assert status == 0 and out[0] == "\n" and len(out) == 1 + 500 + 1


def test_the_text_is_that_of_generate(write, tiny_model, letters):
    _, out, _ = write("--prompt", "rose", "--max_new_tokens", "30", "--seed", "9", "--top_k", "5")
    prompt = torch.tensor([[letters.index(character) for character in "rose"]])
    ids = ids_of(tiny_model(), prompt, 30, seed=9, temperature=0.8, top_k=5)
    assert out == "rose" + "".join(letters[i] for i in ids[0]) + "\n"


def test_without_a_seed_stderr_tells_the_one_that_repeats_the_text(write):
    status, out, err = write("--prompt", "a", "--temperature", "1")
    (seed,) = re.fullmatch(r"seed (\d+)\n", err).groups()
    assert status == 0
    assert write("--prompt", "a", "--temperature", "1", "--seed", seed) == (0, out, "")
    assert write("--prompt", "a", "--temperature", "1")[1] != out


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 40])
def test_samples_are_written_one_after_the_other(write, count, length):
    status, out, _ = write(
        *("--prompt", "rose", "--num_samples", str(count), "--max_new_tokens", str(length))
    )
    samples = re.split(r"^-+\n", out, flags=re.MULTILINE)
    assert status == 0 and len(samples) == count
    for sample in samples:
        assert sample.startswith("rose") and sample.endswith("\n")
        assert len(sample) == 4 + length + 1
    assert len(set(samples)) == count or length == 0


def test_a_prompt_longer_than_the_window_is_printed_whole(write):
    prompt = "to be or not to be\n" * 10
    status, out, _ = write("--prompt", prompt, "--max_new_tokens", "10", "--temperature", "0")
    assert status == 0 and out.startswith(prompt) and len(out) == len(prompt) + 10 + 1


def test_only_the_end_of_a_long_prompt_matters(write):
    flags = ["--max_new_tokens", "30", "--seed", "3"]
    long = write("--prompt", "a rose also " + "not read", *flags)[1]
    short = write("--prompt", "not read", *flags)[1]  # as many characters as the window has
    assert long.endswith(short)


@pytest.mark.parametrize("data", [b"to\r\nbe", b"\xef\xbb\xbfto\nbe", b"to\rbe"], ids=ascii)
def test_a_prompt_can_come_from_stdin(write, monkeypatch, data):
    typed(monkeypatch, data)
    status, out, _ = write("--prompt", "-", "--max_new_tokens", "5")
    assert status == 0 and out.startswith("to\nbe") and len(out) == 5 + 5 + 1


@pytest.mark.parametrize("flags", [["--prompt", ""], ["--prompt", "-"]], ids=" ".join)
def test_an_empty_prompt_is_a_new_line(write, monkeypatch, flags):
    typed(monkeypatch, b"")
    status, out, _ = write(*flags, "--max_new_tokens", "3")
    assert status == 0 and out[0] == "\n" and len(out) == 1 + 3 + 1


def test_a_model_that_knows_no_line_end_still_begins(tmp_path, tiny_model, capsys):
    save_checkpoint(str(tmp_path / "m.pth"), tiny_model(vocab_size=3), "xyz")
    assert main(["--checkpoint", str(tmp_path / "m.pth"), "--max_new_tokens", "4"]) == 0
    assert re.fullmatch(r"[xyz]{5}\n", capsys.readouterr().out)


@pytest.mark.parametrize("character", ["Q", "\u20ac", "\U0001f600", "\udce4", "\x00"], ids=ascii)
def test_an_unknown_character_is_named(write, character):
    assert ascii(character) in refused(write("--prompt", f"rose{character}"))


def test_a_prompt_on_stdin_that_is_not_utf_8_is_refused(write, monkeypatch):
    typed(monkeypatch, b"rose\xff")
    sentence = refused(write("--prompt", "-"))
    assert "UTF-8" in sentence and "4" in sentence


def test_a_checkpoint_that_is_missing_or_not_ours_is_refused(write, tmp_path):
    assert "train" in refused(write("--checkpoint", str(tmp_path / "none.pth")))
    (tmp_path / "text.pth").write_text("not a model", encoding="utf-8")
    assert "text.pth" in refused(write("--checkpoint", str(tmp_path / "text.pth")))
    refused(write("--checkpoint", str(tmp_path)))
    refused(write("--checkpoint", str(tmp_path / "text.pth" / "below")))


def test_a_damaged_checkpoint_is_not_taken_for_an_unwritable_text(write):
    if os.name == "posix":  # whatever the system answers, the sentence is about the checkpoint
        assert "text cannot be written" not in refused(write("--checkpoint", "n" * 300))


@pytest.mark.parametrize(
    "flag, values",
    [
        ("--temperature", ["-1", "nan", "inf", "warm"]),
        ("--top_k", ["-1", "1.5", "all", "9" * 5000]),
        ("--top_p", ["0", "-1", "1.1", "nan"]),
        ("--num_samples", ["0", "-1", "1e3"]),
        ("--max_new_tokens", ["-1", "many", "\u20ac"]),
        ("--seed", ["-1", str(2**63), "0.5"]),
        ("--device", ["toaster"]),
        ("--no_such_flag", ["1"]),
        ("--max_new", ["3"]),
    ],
)
def test_an_impossible_flag_is_refused_by_its_name(write, flag, values):
    for value in values:
        assert flag in refused(write(flag, value))


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    flags = "checkpoint prompt max_new_tokens temperature top_k top_p num_samples seed device"
    for flag in flags.split():
        assert f"--{flag}" in text


# ---- As a process, from another directory ------------------------------------------------------

SYMBOLS = "\nae\u00e4\u20ac\u4e2d\U0001f600"


@pytest.fixture
def symbols(tmp_path, tiny_model):
    """A checkpoint whose characters most code pages lack."""
    path = tmp_path / "symbols.pth"
    save_checkpoint(str(path), tiny_model(len(SYMBOLS)), SYMBOLS)
    return str(path)


def plain(data):
    """Bytes as written on a system that ends lines with a single character."""
    return data.replace(b"\r\n", b"\n")


def test_only_the_text_reaches_stdout_and_the_seed_goes_to_stderr(start, checkpoint, write):
    flags = ["--checkpoint", str(checkpoint), "--prompt", "-", "--max_new_tokens", "20"]
    process = start(SCRIPT, *flags, stdin=subprocess.PIPE)
    out, err = process.communicate(b"Eleanor")
    (seed,) = re.fullmatch(rb"seed (\d+)\n", plain(err)).groups()
    again = write("--prompt", "Eleanor", "--max_new_tokens", "20", "--seed", seed.decode())
    assert process.returncode == 0 and plain(out).decode() == again[1]


def test_a_mistake_ends_the_process_with_status_2_and_one_sentence(start, checkpoint):
    process = start(SCRIPT, "--checkpoint", str(checkpoint), "--prompt", "-", stdin=subprocess.PIPE)
    out, err = process.communicate(b"\xff\xfe")
    assert process.returncode == 2 and out == b""
    assert err.startswith(b"error: ") and err.count(b"\n") == 1


def test_no_code_page_and_no_locale_is_an_obstacle(start, symbols, write):
    flags = ["--checkpoint", symbols, "--max_new_tokens", "200", "--seed", "1"]
    systems = {
        "ascii": {"PYTHONIOENCODING": "ascii"},
        "cp1252": {"PYTHONIOENCODING": "cp1252"},
        "utf-8": {"LC_ALL": "C"},  # Python itself makes UTF-8 of it
    }
    if os.name != "posix":
        del systems["utf-8"]
    processes = {name: start(SCRIPT, *flags, **system) for name, system in systems.items()}
    _, text, _ = write(*flags)
    for encoding, process in processes.items():
        out, err = process.communicate()
        assert process.returncode == 0 and err == b""
        # A question mark stands for every character that the code page lacks.
        assert plain(out) == text.encode(encoding, "replace")


@posix_only
@pytest.mark.parametrize("ending", ["the reader leaves", "Ctrl-C"])
def test_an_endless_text_ends_when_nobody_wants_more(start, checkpoint, ending):
    flags = ["--checkpoint", str(checkpoint), "--max_new_tokens", str(10**9), "--seed", "1"]
    process = start(SCRIPT, *flags)
    assert len(process.stdout.read(100)) == 100
    if ending == "Ctrl-C":
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == (130 if ending == "Ctrl-C" else 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_is_said_in_one_sentence(checkpoint):
    with open("/dev/full", "wb") as full:
        command = [sys.executable, SCRIPT, "--checkpoint", str(checkpoint), "--seed", "1"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
