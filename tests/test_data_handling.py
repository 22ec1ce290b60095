"""Chapter 2: no character is lost, changed or met twice on its way from the file to a batch."""

import codecs
import os
import re
import sys
import threading

import numpy as np
import pytest
import torch
from optional_hypothesis import given, st

import data_handling
from data_handling import (
    CharTokenizer,
    TextError,
    fingerprint,
    gather,
    load_text,
    shuffled_windows,
    split,
    windows_in,
)

# Lone surrogates are no text, but Python strings can hold them: file names and arguments do.
ANY_TEXT = st.text(st.characters(exclude_categories=()))
LINE_ENDS = st.sampled_from(["\r", "\n", "\r\n", "\ufeff", "a", "\u00e4", "\u20ac", "\U0001f600"])
FILE_TEXT = st.one_of(
    st.text(min_size=1, max_size=60), st.lists(LINE_ENDS, min_size=1).map("".join)
)
posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


@pytest.fixture
def refusal(tmp_path):
    """Call it with the bytes of a file, or a path, to get the sentence that refuses it."""

    def sentence(what):
        path = what
        if isinstance(what, bytes):
            path = tmp_path / "bad.txt"
            path.write_bytes(what)
        with pytest.raises(TextError) as caught:
            load_text(str(path))
        words = str(caught.value)
        assert words.isascii() and "\n" not in words
        return words

    return sentence


# ---- The tokenizer -----------------------------------------------------------------------------


@given(ANY_TEXT)
def test_decode_inverts_encode_on_any_text(text):
    tokenizer = CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) and tokenizer.vocab_size == len(set(text))


def test_a_list_of_ids_can_be_decoded_and_be_empty():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.decode([2, 0, 1]) == "cab"
    assert tokenizer.decode([]) == ""


@given(ANY_TEXT)
def test_the_vocabulary_is_sorted_by_code_point_and_ids_are_the_ranks(text):
    tokenizer = CharTokenizer(text)
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.encode(tokenizer.characters).tolist() == list(range(tokenizer.vocab_size))


@given(ANY_TEXT, st.randoms())
def test_the_order_of_the_text_does_not_matter(text, random):
    shuffled = list(text)
    random.shuffle(shuffled)
    assert CharTokenizer("".join(shuffled)).characters == CharTokenizer(text).characters


@given(st.text("aceg\u00e4\U0001f600"), st.characters(exclude_characters="aceg\u00e4\U0001f600"))
def test_an_unknown_character_is_named_with_its_place(before, unknown):
    tokenizer = CharTokenizer("aceg\u00e4\U0001f600")
    with pytest.raises(TextError) as caught:
        tokenizer.encode(before + unknown + "a" + unknown)
    sentence = str(caught.value)
    assert ascii(unknown) in sentence and f"U+{ord(unknown):04X}" in sentence
    assert f"position {len(before)} " in sentence
    assert sentence.isascii()


@pytest.mark.parametrize(
    "vocab_size, id_type",
    [
        (1, np.uint8),
        (256, np.uint8),
        (257, np.int16),
        (32_768, np.int16),
        (32_769, np.int32),
    ],
)
def test_ids_are_stored_in_the_smallest_type_that_holds_them(vocab_size, id_type):
    tokenizer = CharTokenizer("".join(map(chr, range(vocab_size))))
    ids = tokenizer.encode(tokenizer.characters)
    assert tokenizer.id_type is id_type and ids.dtype == id_type
    assert ids.tolist() == list(range(vocab_size))
    assert torch.from_numpy(ids).dtype.itemsize == np.dtype(id_type).itemsize


def test_every_process_shows_the_same_vocabulary(start, tmp_path, capsys):
    # Python hashes strings differently in every process; an order taken from a set would differ.
    path = tmp_path / "text.txt"
    path.write_bytes(("zyxwvutsrqponmlkjihgfedcba\n" * 20).encode())
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    process = start(data_handling.__file__, str(path), PYTHONHASHSEED=seed)
    data_handling.main(["data_handling.py", str(path)])
    here = capsys.readouterr().out
    there, errors = process.communicate()
    assert there.decode("ascii").splitlines() == here.splitlines()
    assert "\\nabcdefghijklmnopqrstuvwxyz'" in here
    assert errors == b"" and process.returncode == 0


# ---- Reading -----------------------------------------------------------------------------------


@given(FILE_TEXT, st.booleans(), st.integers(4, 9))
def test_a_text_is_read_as_python_reads_it(tmp_path_factory, text, mark, chunk):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(codecs.BOM_UTF8 * mark + text.encode("utf-8"))
    with open(path, encoding="utf-8-sig") as file:
        expected = file.read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_handling, "CHUNK", chunk)  # characters and line ends straddle the border
        if expected:
            tokenizer, ids = load_text(str(path))
            assert tokenizer.decode(ids.numpy()) == expected
            assert tokenizer.characters == "".join(sorted(set(expected)))
        else:
            with pytest.raises(TextError, match="empty"):
                load_text(str(path))


@pytest.mark.parametrize("character", ["\u00e4", "\u20ac", "\U0001f600", "\r\n"], ids=ascii)
def test_a_character_across_the_real_chunk_border_is_whole(tmp_path, character):
    path = tmp_path / "text.txt"
    size = len(character.encode("utf-8"))
    for begin in range(data_handling.CHUNK - size, data_handling.CHUNK + 1):
        text = "x" * begin + character + "yz"
        path.write_bytes(text.encode("utf-8"))
        tokenizer, ids = load_text(str(path))
        assert tokenizer.decode(ids.numpy()) == text.replace("\r\n", "\n")


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path):
    plain, windows = tmp_path / "plain.txt", tmp_path / "windows.txt"
    plain.write_bytes(b"to be\nor not\n")
    windows.write_bytes(codecs.BOM_UTF8 + b"to be\r\nor not\r\n")
    tokenizer, ids = load_text(str(plain))
    other_tokenizer, other_ids = load_text(str(windows))
    assert tokenizer.characters == other_tokenizer.characters
    assert ids.tolist() == other_ids.tolist()
    assert fingerprint(tokenizer, ids) == fingerprint(other_tokenizer, other_ids)


def test_ids_arrive_in_the_smallest_type(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc", encoding="utf-8")
    assert load_text(str(path))[1].dtype == torch.uint8
    path.write_text("".join(map(chr, range(1000, 1257))), encoding="utf-8")
    assert load_text(str(path))[1].dtype == torch.int16


def test_fingerprints_tell_texts_apart_even_when_the_ids_are_the_same():
    prints = set()
    for text in ("abab", "abba", "ab", "acac", "\x00\x01\x00\x01"):
        tokenizer = CharTokenizer(text)
        prints.add(fingerprint(tokenizer, torch.from_numpy(tokenizer.encode(text))))
    assert len(prints) == 5


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere/text.txt", "n\u00f6where \u20ac.txt"])
def test_a_missing_file_is_named(refusal, tmp_path, name):
    path = tmp_path / name
    assert ascii(str(path)) in refusal(path)


def test_a_directory_is_refused(refusal, tmp_path):
    assert "cannot read" in refusal(tmp_path)


@pytest.mark.parametrize("data", [b"", codecs.BOM_UTF8], ids=["nothing", "only a mark"])
def test_an_empty_file_is_refused(refusal, data):
    assert "is empty" in refusal(data)


def test_utf_16_is_refused(refusal):
    assert "not UTF-8: byte 0xff at offset 0;" in refusal(codecs.BOM_UTF16_LE + b"h\0i\0")


@pytest.mark.parametrize("offset", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_a_bad_byte_is_named_with_its_exact_offset(refusal, offset):
    assert f"byte 0xe4 at offset {offset};" in refusal(b"x" * offset + b"\xe4" + b"yz" * 50_000)


@pytest.mark.parametrize("length", [3, 65_534, 65_535, 65_536])
def test_a_character_cut_short_by_the_end_is_named_with_its_offset(refusal, length):
    assert f"byte 0xe2 at offset {length};" in refusal(b"x" * length + "\u20ac".encode()[:2])


@given(st.text(max_size=40), st.sampled_from([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5"]))
def test_the_offset_counts_bytes_whatever_stands_before(tmp_path_factory, text, bad):
    path = tmp_path_factory.getbasetemp() / "bad.txt"
    before = text.encode("utf-8")
    path.write_bytes(before + bad + b"abc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_handling, "CHUNK", 5)
        with pytest.raises(TextError, match=f"byte 0x{bad[0]:02x} at offset {len(before)};"):
            load_text(str(path))


@posix_only
def test_a_named_pipe_can_be_learned_from(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    text = "to be or not to be\n" * 10_000  # more than a pipe holds at once
    writer = threading.Thread(target=path.write_text, args=(text,))
    writer.start()
    tokenizer, ids = load_text(str(path))
    writer.join()
    assert tokenizer.decode(ids.numpy()) == text


@posix_only
def test_a_device_is_refused(refusal):
    assert "device" in refusal("/dev/zero")


@posix_only
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_refused(refusal, tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("secret", encoding="utf-8")
    path.chmod(0)
    assert "ermission" in refusal(path)


# ---- The split ---------------------------------------------------------------------------------


@given(st.integers(1, 300), st.floats(0.001, 0.5))
def test_a_short_text_is_told_the_length_needed_and_not_one_character_more(block_size, fraction):
    with pytest.raises(TextError) as caught:
        split(torch.zeros(1, dtype=torch.uint8), block_size, fraction)
    sentence = str(caught.value)
    needed = int(re.search(r"needs ([\d,]+) or more", sentence).group(1).replace(",", ""))
    assert f"block_size {block_size}" in sentence and "1 characters" in sentence

    train, held_out = split(torch.zeros(needed, dtype=torch.uint8), block_size, fraction)
    assert min(len(train), len(held_out)) > block_size
    assert windows_in(len(train), block_size) >= 1
    with pytest.raises(TextError, match=f"needs {needed:,} or more"):
        split(torch.zeros(needed - 1, dtype=torch.uint8), block_size, fraction)


@given(st.integers(100, 5_000), st.floats(0.05, 0.5))
def test_the_first_part_trains_and_the_last_part_is_held_out(length, fraction):
    ids = torch.arange(length)
    train, held_out = split(ids, 2, fraction)
    assert torch.equal(torch.cat((train, held_out)), ids)
    assert abs(len(held_out) - length * fraction) <= 1


def test_the_held_out_part_is_capped():
    ids = torch.zeros(50_000_000, dtype=torch.uint8)
    train, held_out = split(ids, 8, 0.5)
    assert len(held_out) == data_handling.LARGEST_HELD_OUT <= 2_000_000
    assert len(train) + len(held_out) == len(ids)


# ---- Epochs ------------------------------------------------------------------------------------

SIZES = st.integers(1, 20).flatmap(
    lambda block_size: st.tuples(st.integers(block_size + 1, 400), st.just(block_size))
)
SEEDS = st.one_of(st.integers(0, 5), st.integers(0, 2**63 - 1))


@given(SIZES, SEEDS, st.integers(0, 1000))
def test_an_epoch_meets_every_window_exactly_once(sizes, seed, epoch):
    length, block_size = sizes
    starts = sorted(shuffled_windows(length, block_size, seed, epoch).tolist())
    assert len(starts) == windows_in(length, block_size) >= 1
    offset = starts[0]
    assert starts == [offset + block_size * i for i in range(len(starts))]  # side by side


@given(SIZES, SEEDS, st.integers(0, 1000))
def test_an_epoch_meets_every_target_at_most_once_and_leaves_out_only_the_ends(sizes, seed, epoch):
    length, block_size = sizes
    ids = torch.arange(length)
    _, targets = gather(ids, shuffled_windows(length, block_size, seed, epoch), block_size)
    met = sorted(targets.flatten().tolist())
    assert met == list(range(met[0], met[-1] + 1))  # none twice, none left out in between
    assert met[0] <= block_size and met[-1] >= length - 2 * block_size


@given(SIZES, SEEDS)
def test_all_epochs_have_the_same_number_of_windows(sizes, seed):
    counts = {len(shuffled_windows(*sizes, seed, epoch)) for epoch in range(30)}
    assert counts == {windows_in(*sizes)}


@given(SIZES, SEEDS, st.integers(0, 1000))
def test_an_epoch_is_a_pure_function_of_seed_and_epoch(sizes, seed, epoch):
    first = shuffled_windows(*sizes, seed, epoch)
    torch.rand(3)  # neither generator that others use has a part in it
    np.random.rand(3)
    shuffled_windows(*sizes, seed + 1, epoch + 1)
    assert torch.equal(shuffled_windows(*sizes, seed, epoch), first)
    assert first.dtype == torch.int64


def test_seeds_and_epochs_differ():
    orders = {
        tuple(shuffled_windows(2_000, 8, seed, epoch).tolist())
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


def test_windows_do_not_come_in_the_order_of_the_text():
    starts = shuffled_windows(10_000, 8, seed=0, epoch=0)
    ahead = (starts[1:] > starts[:-1]).float().mean().item()
    assert 0.4 < ahead < 0.6


@pytest.mark.parametrize("length, block_size", [(64, 8), (67, 8), (9, 8), (12, 8), (16, 8), (5, 1)])
def test_over_the_epochs_a_window_starts_everywhere(length, block_size):
    met = set()
    for epoch in range(300):
        met |= set(shuffled_windows(length, block_size, 0, epoch).tolist())
    assert met >= set(range(length - block_size - length % block_size))
    assert max(met) < length - block_size  # every window has a character after it


# ---- Batches -----------------------------------------------------------------------------------


@given(SIZES, st.data())
def test_a_batch_equals_direct_slicing_and_targets_are_one_ahead(sizes, data):
    length, block_size = sizes
    ids = torch.randint(0, 200, (length,), dtype=torch.uint8)
    starts = data.draw(st.lists(st.integers(0, length - block_size - 1), min_size=1, max_size=9))
    inputs, targets = gather(ids, torch.tensor(starts), block_size)
    assert inputs.dtype == targets.dtype == torch.int64
    for row, start in enumerate(starts):
        assert inputs[row].tolist() == ids[start : start + block_size].tolist()
        assert targets[row].tolist() == ids[start + 1 : start + block_size + 1].tolist()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("id_type", [torch.uint8, torch.int16, torch.int32])
def test_every_id_type_can_be_gathered(id_type):
    ids = torch.arange(100).to(id_type)
    inputs, targets = gather(ids, torch.tensor([3, 90]), 4)
    assert inputs.tolist() == [[3, 4, 5, 6], [90, 91, 92, 93]]
    assert targets.tolist() == [[4, 5, 6, 7], [91, 92, 93, 94]]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_the_processes_of_a_run_share_a_batch_without_overlap(processes):
    ids, block_size = torch.arange(500), 8
    batch = shuffled_windows(len(ids), block_size, seed=0, epoch=0)[:16]
    together, _ = gather(ids, batch, block_size)
    shares = [gather(ids, batch[rank::processes], block_size)[0] for rank in range(processes)]
    rows = sorted(row for share in shares for row in share.tolist())
    assert rows == sorted(together.tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- Run directly ------------------------------------------------------------------------------


def test_the_ladder_of_lessons_is_shown_on_the_text(capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 5, encoding="utf-8")
    data_handling.main([sys.argv[0], str(path)])
    out = capsys.readouterr().out
    assert out.count(" -> ") == 1 + 8  # the heading, and one line a lesson
    assert "220 characters" in out and "28 different" in out
