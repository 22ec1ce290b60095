"""Chapter 2: no character is lost, changed or met twice on its way from the file to a batch."""

import codecs
import os
import re
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import given, refusal, st

from data_handling import CharTokenizer, get_batch, load_text, shuffled_sequences, split

# Lone surrogates are no text, but Python strings can hold them: file names and arguments do.
ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.text("\ud800\udce4\0?\n")
ODD_PIECES = st.sampled_from(["\r", "\n", "\r\n", "\ufeff", "a", "\u00e4", "\u20ac", "\U0001f600"])
BORDER = 1 << 16  # a text is read in pieces of so many characters
LENGTHS = st.one_of(st.just(0), st.integers(BORDER - 6, BORDER + 2))
SIZES = st.integers(1, 20).flatmap(
    lambda block_size: st.tuples(st.integers(block_size + 1, 400), st.just(block_size))
)
SEEDS = st.one_of(st.integers(0, 5), st.integers(0, 2**63 - 1))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Call it with bytes to get the path of a file of them."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"

    def write(data):
        path.write_bytes(data)
        return str(path)

    return write


@given(ANY_TEXT, st.randoms())
def test_ids_are_ranks_in_the_sorted_vocabulary_and_can_be_turned_back(text, random):
    tokenizer = CharTokenizer("".join(random.sample(text, len(text))))  # in any order
    ids = tokenizer.encode(text)
    assert ids.tolist() == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert tokenizer.characters == "".join(sorted(set(text)))


@pytest.mark.parametrize("vocab_size", [1, 256, 257, 32_768, 32_769])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(vocab_size, file):
    id_type = np.uint8 if vocab_size <= 256 else np.int16 if vocab_size <= 32_768 else np.int32
    text = "".join(map(chr, range(0x10000, 0x10000 + vocab_size)))
    ids = load_text(file(text.encode("utf-8")))[1].numpy()
    assert ids.dtype == id_type and ids.tolist() == list(range(vocab_size))


@given(LENGTHS, st.one_of(st.text(), st.lists(ODD_PIECES).map("".join)), st.booleans())
def test_a_text_is_read_as_python_reads_it_also_across_the_border(file, length, text, mark):
    path = file(codecs.BOM_UTF8 * mark + b"x" * length + text.encode("utf-8"))
    with open(path, encoding="utf-8-sig") as opened:
        expected = opened.read()
    tokenizer, ids = load_text(path)
    assert tokenizer.decode(ids.numpy()) == expected
    assert tokenizer.characters == "".join(sorted(set(expected)))


def test_a_large_text_takes_hardly_more_memory_than_its_ids(file):
    path = file(b"to be or not to be\n" * 1_000_000)
    tracemalloc.start()
    _, ids = load_text(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ids) == 19_000_000 and peak < 1.5 * len(ids)


def test_what_is_no_text_file_is_refused_with_a_sentence_that_names_it(tmp_path):
    paths = [tmp_path, tmp_path / "n\u00f6where \u20ac.txt", tmp_path / "none" / "text.txt"]
    if os.name == "posix":
        os.symlink("loop", tmp_path / "loop")
        os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
        (tmp_path / "secret").touch(0)
        paths += [tmp_path / "loop", tmp_path / "pipe", "/dev/null"]
        paths += [tmp_path / "secret"] if os.geteuid() else []  # root may read all
    for path in paths:
        assert f"cannot read the text {str(path)!a}: " in refusal(load_text, str(path))


LONG = "z" * 2 * BORDER
NOT_UTF_8 = st.sampled_from([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5", b"\xe2\x82"])
AFTER = st.sampled_from([b"", b"abc", LONG.encode()])


@given(LENGTHS, st.text(max_size=40) | st.just(LONG), NOT_UTF_8, AFTER, st.booleans())
def test_a_text_that_is_not_utf_8_is_told_byte_and_offset(file, length, text, bad, after, mark):
    before = codecs.BOM_UTF8 * mark + b"x" * length + text.encode("utf-8")
    where = f"byte 0x{bad[0]:02x} at offset {len(before)};"
    assert where in refusal(load_text, file(before + bad + after))


@given(st.integers(1, 300), st.floats(0.001, 0.5) | st.just(0.5))
def test_a_short_text_is_told_a_length_that_is_enough_and_hardly_more(block_size, fraction):
    sentence = refusal(split, torch.zeros(0, dtype=torch.uint8), block_size, fraction)
    needed = int(re.search(r"needs ([\d,]+) or more", sentence).group(1).replace(",", ""))
    assert f"block_size {block_size} " in sentence and needed <= block_size / fraction + 4

    parts = split(torch.zeros(needed, dtype=torch.uint8), block_size, fraction)
    assert min(map(len, parts)) > block_size
    assert len(shuffled_sequences(len(parts[0]), block_size, seed=0, epoch=0)) >= 1
    assert sentence[:40] in refusal(split, torch.zeros(needed - 1), block_size, fraction)


@given(st.integers(100, 5_000), st.floats(0.05, 0.5))
def test_the_last_part_is_measured_on_a_million_characters_at_most(length, fraction):
    ids = torch.arange(length)
    train, val = split(ids, 2, fraction)
    assert torch.equal(torch.cat((train, val)), ids) and abs(len(val) - length * fraction) <= 1
    assert len(split(torch.zeros(1, dtype=torch.uint8).expand(50_000_000), 8, 0.5)[1]) == 1_000_000


@given(SIZES, SEEDS, st.integers(0, 1000))
def test_an_epoch_meets_every_character_once_and_leaves_out_only_the_ends(sizes, seed, epoch):
    length, block_size = sizes
    starts = shuffled_sequences(length, block_size, seed, epoch)
    inputs, targets = get_batch(torch.arange(length), starts, block_size)
    met = sorted(inputs.flatten().tolist())
    assert met == list(range(met[0], met[-1] + 1))  # none twice, none left out in between
    assert met[0] < block_size and met[-1] >= length - 1 - 2 * block_size
    assert torch.equal(targets, inputs + 1) and starts.dtype == torch.int64

    torch.rand(3)  # neither generator that others use has a part in it
    np.random.rand(3)
    others = {len(shuffled_sequences(length, block_size, seed, other)) for other in range(30)}
    assert others == {len(starts)}  # all epochs are equally long
    assert torch.equal(shuffled_sequences(length, block_size, seed, epoch), starts)


def test_no_two_seeds_or_epochs_have_the_same_order_nor_that_of_the_text():
    numbers = range(10)
    orders = [shuffled_sequences(8_000, 8, seed, epoch) for seed in numbers for epoch in numbers]
    assert len({tuple(starts.tolist()) for starts in orders}) == 100
    for starts in orders:
        assert 0.4 < (starts[1:] > starts[:-1]).float().mean().item() < 0.6


@pytest.mark.parametrize("length, block_size", [(64, 8), (67, 8), (9, 8), (12, 8), (16, 8), (5, 1)])
def test_over_the_epochs_a_sequence_starts_everywhere(length, block_size):
    epochs = [shuffled_sequences(length, block_size, 0, epoch) for epoch in range(300)]
    met = set(torch.cat(epochs).tolist())
    assert met >= set(range(length - block_size - length % block_size))
    assert max(met) < length - block_size  # every sequence has a character after it


@given(SIZES, st.data(), st.sampled_from([torch.uint8, torch.int16, torch.int32]))
def test_a_batch_equals_direct_slicing_and_targets_are_one_ahead(sizes, data, id_type):
    length, block_size = sizes
    ids = torch.randint(0, 200, (length,)).to(id_type)
    starts = data.draw(st.lists(st.integers(0, length - block_size - 1), min_size=1, max_size=9))
    inputs, targets = get_batch(ids, torch.tensor(starts), block_size)
    assert inputs.dtype == targets.dtype == torch.int64
    for row, start in enumerate(starts):
        assert inputs[row].tolist() == ids[start : start + block_size].tolist()
        assert targets[row].tolist() == ids[start + 1 : start + block_size + 1].tolist()
