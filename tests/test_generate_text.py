"""Chapter 5: what is drawn is what model and settings say, and only text reaches stdout."""

import contextlib
import io
import os
import re
import signal
from unittest import mock

import helpers
import pytest
import torch
from helpers import LETTERS, call, close, given, st, tiny_model, write_checkpoint

from data_handling import CharTokenizer
from generate_text import generate, main, next_probabilities, write_samples
from hyperparameters import end_with_a_sentence
from model_architecture import TinyGPT

KNOWN = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]])
ONE_HOT = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0]])
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
LOGITS = st.lists(FINITE, min_size=1, max_size=9).map(lambda row: torch.tensor([row, row[::-1]]))


def test_the_temperature_sets_the_odds_and_0_puts_all_on_the_best():
    for temperature, power in ((1, 1), (0.5, 2), (2, 0.5), (0.25, 4)):
        expected = KNOWN**power / (KNOWN**power).sum(dim=-1, keepdim=True)
        assert close(next_probabilities(KNOWN.log(), temperature), expected)
    assert torch.equal(next_probabilities(KNOWN.log(), 0), ONE_HOT.double())


def test_top_k_keeps_the_likeliest_and_top_p_the_fewest_that_reach_p():
    # Ranked, the first row reads 0.5, 0.25, 0.15, 0.1. Two of them make 0.75, three make 0.9.
    for top_p, kept in ((0.3, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        expected = torch.zeros(1, 4)
        expected[:, kept] = KNOWN[:1, kept] / KNOWN[0, kept].sum()
        assert close(next_probabilities(KNOWN.log(), top_p=top_p)[:1], expected)
        assert close(next_probabilities(KNOWN[:1].log(), top_k=len(kept)), expected)
    assert close(next_probabilities(KNOWN.log(), top_p=0.6)[1:], ONE_HOT[1:])
    # Two of four equals reach one half exactly.
    assert next_probabilities(torch.zeros(1, 4), top_p=0.5).tolist() == [[0.5, 0.5, 0, 0]]
    # It counts what the others left: of the two likeliest, or at temperature 1/2, the best has 2/3
    # or 0.5**2 / 0.345 = 0.72.
    assert close(next_probabilities(KNOWN[:1].log(), top_k=2, top_p=0.6), ONE_HOT[:1])
    assert close(next_probabilities(KNOWN[:1].log(), 0.5, top_p=0.7), ONE_HOT[:1])


TEMPERATURES = st.sampled_from([0.0, 5e-324, 1e-300, 1e-9, 1000.0]) | st.floats(0, 1000)


@given(LOGITS, TEMPERATURES, st.integers(0, 12), st.floats(1e-9, 1))
def test_every_row_is_a_distribution_and_greedy_ones_take_exactly_one(logits, t, top_k, top_p):
    before, greedy = logits.clone(), next_probabilities(logits, 0)
    probabilities = next_probabilities(logits, t, top_k, top_p)
    assert torch.isfinite(probabilities).all() and (probabilities >= 0).all()
    assert close(probabilities.sum(dim=-1), torch.ones(len(logits)))
    assert top_k == 0 or ((probabilities > 0).sum(dim=-1) <= top_k).all()
    assert (probabilities.gather(1, logits.argmax(-1, True)) > 0).all()  # the best always stays
    assert torch.equal(greedy.amax(dim=-1), torch.ones(len(logits)).double())
    assert torch.equal(logits.gather(1, greedy.argmax(-1, True))[:, 0], logits.amax(-1))
    assert torch.equal(next_probabilities(logits, top_k=1, top_p=top_p), greedy)
    assert torch.equal(next_probabilities(logits, top_p=1e-9), greedy)
    assert torch.equal(logits, before)  # a pure function


def ids_of(model, prompt, count, seed=0, **settings):
    """The new ids as one tensor, (B, count)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(generate(model, prompt, count, generator, **settings)), dim=1)


def greedy_without_cache(model, prompt, count):
    """The same text the slow way: the whole context is read again for every character."""
    context, text = prompt[:, -model.block_size :], []
    for _ in range(count):
        with torch.no_grad():
            text.append(model(context)[:, -1:].argmax(dim=-1))
        context = torch.cat((context, text[-1]), dim=1)
        if context.shape[1] > model.block_size:
            context = context[:, -max(model.block_size // 2, 1) :]
    return torch.cat(text, dim=1)


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_greedy_text_is_the_same_without_the_cache_and_alone_or_in_a_batch(block_size):
    model = tiny_model(block_size=block_size)
    for length in (1, 5, 8, 9, 30):
        prompt = torch.randint(14, (3, length), generator=torch.Generator().manual_seed(length))
        expected = greedy_without_cache(model, prompt, 30)
        assert torch.equal(ids_of(model, prompt, 30, temperature=0), expected)
        assert torch.equal(ids_of(model, prompt[1:2], 30, seed=1, top_k=1), expected[1:2])
        assert expected.unique().numel() > 1 or block_size == 1  # no single repeated letter
    sizes = []  # each new character costs one position, until the window is full
    model.register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].shape[1]))
    ids_of(model, prompt[:, :3], 20)
    assert block_size < 8 or sizes == [3, *[1] * 5, 4, *[1] * 4, 4, *[1] * 4, 4, *[1] * 3]


def test_the_text_follows_from_the_seed_and_no_other_randomness():
    model, prompt = tiny_model(dropout=0.5).train(), torch.tensor([[1]])
    text = ids_of(model, prompt, 60, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(ids_of(model, prompt, 60, seed=5), text)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(ids_of(model, prompt, 60, seed=6), text)


def test_each_character_is_shown_as_soon_as_it_is_drawn():
    def watched():
        for _ in range(3):
            lengths.append(len(written.getvalue()))
            yield torch.tensor([7, 8])

    written, lengths = io.BytesIO(), []
    with contextlib.redirect_stdout(io.TextIOWrapper(written, newline="\n")):
        write_samples(CharTokenizer(LETTERS), "rose", watched(), 2)
    assert lengths == [4, 5, 6]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_characters_are_drawn_as_often_as_their_probabilities_say(temperature):
    # A model whose every character looks the same, and whose last matrix makes log p of that look.
    known, look = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, -1, 1, -1])
    model = TinyGPT(3, block_size=8, n_embd=4, n_head=1, n_layer=1)
    with torch.no_grad():
        model.embedding.weight.copy_(look.repeat(3, 1))
        model.unembedding.weight.copy_(known.log()[:, None] * look / 4)
    drawn = ids_of(model, torch.zeros(80, 1, dtype=torch.long), 50, temperature=temperature)
    shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    expected = known ** (1 / temperature)
    # 4000 draws: the standard error of a share is below 0.008.
    assert close(shares, expected / expected.sum(), tolerance=0.03)


@pytest.fixture
def write(checkpoint):
    """Call it with flags, and with what is typed, to get the outcome of one run."""
    always = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    return lambda *flags, typed=b"": call(main, [*always, *flags], typed)


def test_stdout_holds_the_whole_prompt_what_generate_makes_and_a_line_end(write):
    flags = ["--max_new_tokens", "70", "--seed", "9", "--top_k", "5", "--top_p", "0.9"]
    for text in ("rose", "a rose also not read"):  # of the second, the window has the end only
        prompt = torch.tensor([[LETTERS.index(character) for character in text]])
        ids = ids_of(tiny_model(), prompt, 70, seed=9, temperature=0.8, top_k=5, top_p=0.9)
        written = text + "".join(LETTERS[i] for i in ids[0]) + "\n"
        assert write("--prompt", text, *flags) == (0, written, "")


def test_without_flags_500_characters_follow_a_line_end_and_stderr_tells_the_seed(write):
    status, out, err = write()
    (seed,) = re.fullmatch(r"seed (\d+)\n", err).groups()
    assert status == 0 and out[0] == "\n" and len(out) == 1 + 500 + 1
    assert write("--seed", seed) == (0, out, "")
    assert not out.startswith(write("--max_new_tokens", "50").out[:-1])


def test_samples_are_written_one_after_the_other(write):
    for count, length in ((1, 0), (5, 0), (1, 40), (2, 40), (5, 40)):
        flags = ["--num_samples", str(count), "--max_new_tokens", str(length)]
        samples = re.split(r"(?m)^-+\n", write("--prompt", "rose", *flags).out)
        assert len(samples) == count and (len(set(samples)) == count or length == 0)
        assert all(re.fullmatch(f"rose(.|\n){{{length}}}\n", sample) for sample in samples)


def test_a_prompt_can_come_from_stdin_and_be_empty(write, tmp_path):
    for typed in (b"to\r\nbe", b"\xef\xbb\xbfto\nbe", b"to\rbe"):
        out = write("--prompt", "-", "--max_new_tokens", "5", typed=typed).out
        assert out.startswith("to\nbe") and len(out) == 5 + 5 + 1
    for prompt in ("", "-"):
        out = write("--prompt", prompt, "--max_new_tokens", "3").out
        assert out[0] == "\n" and len(out) == 1 + 3 + 1
    write_checkpoint(tmp_path / "xyz.pth", tiny_model(3), "xyz")  # this one knows no line end
    out = write("--checkpoint", str(tmp_path / "xyz.pth"), "--max_new_tokens", "4").out
    assert re.fullmatch(r"[xyz]{5}\n", out)


def test_a_prompt_that_the_model_cannot_read_is_refused(write):
    for character in ("Q", "\u20ac", "\U0001f600", "\udce4", "\0"):
        sentence = write("--prompt", f"rose{character}Q").sentence()  # the first is named
        assert f"(U+{ord(character):04X}) at position 4;" in sentence
    assert "UTF-8 at byte 4" in write("--prompt", "-", typed=b"rose\xff").sentence()


def test_a_checkpoint_that_is_missing_or_overflows_is_refused(write, tmp_path):
    path, model = str(tmp_path / "huge.pth"), tiny_model()
    assert "huge.pth" in write("--checkpoint", path).sentence()
    for part in (model.unembedding, model.blocks[0].attention.queries_keys_values):  # inf; nan
        part.weight.data.sign_().mul_(1e38)
        write_checkpoint(path, model, LETTERS)
        assert "overflow" in write("--checkpoint", path, "--seed", "1").sentence()


IMPOSSIBLE = f"""
--temperature=-1 --temperature=nan --temperature=inf --temperature=warm --top_k=-1 --top_k=1.5
--top_k=all --top_k={"9" * 5000} --top_p=0 --top_p=-1 --top_p=1.1 --top_p=nan --num_samples=0
--num_samples=-1 --num_samples=1e3 --max_new_tokens=-1 --max_new_tokens=many
--max_new_tokens=\u20ac --seed=-1 --seed={2**63} --seed=0.5 --device=toaster --max_new=3
""".split()


def test_an_impossible_flag_is_refused_by_its_name_and_help_explains_all(write):
    for word in IMPOSSIBLE:
        flag = word.split("=")[0]
        assert flag in write(word).sentence() and flag in write("--help").out


def test_stdin_is_utf_8_and_stdout_has_question_marks_for_what_its_code_page_lacks(tmp_path):
    symbols, path = "\nae\u00e4\u20ac\u4e2d\U0001f600", str(tmp_path / "symbols.pth")
    write_checkpoint(path, tiny_model(len(symbols)), symbols)
    flags = ["--checkpoint", path, "--max_new_tokens", "200", "--seed", "1", "--prompt"]
    typed = io.TextIOWrapper(io.BytesIO("a\u20ac".encode("utf-8")), "cp1252")
    shown = io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n")
    with contextlib.redirect_stdout(shown), mock.patch("sys.stdin", typed):
        assert end_with_a_sentence(main, [*flags, "-"]) == 0
    expected = call(main, [*flags, "a\u20ac"]).out.encode("cp1252", "replace")
    assert shown.buffer.getvalue() == expected and expected.count(b"?") > 20


@helpers.needs_posix
def test_an_endless_text_ends_when_nobody_wants_more(checkpoint, tmp_path):
    flags = ["--checkpoint", checkpoint, "--max_new_tokens", 10**9, "--seed", 1]
    for stopped_by in (signal.SIGINT, None):
        (read, out), err = os.pipe(), str(tmp_path / "err")
        page, streams = open(read, "rb"), {"out": out, "err": err}
        process = helpers.fork_script("generate_text.py", *flags, **streams, before=page.close)
        assert len(page.read(100)) == 100
        os.kill(process.pid, stopped_by) if stopped_by else page.close()
        assert helpers.ended(process) == (130 if stopped_by else 0)
        assert (tmp_path / "err").read_bytes() == b""
