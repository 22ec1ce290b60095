"""Chapter 5 of 5: writing, one character at a time.

At the end of this file you know how a model that only guesses the next character writes whole
pages: its logits become probabilities, one character is drawn, and the model reads it as if it had
been there all along. From chapter 4 it takes the file tiny_gpt_model.pth; what it hands on is text.

    python generate_text.py                                 writes 500 characters, temperature 0.8
    python generate_text.py --prompt "ROMEO:" --seed 1      continues a text, repeatably
    python generate_text.py --temperature 0.5 > page.txt    plays it safe; the page gets only text
    python generate_text.py --prompt "ROMEO:" --attention a.png     draws what its characters see
"""

import argparse
import importlib.util
import io
import os
import sys
import time
from typing import Any, Callable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from data_handling import CharTokenizer
from hyperparameters import Parser, UserError, end_with_a_sentence
from model_architecture import KVCache, TinyGPT, attention_of, load_checkpoint, reason


def next_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Logits (B, V) to the probabilities (B, V) from which the next character is drawn.

    Softmax makes probabilities of logits, as it makes shares of scores in attention. A model is
    never quite sure, so many unlikely characters have a little each, and together enough to spoil a
    page. Three settings keep them in check. The temperature divides the logits: below 1 it widens
    the gaps between them (safer, duller), above 1 it narrows them (bolder, wilder); 0 stands for
    its limit, all on the best. `top_k` keeps the k likeliest (0: all). `top_p` keeps, of these, the
    fewest that together reach the share p (1.0: all; Holtzman et al. 2020).
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    # To subtract one number from all changes no probability; with the best at 0, none overflows.
    logits = logits.double()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k == 0 and top_p == 1:
        return logits.softmax(dim=-1)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, V) each, best first
    if top_k > 0:
        logits[:, top_k:] = -torch.inf  # a probability of exactly 0
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        # A character is out if those before it reach p without it. The first has none before it.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= top_p] = 0
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, probabilities)  # ids in their order


@torch.inference_mode()  # as no_grad in chapter 4, and quicker
def generate(
    model: TinyGPT, prompt: Tensor, max_new_tokens: int, generator: torch.Generator, **settings: Any
) -> Iterator[Tensor]:
    """Continue the ids `prompt`, (B, T); yield the next id of every row, (B,), as it is drawn.

    Of a prompt longer than the context window, its end is read. Once the window is full, its oldest
    characters must go; but the keys and values of the rest were made with them in sight. So its
    newest half is read again into an empty cache; half, so that this is rare. `generator` is one of
    the CPU, as other devices draw otherwise. `settings` are those of next_probabilities.
    """
    model.eval()  # dropout is for learning
    device, block_size = model.embedding.weight.device, model.block_size
    context = prompt[:, -block_size:]  # (B, T): what the cache holds once `unread` is read
    unread, cache = context, KVCache()
    for _ in range(max_new_tokens):
        logits = model(unread.to(device), cache)[:, -1].cpu()  # (B, V)
        probabilities = next_probabilities(logits, **settings)
        refuse_overflow(probabilities)
        drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1), by chance
        yield drawn[:, 0]
        context, unread = torch.cat((context, drawn), dim=1), drawn
        if context.shape[1] > block_size:
            context = context[:, -max(block_size // 2, 1) :]
            unread, cache = context, KVCache()


def write_samples(tokenizer: CharTokenizer, prompt: str, ids: Iterator[Tensor], count: int) -> None:
    """Print the first of `count` samples as it is made, and those made beside it after it."""
    others: List[List[int]] = [[] for _ in range(count - 1)]
    print(prompt, end="", flush=True)
    for drawn in ids:  # (B,)
        print(tokenizer.decode(drawn[:1]), end="", flush=True)
        for other, new in zip(others, drawn[1:].tolist()):
            other.append(new)
    print(flush=True)
    for other in others:
        print("-" * 40 + "\n" + prompt + tokenizer.decode(other), flush=True)


def main(argv: Optional[List[str]] = None) -> None:
    """Write as the flags say."""
    flags = parse(argv)
    model, vocabulary, _ = load_checkpoint(flags.checkpoint)
    tokenizer = CharTokenizer(vocabulary)
    prompt = read_prompt(flags.prompt, tokenizer)
    prompt_ids = torch.from_numpy(tokenizer.encode(prompt)).long()  # (T,)
    if flags.attention:
        write_picture(flags.attention, draw_attention, model, prompt, prompt_ids)
    model, seed = model.to(choose_device(flags.device)[0]), flags.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
        print(f"seed {seed}", file=sys.stderr)  # stdout is for the text alone
    generator = torch.Generator().manual_seed(seed)
    batch = prompt_ids.repeat(flags.num_samples, 1)  # (B, T)
    settings = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p")}
    ids = generate(model, batch, flags.max_new_tokens, generator, **settings)
    write_samples(tokenizer, prompt, ids, flags.num_samples)


# ---- The fold: a first reader has come to the end of the walk. What protects stands below. -------


def read_prompt(wanted: Optional[str], tokenizer: CharTokenizer) -> str:
    """The prompt as given, from stdin for "-"; without one, a character that starts a line."""
    if wanted == "-":
        try:
            wanted = (sys.stdin.buffer.read() if sys.stdin else b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt on stdin is not UTF-8 at byte {error.start}") from error
        wanted = wanted.replace("\r\n", "\n").replace("\r", "\n")
    return wanted or ("\n" if "\n" in tokenizer.characters else tokenizer.characters[0])


def refuse_overflow(probabilities: Tensor) -> None:
    """Raise UserError when the parameters, however finite, led to NaN (or infinity, and so NaN)."""
    if torch.isnan(probabilities).any():
        raise UserError("the model's parameters are so large that they overflow; train it again")


def choose_device(wanted: str) -> Tuple[torch.device, str]:
    """The device for "auto", "cpu", "cuda" or "mps", and in a few words why. Raises UserError."""
    works = {"cpu": True, "mps": torch.backends.mps.is_available()}.get(wanted, False)
    why = "as asked for" if works else "no usable GPU is visible"
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        try:  # a GPU too old for this build of PyTorch is visible, yet cannot run anything
            torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()
            return device, torch.cuda.get_device_name(device)
        except RuntimeError as error:
            why = f"{device} is visible but cannot run a kernel: {reason(error)}"
            wanted = "cuda" if "LOCAL_RANK" in os.environ else wanted  # of several, none falls back
    if not works and wanted != "auto":
        raise UserError(f"--device {wanted} cannot be used ({why}); try --device cpu")
    return torch.device("cpu" if wanted == "auto" else wanted), why


def write_whole(path: str, data: Any) -> None:
    """Make `data` the file `path`, which is the old or the new one at any moment, even of a crash.

    Raises OSError; then nothing of the new one stays behind.
    """
    path = os.path.realpath(path)
    try:
        with open(f"{path}.part", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        try:
            os.replace(f"{path}.part", path)
        except PermissionError:  # on Windows, a virus scanner may hold a new file for a moment
            time.sleep(1)
            os.replace(f"{path}.part", path)
    finally:
        if os.path.exists(f"{path}.part"):  # it is gone if all went well
            os.remove(f"{path}.part")


def write_picture(path: str, draw: Callable, *what: Any) -> None:
    """Write, as the kind of file that `path` ends in, what `draw(figure, *what)` draws."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own cannot be found from outside it
    from matplotlib.figure import Figure

    file, figure = io.BytesIO(), Figure(layout="constrained")
    draw(figure, *what)
    figure.savefig(file, format=path[-3:], dpi=150)
    write_whole(path, file.getbuffer())


@torch.inference_mode()
def draw_attention(figure: Any, model: TinyGPT, prompt: str, ids: Tensor) -> None:
    """The attention weights over the end of a prompt, ids (T,): a row a layer, a column a head."""
    from matplotlib import colors, font_manager

    weights = torch.cat(attention_of(model, ids[None, -model.block_size :]))  # (layers, H, T, T)
    layers, H, T, _ = weights.shape
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()
    shown = prompt[-T:].replace(" ", "\u2423")  # the sign for a space
    shown = [c if c.isprintable() and ord(c) in font else ascii(c)[1:-1] for c in shown]
    step = 1 + T // 25  # where there are many characters, each label names several
    labels = ["".join(shown[i : i + step]) for i in range(0, T, step)]
    style = {"fontsize": 8, "family": "DejaVu Sans Mono"}
    figure.set_size_inches(3.2 * H + 2, 3.2 * layers + 1)
    panels = figure.subplots(layers, H, sharex=True, sharey=True, squeeze=False)
    for i, panel in enumerate(panels.flat):
        norm = colors.PowerNorm(0.5, 0, 1)  # a square root: small shares, the most, stay visible
        image = panel.imshow(weights[i // H, i % H].numpy(), cmap="Blues", norm=norm)
        panel.set_title(f"layer {i // H + 1}, head {i % H + 1}")
        panel.set_xticks(range(0, T, step), labels, rotation=90 * (step > 1), **style)
        panel.set_yticks(range(0, T, step), labels, **style)
    figure.supxlabel("character looked at")
    figure.supylabel("character that looks")
    figure.colorbar(image, ax=panels, label="attention weight", shrink=0.5)


def picture(path: str) -> str:
    """A check for argparse: the name of a picture, and matplotlib at hand to draw it."""
    if not importlib.util.find_spec("matplotlib") or path[-4:] not in (".png", ".pdf", ".svg"):
        hint = "a picture ends in .png, .pdf or .svg, and needs matplotlib: pip install matplotlib"
        raise argparse.ArgumentTypeError(f"{path!a} cannot be drawn; {hint}")
    return path


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The flags of `python generate_text.py`. Raises UserError for a number that cannot work."""
    parser = Parser("generate_text.py", description="Write with TinyGPT.", allow_abbrev=False)
    add, devices = parser.add_argument, ["auto", "cpu", "cuda", "mps"]
    add("--checkpoint", default="tiny_gpt_model.pth", help="the trained model (%(default)s)")
    add("--prompt", help="the text to continue, a line end if absent; - reads it from stdin")
    add("--attention", type=picture, help="a picture to draw of what its characters look at")
    add("--device", choices=devices, default="auto", help="auto: a GPU if it works")
    numbers = (
        ("max_new_tokens", 500, 0, 10**9, "characters to write (%(default)s)"),
        ("temperature", 0.8, 0, 1000, "0 takes the likeliest, more is wilder (%(default)s)"),
        ("top_k", 0, 0, 10**9, "draw from the k likeliest; 0: from all (%(default)s)"),
        ("top_p", 1.0, 1e-9, 1, "draw from the likeliest that together reach p (%(default)s)"),
        ("num_samples", 1, 1, 1000, "texts to write side by side (%(default)s)"),
        ("seed", None, 0, 2**63 - 1, "same seed, same text; a new one if absent"),
    )
    for name, default, _, _, text in numbers:
        add(f"--{name}", default=default, type=type(default or 0), help=text)
    flags = parser.parse_args(argv)
    for name, default, lowest, highest, _ in numbers:
        value = getattr(flags, name)
        if value != default and not lowest <= value <= highest:
            parser.error(f"argument --{name}: {value} is not from {lowest} to {highest}")
    return flags


if __name__ == "__main__":
    sys.exit(end_with_a_sentence(main, lower="--num_samples"))
