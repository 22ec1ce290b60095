"""Chapter 1 of 5: the dials of TinyGPT, and how to turn them.

A language model is a function with hundreds of thousands of adjustable numbers (its parameters,
which training finds) and fifteen numbers that a person chooses: the hyperparameters, called dials
here. At the end of this file you know which dials there are and which two ready sets exist. Do not
stop at a word you do not know yet: the chapter named above each group explains it. Nothing comes
before this file; chapter 4 hands its dials to the data and to the model. Run it to see both sets:

    python hyperparameters.py

Change a default here and every later run uses it; `python train_model.py --n_layer 6` changes one
run only.
"""

import argparse
import os
import sys
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Dict


class DialError(ValueError):
    """A dial stands at a value that cannot work. The message says which, and what would work."""


def dial(default: Any, lowest: float, highest: float, meaning: str) -> Any:
    """One line of the table below: its default, the range that makes sense, and what it means."""
    return field(
        default=default, metadata={"lowest": lowest, "highest": highest, "meaning": meaning}
    )


@dataclass(frozen=True)
class Hyperparameters:
    """Every choice a run depends on. Frozen: no code changes one behind the reader's back.

    Raises DialError when a value is of the wrong type, out of its range, or does not fit the
    others.
    """

    # Data: what one training step sees (chapter 2).
    block_size: int = dial(128, 1, 65_536, "context window: characters the model sees at once")
    batch_size: int = dial(8, 1, 65_536, "windows learned from in one step, over all processes")
    validation_fraction: float = dial(0.1, 0.001, 0.5, "share of the text held out to measure on")

    # Model: how big the machine is (chapter 3).
    n_layer: int = dial(4, 1, 1_000, "blocks stacked on top of each other")
    n_head: int = dial(4, 1, 1_024, "attention heads in a block; each gets n_embd / n_head numbers")
    n_embd: int = dial(128, 2, 65_536, "numbers that describe one character inside the model")
    dropout: float = dial(0.0, 0.0, 0.99, "share of each block's output zeroed in training")

    # Optimisation: how it learns (chapter 4).
    epochs: int = dial(4, 1, 1_000_000, "passes over the training text")
    learning_rate: float = dial(6e-3, 1e-9, 10.0, "size of the largest step, reached after warm-up")
    warmup_steps: int = dial(
        100, 0, 1_000_000, "steps to reach learning_rate, a tenth of a run at most"
    )
    weight_decay: float = dial(
        0.4, 0.0, 100.0, "each step shrinks every matrix by this times the rate"
    )
    beta2: float = dial(0.95, 0.0, 0.99999, "memory of AdamW's average of squared gradients")
    gradient_clip: float = dial(
        1.0, 1e-6, 1e6, "longest gradient (as a vector) that is not shortened"
    )
    seed: int = dial(1337, 0, 2**63 - 1, "where every random choice starts; same seed, same result")

    # Reporting.
    save_minutes: float = dial(5.0, 0.01, 1e6, "minutes between saves inside a long epoch")

    @property
    def head_size(self) -> int:
        """Numbers that one attention head works with. Never stored, so it cannot go stale."""
        return self.n_embd // self.n_head

    def __post_init__(self) -> None:
        for one in fields(self):
            check_dial(one, getattr(self, one.name))
            # A whole number is welcome where a broken one is meant; object lets us thaw the field.
            object.__setattr__(self, one.name, one.type(getattr(self, one.name)))
        if self.n_embd % (2 * self.n_head) != 0:
            raise DialError(
                f"n_embd must be a multiple of 2 * n_head ({2 * self.n_head}), not {self.n_embd}: "
                "every head gets an equal and even share of it"
            )


def check_dial(one: Field, value: Any) -> None:
    """Raise DialError unless `value` is a number of the dial's type inside the dial's range."""
    lowest, highest = one.metadata["lowest"], one.metadata["highest"]
    types = (int,) if one.type is int else (int, float)
    # NaN fails every comparison, so it is refused too; and True is an int to Python, not to us.
    if type(value) not in types or not lowest <= value <= highest:
        kind = "a whole number" if one.type is int else "a number"
        raise DialError(
            f"{one.name} must be {kind} from {lowest:,} to {highest:,}, not {ascii(value)[:40]}"
        )


# Two ready sets. The first is sized for a laptop without a GPU: minutes. The second is for a GPU: a
# ten times larger model would over-fit a short text without dropout. Training picks by the device;
# `--preset` overrides.
LAPTOP = Hyperparameters()
GPU = Hyperparameters(
    block_size=256,
    batch_size=64,
    n_layer=6,
    n_head=6,
    n_embd=384,
    dropout=0.2,
    epochs=25,
    learning_rate=2e-3,
)
PRESETS = {"laptop": LAPTOP, "gpu": GPU}


# What follows serves the command line; a first reader can skip to chapter 2.


class OneSentenceParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is answered with one ASCII sentence, not with a usage page."""

    def error(self, message: str) -> None:
        sentence = message.encode("unicode_escape").decode()
        self.exit(2, f"error: {sentence}; {self.prog} --help lists what there is\n")


def add_dial_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one flag for every dial, spelled as the dial, its meaning as the help."""
    group = parser.add_argument_group("dials (default: laptop set / GPU set)")
    for one in fields(Hyperparameters):
        group.add_argument(
            f"--{one.name}",
            type=one.type,
            metavar="X",
            help=one.metadata["meaning"]
            + f" ({getattr(LAPTOP, one.name)} / {getattr(GPU, one.name)})",
        )


def dials_given(arguments: argparse.Namespace) -> Dict[str, Any]:
    """The dials that the command line named, and only those."""
    named = {name: getattr(arguments, name) for name in asdict(LAPTOP)}
    return {name: value for name, value in named.items() if value is not None}


def file_name(text: str) -> str:
    """A check for argparse: the name of a file is at least not empty."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!a} is no file name")
    return text


class SteadyStream:
    """stdout or stderr with a closed pipe or a full disk behind it: the text is lost, not the run.

    With `raising`, the error is passed on once, for a program whose text is its only result.
    """

    def __init__(self, stream: Any, raising: bool) -> None:
        self.stream, self.raising, self.broken = stream, raising, False

    def write(self, text: str) -> int:
        try:
            if not self.broken:
                self.stream.write(text)
                self.stream.flush()
        except OSError:
            self.broken = True
            # Python flushes once more when it exits: let that go nowhere instead of failing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.raising:
                raise
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def steady_output(raising: bool = False) -> None:
    """Make output survive a missing terminal, a closed pipe, a code page without the character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):  # IDLE and notebooks have streams of their own
            stream.reconfigure(errors="replace")
        setattr(sys, name, SteadyStream(stream, raising and name == "stdout"))


def main() -> None:
    """Print both sets of dials side by side."""
    print(f"{'dial':<20}{'laptop':>9}{'gpu':>9}  meaning")
    for one in fields(Hyperparameters):
        laptop, gpu = getattr(LAPTOP, one.name), getattr(GPU, one.name)
        print(f"{one.name:<20}{laptop:>9}{gpu:>9}  {one.metadata['meaning']}")


if __name__ == "__main__":
    steady_output()
    main()
