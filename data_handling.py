"""Chapter 2 of 5: how text becomes numbers, and numbers become lessons.

A model computes with numbers, so the first question of every language model is how to write text
down as numbers. Ours takes the simplest answer, one number per character. At the end of this file
you know what a vocabulary is, why part of the text is kept away from training, and what exactly the
model is asked in every lesson: given these characters, which one comes next? From chapter 1 it
takes the settings of one step; it hands chapter 3 ids, and chapter 4 batches of inputs and
targets. PyTorch (torch) is a NumPy that also finds slopes (chapter 4). It calls arrays Tensors;
(B, T) is a shape, B rows of T numbers. Run it to see what happens to a few characters of the text.
"""

import os
import sys
from typing import Iterator, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from hyperparameters import LAPTOP, UserError, end_with_a_sentence


class CharTokenizer:
    """Translates tokens, here single characters, to numbers, called ids, and back.

    The vocabulary is the sorted set of all characters in a text, and the id of a character is its
    place there. Sorted, because a set has no order: the ids must be the same in every run, or a run
    that is resumed would read other letters.

    >>> tokenizer = CharTokenizer("hello")
    >>> tokenizer.characters
    'ehlo'
    >>> tokenizer.encode("hole").tolist()
    [1, 3, 2, 0]
    >>> tokenizer.decode([1, 3, 2, 0])
    'hole'
    """

    def __init__(self, text: str) -> None:
        self.characters = "".join(sorted(set(text)))
        # A dict {"e": 0, "h": 1, "l": 2, "o": 3} would do, but takes long for a large text. NumPy
        # looks up many at once in an array of ids, where the place of a character is its number in
        # Unicode ("e" has 101).
        self.id_of = np.full(sys.maxunicode + 1, -1, dtype=np.int32)  # -1: has none
        self.id_of[unicode_numbers(self.characters)] = np.arange(self.vocab_size)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def id_type(self) -> type:
        """The smallest whole-number type for every id (no uint16: PyTorch hardly knows it)."""
        largest = self.vocab_size - 1
        return next(t for t in (np.uint8, np.int16, np.int32) if largest <= np.iinfo(t).max)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (characters,). Raises UserError for a character without an id."""
        ids = self.id_of.take(unicode_numbers(text))
        refuse_unknown_characters(text, ids)
        return ids.astype(self.id_type)

    def decode(self, ids: np.ndarray) -> str:
        """The text that `ids`, (characters,), stand for."""
        return "".join(self.characters[i] for i in ids)


def unicode_numbers(text: str) -> np.ndarray:
    """What `ord` says of each character, (characters,): UTF-32 is just that, four bytes each."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def load_text(path: str) -> Tuple[CharTokenizer, Tensor]:
    """The tokenizer of a UTF-8 text file, and its ids, (characters,) of the tokenizer's id_type.

    The file is read twice, first for its characters and then for their ids; and in pieces, so that
    a large text takes little more memory than its ids. Raises UserError for an unfit file.
    """
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for piece in pieces_of(path):
        seen[unicode_numbers(piece)] = True
    tokenizer = CharTokenizer("".join(map(chr, np.flatnonzero(seen))))
    ids = bytearray()
    for piece in pieces_of(path):
        ids += tokenizer.encode(piece).tobytes()
    return tokenizer, torch.from_numpy(np.frombuffer(ids, dtype=tokenizer.id_type))


def split(ids: Tensor, block_size: int, validation_fraction: float) -> Tuple[Tensor, Tensor]:
    """Cut `ids` in two: the first part to learn from, the last part to measure on.

    A model can do well on a text that it has met by remembering it, as a pupil can who has seen the
    exam. Only a text that it has never met shows whether it learned the language: so the last part
    is for that alone (validation). Raises UserError when a part is too short for one sequence.
    """
    refuse_short_text(len(ids), block_size, validation_fraction)
    kept = len(ids) - int(len(ids) * (1 - validation_fraction))
    cut = len(ids) - min(kept, 1_000_000)  # measuring on more would hardly be more exact
    return ids[:cut], ids[cut:]


def shuffled_sequences(length: int, block_size: int, seed: int, epoch: int) -> Tensor:
    """Where the sequences of one epoch begin, (sequences,) int64, in the order of training.

    Drawing sequences at random would meet some characters often and others never. Instead the text
    is cut into sequences side by side, and these are shuffled: in one pass over the text, an epoch,
    each is met once. The first cut is drawn anew for every epoch, so that a character with little
    before it in one epoch may have more in the next. (A few at either end may never be met.) The
    arguments alone fix the order: a resumed run need only know which step it had reached.
    """
    generator = np.random.default_rng([seed, epoch])
    # The first cut skips 0 to skips - 1 ids; the last id is only a target. So even the largest skip
    # leaves length - 1 - (skips - 1) = length - skips inputs; by `min`, enough for one sequence.
    # Every epoch takes as many as fit in these: so all epochs of one block_size are equally long.
    skips = min(block_size, length - block_size)
    first = generator.integers(skips)
    order = generator.permutation((length - skips) // block_size).astype(np.int64)
    return torch.from_numpy(first + block_size * order)


def get_batch(ids: Tensor, starts: Tensor, block_size: int) -> Tuple[Tensor, Tensor]:
    """The sequences that begin at `starts`, (B,): inputs and targets, (B, T) int64 each.

    B is the number of sequences, T their length. The target of every character is the one after it,
    so the targets are the inputs moved by one, and one sequence holds T lessons: guess the second
    character from the first, the third from the first two, ... (A column + a row: a table of sums.)
    """
    places = starts[:, None] + torch.arange(block_size + 1, device=ids.device)  # (B, T + 1)
    sequences = ids[places].long()
    return sequences[:, :-1], sequences[:, 1:]


def main(argv: Optional[List[str]] = None) -> None:
    """Show one sequence of a real text as characters, as ids, and as the lessons in it."""
    path = (argv or sys.argv[1:] or ["input.txt"])[0]
    tokenizer, ids = load_text(path)
    train, val = split(ids, 8, LAPTOP.validation_fraction)
    print(f"text        {path!a}: {len(ids):,} characters, stored as {ids.dtype}")
    print(f"vocabulary  {tokenizer.vocab_size} different ones: {tokenizer.characters!a}"[:100])
    print(f"split       {len(train):,} characters to learn from, {len(val):,} to measure on\n")

    starts = shuffled_sequences(len(train), 8, LAPTOP.seed, epoch=0)
    inputs, targets = get_batch(train, starts[:1], 8)  # (1, 8) each
    print(f"an epoch of {len(starts):,} sequences of 8; the first begins at {starts[0]:,}:")
    print(f"  inputs   {tokenizer.decode(inputs[0])!a:<20} {inputs[0].tolist()}")
    print(f"  targets  {tokenizer.decode(targets[0])!a:<20} {targets[0].tolist()}\n")
    print("the lessons in it: what is given -> what comes next")
    for end, target in enumerate(tokenizer.decode(targets[0]), start=1):
        print(f"  {tokenizer.decode(inputs[0, :end])!a:>20} -> {target!a}")


# ---- The fold: a first reader goes on to model_architecture.py here. What protects is below. ----


def pieces_of(path: str) -> Iterator[str]:
    """The text in pieces, without a byte-order mark, every line end as a newline character."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"cannot read the text {path!a}: it is not a file")
        with open(path, encoding="utf-8-sig") as file:
            try:
                yield from iter(lambda: file.read(1 << 16), "")
            except UnicodeDecodeError as error:
                offset = file.buffer.tell() - len(error.object) + error.start
                where = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
                raise UserError(f"{path!a} is not UTF-8: {where}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read the text {path!a}: {error.strerror}") from error


def refuse_unknown_characters(text: str, ids: np.ndarray) -> None:
    """Raise UserError naming the first character whose id is -1."""
    if ids.min(initial=0) < 0:
        where = int(np.argmax(ids < 0))
        name = f"{text[where]!a} (U+{ord(text[where]):04X}) at position {where}"
        raise UserError(f"the model does not know the character {name}; leave it out")


def refuse_short_text(length: int, block_size: int, validation_fraction: float) -> None:
    """Raise UserError, with the length needed, unless both parts hold a sequence and its target."""
    needed = max(2 * block_size + 4, int(block_size / validation_fraction) + 2)
    if length < needed:
        sizes = f"block_size {block_size} with validation_fraction {validation_fraction}"
        hint = "take a longer text or a smaller block_size"
        raise UserError(f"{sizes} needs {needed:,} or more characters, not {length:,}; {hint}")


if __name__ == "__main__":
    sys.exit(end_with_a_sentence(main))
