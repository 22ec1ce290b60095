"""Chapter 5 of 5: writing, one character at a time.

At the end of this file you know how a model that only scores the next character writes whole pages:
its scores become probabilities, one character is drawn, and that character is read as if it had
been there all along. It takes the file that chapter 4 left; what it hands on is text.

    python generate_text.py                                 writes 500 characters
    python generate_text.py --prompt "ROMEO:" --seed 1      continues a text, repeatably
    python generate_text.py --temperature 0.5 > page.txt    plays it safe; only the text is piped
"""

import argparse
import math
import os
import sys
from typing import Iterator, List, Optional

import torch

from data_handling import CharTokenizer, TextError
from hyperparameters import OneSentenceParser, file_name, steady_output
from model_architecture import (
    CheckpointError,
    DeviceError,
    TinyGPT,
    choose_device,
    is_out_of_memory,
    load_checkpoint,
    reason,
)


def next_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Scores (B, V) to the probabilities (B, V) from which the next character is drawn.

    Three dials keep the unlikely in check. The temperature divides the scores: below 1 it widens
    the gaps between them (safer, duller), above 1 it narrows them (bolder, wilder), and 0 stands
    for its limit, all on the best. `top_k` keeps the k best (0: all). `top_p` keeps the smallest
    set of best characters whose probabilities reach p (Holtzman et al. 2020); 1.0 keeps all.
    """
    if temperature == 0:
        top_k, temperature = 1, 1.0
    # Double precision, and the best score moved to 0: no temperature above 0 can overflow then.
    scores = logits.double()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    if top_k == 0 and top_p == 1:
        return scores.softmax(dim=-1)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)  # (B, V) each
    probabilities = scores.softmax(dim=-1)
    if top_k:
        probabilities[:, top_k:] = 0
    if top_p < 1:
        # A character is out when the better ones reach p without it. The best always stays.
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
        better_ones = probabilities.cumsum(dim=-1) - probabilities
        probabilities[:, 1:][better_ones[:, 1:] >= top_p] = 0
    probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one id for every row of probabilities (B, V): (B, 1).

    Every character waits for a random time (exponentially distributed) divided by its probability;
    the chance to be the first is then exactly that probability. `torch.multinomial` draws the same
    ids in the same way, but checks its input first, which takes as long as half a block of the
    model.
    """
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / times).argmax(dim=-1, keepdim=True)  # of the shortest wait


@torch.inference_mode()
def generate(
    model: TinyGPT,
    prompt: torch.Tensor,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[torch.Tensor]:
    """Continue the ids `prompt`, (B, T); yield the next id of every row, (B,), as it is drawn.

    The cache makes each new character cost one position. When the window is full, the newest half
    of it is read again into an empty cache: the text may go on for ever at the same speed. Of a
    prompt longer than the window, the end is read. Sampling happens on the CPU, so `generator` need
    not live where the model does.
    """
    model.eval()  # dropout is for learning
    device, block_size = model.embedding.weight.device, model.block_size
    context = prompt[:, -block_size:]  # (B, T): what the cache holds once `unread` is read
    unread, cache = context, model.new_cache(len(prompt))
    for _ in range(max_new_tokens):
        logits = model(unread.to(device), cache)[:, -1].cpu()  # (B, V)
        probabilities = next_probabilities(logits, temperature, top_k, top_p)
        drawn = draw(probabilities, generator)  # (B, 1)
        yield drawn[:, 0]
        context = torch.cat((context, drawn), dim=1)
        unread = drawn
        if context.shape[1] > block_size:
            context = context[:, -max(block_size // 2, 1) :]
            unread, cache = context, model.new_cache(len(prompt))


# ---- The command line ------------------------------------------------------------------------


def number(kind: type, lowest: float, highest: float):
    """A check for argparse: text to a number of `kind` from `lowest` to `highest`."""

    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!a} is no {name} from {lowest} to {highest}")
        return value

    return check


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The flags of `python generate_text.py`."""
    parser = OneSentenceParser(
        prog="generate_text.py", description="Write text with TinyGPT.", allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint",
        type=file_name,
        default="tiny_gpt_model.pth",
        help="the trained model (%(default)s)",
    )
    parser.add_argument(
        "--prompt", help="the text to continue (default: a newline); - reads it from stdin"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=number(int, 0, 10**9),
        default=500,
        help="characters to write (%(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 0, 1000),
        default=0.8,
        help="0 always takes the likeliest character, 1 trusts the model, more is wilder (0.8)",
    )
    parser.add_argument(
        "--top_k", type=number(int, 0, 10**9), default=0, help="draw from the k likeliest (0: all)"
    )
    parser.add_argument(
        "--top_p",
        type=number(float, 1e-9, 1),
        default=1.0,
        help="draw from the likeliest that together reach this probability (1.0: all)",
    )
    parser.add_argument(
        "--num_samples",
        type=number(int, 1, 1000),
        default=1,
        help="texts to write side by side (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), help="same seed, same text (default: a new one)"
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="where to compute; auto takes a CUDA GPU if there is one, else the CPU",
    )
    return parser.parse_args(argv)


def read_prompt(wanted: Optional[str], tokenizer: CharTokenizer) -> str:
    """The prompt as given, from stdin for "-"; without one, a character that starts a line."""
    if wanted == "-":
        data = sys.stdin.buffer.read() if sys.stdin else b""
        try:
            wanted = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise TextError(f"the prompt on stdin is not UTF-8 at byte {error.start}") from error
    if wanted:
        return wanted
    return "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]


def write_samples(
    tokenizer: CharTokenizer, prompt: str, ids: Iterator[torch.Tensor], count: int
) -> None:
    """Print the first sample as it is made, and those written beside it after it."""
    others: List[List[int]] = [[] for _ in range(count - 1)]
    print(prompt, end="", flush=True)
    for drawn in ids:  # (B,)
        print(tokenizer.decode(drawn[:1].numpy()), end="", flush=True)
        for other, new in zip(others, drawn[1:].tolist()):
            other.append(new)
    print(flush=True)
    for other in others:
        print("-" * 40)
        print(prompt + tokenizer.decode(other), flush=True)


def main(argv: Optional[List[str]] = None) -> int:
    """Write; return the exit status: 0, or 2 for anything the user can mend."""
    arguments = parse(argv)
    try:
        model, characters, _ = load_checkpoint(arguments.checkpoint)
        tokenizer = CharTokenizer(characters)
        prompt = read_prompt(arguments.prompt, tokenizer)
        prompt_ids = torch.from_numpy(tokenizer.encode(prompt)).long()
        device, _ = choose_device(arguments.device)
        seed = arguments.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(4), "big")
            print(f"seed {seed}", file=sys.stderr)
        ids = generate(
            model.to(device),
            prompt_ids.repeat(arguments.num_samples, 1),
            arguments.max_new_tokens,
            torch.Generator().manual_seed(seed),
            arguments.temperature,
            arguments.top_k,
            arguments.top_p,
        )
        write_samples(tokenizer, prompt, ids, arguments.num_samples)
        return 0
    except (TextError, CheckpointError, DeviceError) as mistake:
        message = str(mistake)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        return 0
    except OSError as error:
        message = f"the text cannot be written: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory; lower --num_samples ({reason(error)})"
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    steady_output(raising=True)
    sys.exit(main())
