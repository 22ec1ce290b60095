"""Chapter 2 of 5: how text becomes numbers, and numbers become lessons.

A neural network computes with numbers, so the first question of every language model is how to
write text down as numbers. Ours takes the simplest answer, one number per character. At the end of
this file you know what a vocabulary is, why part of the text is kept away from training, and what
exactly the model is asked in every lesson: given these characters, which one comes next? It takes a
text file; it hands chapter 3 a vocabulary and chapter 4 batches of (inputs, targets). Run it to see
one window of the real text on that way:

    python data_handling.py
"""

import codecs
import hashlib
import io
import math
import os
import shutil
import signal
import stat
import sys
import tempfile
from typing import BinaryIO, Iterator, List, Tuple

import numpy as np
import torch

CHUNK = 1 << 16  # bytes read at once: a text of any size needs only this much room beside its ids
# Characters held out at most: more would make each evaluation slower, and hardly more exact.
LARGEST_HELD_OUT = 1_000_000


class TextError(ValueError):
    """A text that cannot be learned from or continued. The message says why and what to do."""


class CharTokenizer:
    """Translates characters to ids and back.

    The ids are the ranks of the characters in code-point order. So they depend on which characters
    occur, never on the order in which this run happened to meet them, and a saved model still knows
    its letters tomorrow.

    >>> CharTokenizer("hello").encode("hole").tolist()
    [1, 3, 2, 0]
    """

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self._codes = code_points(self.characters)
        # A table with one entry per code point makes encoding a single look-up per character, done
        # by NumPy. -1 stands for "never seen"; the last entry answers for every code point beyond
        # the table.
        self._id_of = np.full(int(self._codes.max(initial=0)) + 2, -1, dtype=np.int32)
        self._id_of[self._codes] = np.arange(len(self._codes))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def id_type(self) -> type:
        """The smallest integer type, of those that PyTorch can index, which holds every id."""
        return next(
            t for t in (np.uint8, np.int16, np.int32) if self.vocab_size - 1 <= np.iinfo(t).max
        )

    def encode(self, text: str) -> np.ndarray:
        """Ids of the characters of `text`. Raises TextError naming the first one without an id."""
        ids = np.take(self._id_of, code_points(text), mode="clip")
        if ids.min(initial=0) < 0:
            where = int(np.argmax(ids < 0))
            raise TextError(
                f"the character {text[where]!a} (U+{ord(text[where]):04X}) at position {where} is "
                f"not among the {self.vocab_size} characters the model knows; leave it out"
            )
        return ids.astype(self.id_type)

    def decode(self, ids: np.ndarray) -> str:
        """The text that `ids` stand for."""
        return (
            self._codes[np.asarray(ids, dtype=np.intp)]
            .tobytes()
            .decode("utf-32-le", "surrogatepass")
        )


def code_points(text: str) -> np.ndarray:
    """The characters of `text` as numbers: 'A' is 65 wherever Unicode is spoken."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def load_text(path: str) -> Tuple[CharTokenizer, torch.Tensor]:
    """Read a UTF-8 text file; return its tokenizer and its ids, (characters,) of its id_type.

    Two passes over the file, the first to learn which characters there are, the second to write
    down their ids, and never the whole text as a Python string: memory grows by the ids alone.
    Raises TextError for a file that cannot be read, is not UTF-8, or is empty.
    """
    with open_text(path) as file:
        seen, length = np.zeros(sys.maxunicode + 1, dtype=bool), 0
        for text in decoded_chunks(file, path):
            seen[code_points(text)] = True
            length += len(text)
        if length == 0:
            raise TextError(f"{path!a} is empty; there is nothing to learn from")
        tokenizer = CharTokenizer("".join(map(chr, np.flatnonzero(seen))))

        file.seek(0)
        ids, end = np.empty(length, dtype=tokenizer.id_type), 0
        for text in decoded_chunks(file, path):
            ids[end : end + len(text)] = tokenizer.encode(text)
            end += len(text)
    return tokenizer, torch.from_numpy(ids)


def split(
    ids: torch.Tensor, block_size: int, validation_fraction: float
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Cut the text in two: the first part to train on, the last part held out.

    A model can lower its loss on text it has met by remembering it. Only text it has never met
    shows whether it learned the language, so the last part never enters training. Raises TextError
    when either part is too short to hold one window and the character after it.
    """

    def held_out(length: int) -> int:
        return min(length - int(length * (1 - validation_fraction)), LARGEST_HELD_OUT)

    def long_enough(length: int) -> bool:
        return block_size < held_out(length) < length - block_size

    if not long_enough(len(ids)):
        needed = max(2 * block_size + 2, int(block_size / validation_fraction))
        while not long_enough(needed):
            needed += 1
        raise TextError(
            f"the text has {len(ids):,} characters; block_size {block_size} with "
            f"validation_fraction {validation_fraction} needs {needed:,} or more: take a longer "
            "text or a smaller block_size"
        )
    cut = len(ids) - held_out(len(ids))
    return ids[:cut], ids[cut:]


def windows_in(length: int, block_size: int) -> int:
    """Windows in one epoch over `length` ids: the same number whatever the epoch's offset."""
    return (length - min(block_size, length - block_size)) // block_size


def shuffled_windows(length: int, block_size: int, seed: int, epoch: int) -> torch.Tensor:
    """Starts of all windows of one epoch, (windows,) int64, in the order of training.

    Drawing windows at random would meet some characters often and others never. Instead the text is
    cut into windows side by side, and the windows are shuffled: every one is met exactly once. The
    cut begins at an offset of its own in every epoch, so that no character always stands first in
    its window, where it sees no past. (Up to a window's length at either end of the text sits out
    an epoch.) The result depends on the seed and the epoch alone: a resumed run finds its place by
    counting.
    """
    generator = np.random.default_rng([seed, epoch])
    offset = generator.integers(min(block_size, length - block_size))
    order = generator.permutation(windows_in(length, block_size)).astype(np.int64)
    return torch.from_numpy(offset + block_size * order)


def gather(
    ids: torch.Tensor, starts: torch.Tensor, block_size: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """One batch of lessons: inputs and targets, both (B, T) int64, on the device of `ids`.

    The target of every character is the character after it, so targets are the inputs shifted by
    one. One window of T characters thus holds T lessons: predict the second from the first, the
    third from the first two, and so on.
    """
    positions = starts[:, None] + torch.arange(block_size + 1, device=ids.device)  # (B, T + 1)
    windows = ids[positions].long()
    return windows[:, :-1], windows[:, 1:]


def fingerprint(tokenizer: CharTokenizer, ids: torch.Tensor) -> str:
    """A short name that no other text has: a run resumes only on the text it began with."""
    digest = hashlib.sha256(tokenizer.characters.encode("utf-8", "surrogatepass"))
    digest.update(ids.numpy())
    return digest.hexdigest()


# What follows opens and decodes files that may be anything; a first reader can skip to main.


def open_text(path: str) -> BinaryIO:
    """Open `path` for reading twice. A pipe can be read only once, so it is copied first."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise TextError(f"{path!a} is a device, not a text file")
        file = open(path, "rb")
        if stat.S_ISREG(mode):
            return file
        with file:
            copy = tempfile.TemporaryFile()
            shutil.copyfileobj(file, copy, CHUNK)
            copy.seek(0)
            return copy
    except (OSError, ValueError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError(f"cannot read the text {path!a}: {reason(error)}") from error


def decoded_chunks(file: BinaryIO, path: str) -> Iterator[str]:
    """The text of `file` in pieces, without a byte-order mark and with \\n for every line end."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    done = 0  # bytes handed to the decoder so far
    while True:
        try:
            chunk = file.read(CHUNK)
            text = utf8.decode(chunk, final=not chunk)
        except OSError as error:
            raise TextError(f"cannot read the text {path!a}: {reason(error)}") from error
        except UnicodeDecodeError as error:
            # The decoder also holds the unfinished character that the chunk before this one ended
            # with.
            offset = done + len(chunk) - len(error.object) + error.start
            raise TextError(
                f"{path!a} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                f"{offset}; save it as UTF-8 in a text editor"
            ) from error
        if done == 0:
            text = text[1:] if text.startswith("\ufeff") else text
        done += len(chunk)
        yield line_ends.decode(text, final=not chunk)
        if not chunk:
            return


def reason(error: Exception) -> str:
    """What an error says, in one line and in ASCII."""
    words = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return words.splitlines()[0].encode("unicode_escape").decode()


def main(argv: List[str]) -> None:
    """Show one window of a real text as characters, as ids, and as the ladder of lessons in it."""
    path = argv[1] if len(argv) > 1 else "input.txt"
    tokenizer, ids = load_text(path)
    train, held_out = split(ids, block_size=8, validation_fraction=0.1)
    print(f"{path!a}: {len(ids):,} characters, stored as {ids.dtype}")
    print(f"vocabulary: {tokenizer.vocab_size} different ones, {tokenizer.characters!a}")
    print(f"split: {len(train):,} characters to train on, {len(held_out):,} held out\n")

    starts = shuffled_windows(len(train), block_size=8, seed=1337, epoch=0)
    inputs, targets = gather(train, starts[:1], block_size=8)
    print(
        f"an epoch with block_size 8 has {len(starts):,} windows; the first begins at {starts[0]:,}"
    )
    print(f"  inputs  {tokenizer.decode(inputs[0])!a:<24} {inputs[0].tolist()}")
    print(f"  targets {tokenizer.decode(targets[0])!a:<24} {targets[0].tolist()}\n")
    print("the lessons in it: context -> target")
    for end in range(1, 9):
        context, target = (
            tokenizer.decode(inputs[0, :end]),
            tokenizer.decode(targets[0, end - 1 : end]),
        )
        print(f"  {context!a:>24} -> {target!a}")

    guesses = tokenizer.vocab_size
    print(
        f"\nguessing blindly costs ln({guesses}) = {math.log(guesses):.2f} nats "
        f"({math.log2(guesses):.2f} bits) a character; learning is getting below that"
    )


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` may close the pipe early
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        main(sys.argv)
    except TextError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
