"""Chapter 1 of 5: the numbers that a person chooses.

A language model is a function that says what comes next in a text. It has very many adjustable
numbers, its parameters (680,000 on a laptop), which training finds. The few that a person chooses
beforehand are its hyperparameters, or settings. This file lists them; most words in it are new, and
chapters 2 to 4 explain them. All files import this one; running it prints the table.
"""

import argparse
import difflib
import os
import re
import sys
from dataclasses import dataclass, field, fields
from typing import Any, Callable, List, Optional


def setting(laptop: Any, gpu: Any, lowest: float, highest: float, text: str) -> Any:
    """One line of the table: a value for either machine, the range that is allowed, the meaning."""
    return field(default=laptop, metadata={"gpu": gpu, "range": (lowest, highest), "help": text})


@dataclass(frozen=True)
class Hyperparameters:
    """The choices that a run can vary. Frozen: no code changes one behind the reader's back.

    A line has the value for a laptop, the one for a GPU, the lowest and the highest allowed. Change
    it here for good, or for one run: `python train_model.py --n_layer 6`.
    """

    # What is read (chapter 2). A step of training takes about batch_size * block_size characters.
    # Here, a block is a stretch of text (later: a sequence); the blocks of n_layer are model parts.
    block_size: int = setting(512, 512, 1, 65_536, "context window: characters seen at once")
    batch_size: int = setting(2, 4, 1, 65_536, "full-length sequences learned from in one step")
    validation_fraction: float = setting(0.1, 0.1, 0.001, 0.5, "share measured on (max 1 M chars)")

    # How large the model is (chapter 3).
    n_layer: int = setting(4, 6, 1, 1_000, "blocks of the model, often called layers")
    n_head: int = setting(4, 6, 1, 1_024, "attention heads in each block")
    n_embd: int = setting(128, 384, 2, 65_536, "numbers that describe a position of a text")
    dropout: float = setting(0.0, 0.2, 0.0, 0.99, "share of a block's results zeroed in training")

    # How it learns (chapter 4).
    epochs: int = setting(4, 8, 1, 1_000_000, "passes over the training text")
    learning_rate: float = setting(6e-3, 2e-3, 1e-9, 10.0, "size of a step, at its largest")
    warmup_steps: int = setting(100, 100, 0, 1_000_000, "growing first steps (at most 1 in 10)")
    weight_decay: float = setting(0.3, 1.6, 0.0, 100.0, "pull of large matrices towards zero")
    beta2: float = setting(0.95, 0.95, 0.0, 0.99999, "how slowly AdamW forgets squared gradients")
    gradient_clip: float = setting(1.0, 1.0, 1e-6, 1e6, "length to which a longer gradient shrinks")
    seed: int = setting(1337, 1337, 0, 2**63 - 1, "start of all randomness: same seed, same run")
    save_minutes: float = setting(5.0, 5.0, 0.01, 1e6, "minutes between saves in a long epoch")
    sample_characters: int = setting(160, 160, 0, 10_000, "written after each epoch, to watch")

    def __post_init__(self) -> None:
        refuse_nonsense(self)


def main(_: Optional[List[str]] = None) -> None:
    """Print the table."""
    print(f"{'setting':<20}{'laptop':>8}{'gpu':>8}  meaning")
    for one in fields(Hyperparameters):
        print(f"{one.name:<20}{one.default:>8}{one.metadata['gpu']:>8}  {one.metadata['help']}")


# ---- The fold: a first reader goes on to data_handling.py here. What protects stands below. ----


class UserError(ValueError):
    """What the user can mend. Its text is one sentence: what is wrong, and what to do."""


def refuse_nonsense(settings: Hyperparameters) -> None:
    """Raise UserError naming the first setting whose type or size is wrong."""
    for one in fields(settings):
        value, (lowest, highest) = getattr(settings, one.name), one.metadata["range"]
        # NaN fails every comparison, so it is refused too; and True is an int to Python, not to us.
        if type(value) not in (int, one.type) or not lowest <= value <= highest:
            kind = f"a {'whole ' if one.type is int else ''}number from {lowest:,} to {highest:,}"
            raise UserError(f"{one.name} must be {kind}, not {ascii(value)[:40]}")
    if settings.n_embd % (2 * settings.n_head) != 0:  # every head gets an equal and even share
        raise UserError(f"n_embd must be a multiple of 2 * n_head, not {settings.n_embd}")


LAPTOP = Hyperparameters()
GPU = Hyperparameters(**{one.name: one.metadata["gpu"] for one in fields(Hyperparameters)})


class Parser(argparse.ArgumentParser):
    """argparse, but a slip is answered with one sentence, which guesses the flag that was meant."""

    def error(self, message: str) -> None:
        words = message.replace("=", " ").split()  # "unrecognized arguments: --n_layers 3"
        likely = difflib.get_close_matches((words + [""])[2], self._option_string_actions, 1)
        hint = f"did you mean {likely[0]}?" if likely else "--help lists the flags"
        raise UserError(f"{message}; {hint}")


def end_with_a_sentence(main: Callable, argv: Optional[List[str]] = None, lower: str = "") -> int:
    """The exit status of `main(argv)`; what the user can mend is one sentence on stderr, and 2."""
    for name in ("stdout", "stderr"):  # Python has none where there is no terminal at all
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w", encoding="utf-8"))
        getattr(getattr(sys, name), "reconfigure", lambda **_: None)(errors="replace")
    try:
        return main(argv) or sys.stdout.flush() or 0  # both return None
    except (KeyboardInterrupt, BrokenPipeError) as end:  # the user, or `| head`, has seen enough
        sys.stdout = sys.stderr  # or Python would try, at its end, to write the rest
        return 130 if isinstance(end, KeyboardInterrupt) else 0
    except (UserError, OSError) as error:
        sentence = str(error)
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|(out of|allocate|enough) mem|bad.alloc|ALLOC_F", repr(error)):
            raise
        sentence = f"out of memory; lower {lower}"
    sys.stdout = sys.stderr  # a full disk may be behind the other one
    print("error:", "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in sentence), flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(end_with_a_sentence(main))
